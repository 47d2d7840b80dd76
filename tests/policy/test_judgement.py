"""Every difference is refused under the strict policy, naming the field, and allowed by that field alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import TensorEntry, read_manifest
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.integrity.differences import ABSENT
from resume_kit.policy.judgement import Change, Judgement, RunFacts, changes_table, judge, ranks_move
from resume_kit.policy.policy import Policy
from tests.checkpoints import commit
from tests.policy.runs import DEEPSPEED, FROZEN, MEGATRON, WEIGHTS, but, with_tensors, without_tensors

STRICT = Policy()
LIVE = "the live value is taken"
BATCH = "the live batch is taken, the sample position kept"
SCHEDULE = "live schedule and LR, at the saved position"
ZERO = "moments and step start from zero"


def texts(judgement: Judgement) -> str:
    return "\n".join(map(str, judgement.refusals))


# -- one difference at a time: facts, changes, part, what the refusal says, policy that allows it, what is done

SINGLE: list[tuple[RunFacts, dict[str, Any], str, str, dict[str, Any], str]] = [
    (
        DEEPSPEED,
        {"topology/zero_stage": 1},
        "topology",
        "zero_stage: saved with 3, live 1",
        {"topology": "reshard"},
        "every rank reads its own part of the new layout",
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/zero_optimization/sub_group_size": 1},
        "topology",
        "deepspeed.zero_optimization.sub_group_size: saved with 9000, live 1",
        {"topology": "reshard"},
        LIVE,
    ),
    (
        MEGATRON,
        {"topology/virtual_pipeline": 2},
        "topology",
        "virtual_pipeline: saved with 1, live 2",
        {"topology": "reshard"},
        "every rank reads its own part of the new layout",
    ),
    (
        MEGATRON,
        {"pinned/parallel/overlap_grad_reduce": True},
        "topology",
        "parallel.overlap_grad_reduce: saved with False, live True",
        {"topology": "reshard"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"data/global_batch_size": 16},
        "global batch",
        "global_batch_size: saved with 8, live 16",
        {"global_batch": "change"},
        BATCH,
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/optimizer/params/lr": 0.001},
        "learning rate",
        "deepspeed.optimizer.params.lr: saved with 0.003, live 0.001",
        {"learning_rate": "override"},
        SCHEDULE,
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/scheduler/params/warmup_num_steps": 9},
        "learning rate",
        "deepspeed.scheduler.params.warmup_num_steps: saved with 5, live 9",
        {"learning_rate": {"offset": 20}},
        "live schedule, +20 steps from the saved position",
    ),
    (
        DEEPSPEED,
        {"pinned/scheduler": "CosineLR"},
        "learning rate",
        "scheduler: saved with 'WarmupLR', live 'CosineLR'",
        {"learning_rate": "override"},
        SCHEDULE,
    ),
    (
        DEEPSPEED,
        {"groups/0/initial_lr": 0.1},
        "learning rate",
        "group 0: initial_lr was 0.003 as constructed, now 0.1",
        {"learning_rate": "override"},
        SCHEDULE,
    ),
    (
        MEGATRON,
        {"pinned/optimizer config/min_lr": 0.1},
        "learning rate",
        "optimizer config.min_lr: saved with 0.0, live 0.1",
        {"learning_rate": "override"},
        SCHEDULE,
    ),
    (
        MEGATRON,
        {"pinned/schedule/lr_decay_steps": 10},
        "learning rate",
        "schedule.lr_decay_steps: saved with 1000, live 10",
        {"learning_rate": "override"},
        SCHEDULE,
    ),
    (
        MEGATRON,
        {"pinned/schedule/start_wd": 0.0},
        "hyperparameters",
        "schedule.start_wd: saved with 0.1, live 0.0",
        {"hyperparameters": "live"},
        LIVE,
    ),
    (
        MEGATRON,
        {"pinned/optimizer config/clip_grad": 0.5},
        "hyperparameters",
        "optimizer config.clip_grad: saved with 1.0, live 0.5",
        {"hyperparameters": "live"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/gradient_clipping": ABSENT},
        "hyperparameters",
        "deepspeed.gradient_clipping: saved with 1.0, live (absent)",
        {"hyperparameters": "live"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/optimizer/params/betas": [0.9, 0.99]},
        "hyperparameters",
        "deepspeed.optimizer.params.betas[1]: saved with 0.95, live 0.99",
        {"hyperparameters": "live"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"groups/0/weight_decay": 0.2},
        "hyperparameters",
        "group 0: weight_decay was 0.1 as constructed, now 0.2",
        {"hyperparameters": "live"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"groups/0/amsgrad": True},
        "optimizer state",
        "group 0: amsgrad was False as constructed, now True",
        {"optimizer_state": "reset"},
        ZERO,
    ),
    (
        DEEPSPEED,
        {"pinned/optimizer": "SGD"},
        "optimizer state",
        "optimizer: saved with 'AdamW', live 'SGD'",
        {"optimizer_state": "reset"},
        ZERO,
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/optimizer/type": "Lamb"},
        "optimizer state",
        "deepspeed.optimizer.type: saved with 'AdamW', live 'Lamb'",
        {"optimizer_state": "reset"},
        ZERO,
    ),
    (
        DEEPSPEED,
        {"data/fingerprint/content": "77aa"},
        "data",
        "fingerprint.content: saved with '9ebea803', live '77aa'",
        {"data": "keep_position"},
        "live data, at the saved sample position",
    ),
    (
        DEEPSPEED,
        {"data/fingerprint/sequence_length": 16},
        "data",
        "fingerprint.sequence_length: saved with 32, live 16",
        {"data": "restart"},
        "live data, from sample 0",
    ),
    (
        DEEPSPEED,
        {"pinned/deepspeed/bf16/enabled": False},
        "dtype",
        "deepspeed.bf16.enabled: saved with True, live False",
        {"dtype": "cast"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"pinned/model/torch_dtype": "float16"},
        "dtype",
        "model.torch_dtype: saved with 'float32', live 'float16'",
        {"dtype": "cast"},
        LIVE,
    ),
    (
        MEGATRON,
        {"pinned/model/params_dtype": "float16"},
        "dtype",
        "model.params_dtype: saved with 'bfloat16', live 'float16'",
        {"dtype": "cast"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"pinned/model/resid_pdrop": 0.2},
        "configuration",
        "model.resid_pdrop: saved with 0.1, live 0.2",
        {"configuration": "warn"},
        LIVE,
    ),
    (
        MEGATRON,
        {"pinned/model/hidden_dropout": 0.2},
        "configuration",
        "model.hidden_dropout: saved with 0.1, live 0.2",
        {"configuration": "warn"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"pinned/config/seed": 8},
        "configuration",
        "config.seed: saved with 7, live 8",
        {"configuration": "warn"},
        LIVE,
    ),
    (
        DEEPSPEED,
        {"versions/torch": "2.11.0"},
        "versions",
        "torch: saved with 2.13.0, live 2.11.0",
        {"versions": "warn"},
        "the live version is used",
    ),
    (
        DEEPSPEED,
        {"versions/cuda": "13.0"},
        "versions",
        "cuda: (absent) → 13.0",
        {"versions": "any"},
        "the live version is used",
    ),
]


@pytest.mark.parametrize(("facts", "changes", "part", "refusal", "policy", "action"), SINGLE, ids=lambda v: str(v)[:40])
def test_a_difference_is_refused_naming_the_field_and_allowed_by_it(
    facts: RunFacts, changes: dict[str, Any], part: str, refusal: str, policy: dict[str, Any], action: str
) -> None:
    live = but(facts, changes)
    refused = judge(facts, live, STRICT)
    assert not refused.changes and len(refused.refusals) == 1
    assert refusal in texts(refused)
    ((field, _),) = policy.items()
    assert f"`{field}: " in refused.refusals[0].remedy
    allowed = judge(facts, live, Policy.from_mapping(policy))
    assert not allowed.refusals
    change = next(change for change in allowed.changes if change.part == part and change.action == action)
    assert change.before != change.after and change.path


@pytest.mark.parametrize(("facts", "changes", "part", "refusal", "policy", "action"), SINGLE, ids=lambda v: str(v)[:40])
def test_no_other_field_allows_it(
    facts: RunFacts, changes: dict[str, Any], part: str, refusal: str, policy: dict[str, Any], action: str
) -> None:
    loosest = {
        "topology": "reshard",
        "global_batch": "change",
        "learning_rate": "override",
        "hyperparameters": "live",
        "optimizer_state": "reset",
        "rng": "derive",
        "data": "restart",
        "dtype": "cast",
        "configuration": "warn",
        "versions": "any",
    }
    others = {field: value for field, value in loosest.items() if field not in policy}
    assert refusal in texts(judge(facts, but(facts, changes), Policy.from_mapping(others)))


# -- topology


def test_another_world_size_needs_a_new_layout_and_streams() -> None:
    live = but(DEEPSPEED, {"topology/world_size": 1})
    refused = judge(DEEPSPEED, live, STRICT)
    assert "world_size: saved with 2, live 1" in texts(refused)
    assert "start the job on 2 ranks, or allow it with the policy `topology: reshard`" in texts(refused)
    assert "`rng: derive`" in texts(refused)
    assert {problem.check for problem in refused.refusals} == {"topology"}
    without_streams = judge(DEEPSPEED, live, Policy(topology="reshard"))
    assert "no RNG record" in texts(without_streams) and len(without_streams.refusals) == 1
    assert "`rng: derive`" in without_streams.refusals[0].remedy
    allowed = judge(DEEPSPEED, live, Policy.preset("flexible"))
    assert not allowed.refusals
    assert {change.part for change in allowed.changes} == {"topology", "rng"}


@pytest.mark.parametrize(
    ("key", "value", "moved"),
    [
        ("world_size", 4, True),
        ("tensor_parallel", 1, True),
        ("pipeline_parallel", 1, True),
        ("expert_parallel", 2, True),
        ("data_parallel", 4, True),
        ("virtual_pipeline", 2, False),
        ("sequence_parallel", True, False),
        ("distributed_optimizer", False, False),
    ],
)
def test_ranks_move_with_the_sizes_of_the_grid(key: str, value: Any, moved: bool) -> None:
    live = but(MEGATRON, {f"topology/{key}": value})
    assert ranks_move(MEGATRON.topology, live.topology) is moved
    assert bool(judge(MEGATRON, live, Policy(topology="reshard")).refusals) is moved


FACTORS = {
    "pinned/deepspeed/train_micro_batch_size_per_gpu": 4,
    "pinned/deepspeed/gradient_accumulation_steps": 1,
    "pinned/config/micro_batch_size": 4,
    "pinned/config/gradient_accumulation_steps": 1,
}


def test_the_factors_of_an_equal_global_batch_are_topology() -> None:
    live = but(DEEPSPEED, FACTORS)
    assert texts(judge(DEEPSPEED, live, STRICT)).count("`topology: reshard`") == 4
    allowed = judge(DEEPSPEED, live, Policy(topology="reshard"))
    assert not allowed.refusals and len(allowed.changes_of("topology")) == 4


def test_the_factors_of_another_global_batch_go_with_it() -> None:
    live = but(DEEPSPEED, {**FACTORS, "data/global_batch_size": 16})
    assert texts(judge(DEEPSPEED, live, Policy.preset("flexible"))).count("`global_batch: change`") == 5
    allowed = judge(DEEPSPEED, live, Policy(global_batch="change"))
    assert not allowed.refusals and len(allowed.changes_of("global batch")) == 5


def test_another_engine_is_always_refused_and_does_not_bury_the_rest() -> None:
    loose = Policy.from_mapping({"preset": "flexible", "configuration": "warn", "dtype": "cast"})
    live = but(MEGATRON, {"data/fingerprint/content": "77aa", "topology/world_size": 2})
    refused = judge(DEEPSPEED, live, loose)
    assert [problem.where for problem in refused.refusals] == ["engine", "fingerprint.content"]
    assert "engine: saved with deepspeed, live megatron" in texts(refused)
    assert "`" not in refused.refusals[0].remedy


# -- learning rate, optimizer state, data: what is done although nothing differs


@pytest.mark.parametrize(
    ("policy", "after", "action"),
    [
        (
            {"learning_rate": {"offset": -5}},
            "shifted by -5 steps",
            "saved schedule, -5 steps from the saved position",
        ),
        ({"learning_rate": {"rewarm": 10}}, "rewarmed over 10 steps", "the LR rises from 0 to the saved schedule"),
        ({"optimizer_state": "reset"}, "zero", ZERO),
    ],
)
def test_what_the_policy_asks_for_is_a_change_in_itself(policy: dict[str, Any], after: str, action: str) -> None:
    judgement = judge(DEEPSPEED, DEEPSPEED, Policy.from_mapping(policy))
    assert [(change.before, change.after, change.action) for change in judgement.changes] == [
        ("as saved", after, action)
    ]
    assert not judgement.refusals and not judgement.warnings


def test_rewarming_keeps_the_saved_schedule_so_another_one_is_refused() -> None:
    live = but(DEEPSPEED, {"pinned/deepspeed/optimizer/params/lr": 0.001})
    refused = judge(DEEPSPEED, live, Policy.from_mapping({"learning_rate": {"rewarm": 10}}))
    assert "`learning_rate: override`" in refused.refusals[0].remedy


def test_data_that_is_the_same_does_not_start_again() -> None:
    assert judge(DEEPSPEED, DEEPSPEED, Policy(data="restart")) == Judgement((), (), ())


@pytest.mark.parametrize("key", ["seed", "num_samples"])
def test_a_kept_position_in_another_order_is_allowed_with_a_caution(key: str) -> None:
    live = but(DEEPSPEED, {f"data/fingerprint/{key}": 8})
    assert "may come twice" in str(judge(DEEPSPEED, live, Policy(data="keep_position")).warnings[0])
    assert not judge(DEEPSPEED, live, Policy(data="restart")).warnings


@pytest.mark.parametrize(
    ("policy", "warned"),
    [({"versions": "warn"}, True), ({"versions": "any"}, False), ({"configuration": "warn"}, True)],
)
def test_warn_warns_and_any_does_not(policy: dict[str, str], warned: bool) -> None:
    path = "versions/torch" if "versions" in policy else "pinned/config/seed"
    judgement = judge(DEEPSPEED, but(DEEPSPEED, {path: "other"}), Policy.from_mapping(policy))
    assert len(judgement.changes) == 1 and bool(judgement.warnings) is warned


# -- the model


def everything_allowed() -> Policy:
    given = {"preset": "flexible", "global_batch": "change", "learning_rate": "override", "hyperparameters": "live"}
    more = {"optimizer_state": "reset", "data": "restart", "dtype": "cast", "configuration": "warn", "versions": "any"}
    return Policy.from_mapping(given | more)


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        (without_tensors(DEEPSPEED, ("param", "h.0.bias"), ("master", "h.0.bias")), "missing in the live model"),
        (with_tensors(DEEPSPEED, ("param", "h.1.bias", "bfloat16", (2,))), "additional in the live model"),
        (without_tensors(DEEPSPEED, ("buffer", "seen")), "buffer/seen: in the checkpoint, missing"),
        (
            with_tensors(DEEPSPEED, ("buffer", "running", "float32", (4,))),
            "buffer/running: saved as float32[3], live float32[4]",
        ),
        (
            with_tensors(DEEPSPEED, ("buffer", "seen", "float32", ())),
            "buffer/seen: saved as int64[], live float32[]",
        ),
        (
            with_tensors(DEEPSPEED, ("param", "h.0.bias", "float16", (8,))),
            "param/h.0.bias: saved as bfloat16[16], live float16[8]",
        ),
        (with_tensors(DEEPSPEED, ("master", "h.0.bias", "bfloat16", (16,))), "keep the dtype of the masters"),
        (with_tensors(DEEPSPEED, ("param", FROZEN, "float16", (64, 16))), "no master to be cast from"),
        (without_tensors(DEEPSPEED, ("master", "h.0.bias")), "master/h.0.bias: in the checkpoint, missing in the live"),
        (without_tensors(DEEPSPEED, ("master", "h.0.bias")), "it is frozen now"),
        (with_tensors(DEEPSPEED, ("master", FROZEN, "float32", (64, 16))), "it was frozen at the save"),
        (replace(DEEPSPEED, aliases={}), "lm_head.weight: tied to wte.weight in the checkpoint, to (absent) live"),
        (replace(DEEPSPEED, groups=DEEPSPEED.groups * 2), "optimizer: 1 parameter groups were saved, 2 are live"),
        (but(DEEPSPEED, {"groups/0/members": ["wte.weight"]}), "members differ: ['h.0.bias', 'h.0.weight']"),
        (but(DEEPSPEED, {"groups/0/members": sorted(WEIGHTS)}), "members differ: another order"),
        (but(MEGATRON, {"pinned/geometry/vocabulary": 512}), "geometry.vocabulary: saved with 256, live 512"),
    ],
)
def test_another_model_is_refused_whatever_the_policy(live: RunFacts, expected: str) -> None:
    saved = MEGATRON if live.topology["engine"] == "megatron" else DEEPSPEED
    for policy in (STRICT, everything_allowed()):
        judgement = judge(saved, live, policy)
        assert expected in texts(judgement)
        assert not any("policy" in problem.remedy for problem in judgement.refusals)


def test_the_order_of_members_counts_in_the_same_topology_only() -> None:
    live = but(DEEPSPEED, {"groups/0/members": sorted(WEIGHTS), "topology/zero_stage": 1})
    assert not judge(DEEPSPEED, live, Policy.preset("flexible")).refusals


def test_low_precision_weights_are_cast_where_allowed() -> None:
    changed = [("param", name, "float16", shape) for name, shape in WEIGHTS.items()]
    live = with_tensors(DEEPSPEED, *changed)
    refused = judge(DEEPSPEED, live, STRICT)
    assert "param/h.0.bias: saved as bfloat16[16], live float16[16]" in texts(refused)
    assert all("`dtype: cast`" in problem.remedy for problem in refused.refusals)
    allowed = judge(DEEPSPEED, live, Policy(dtype="cast"))
    assert not allowed.refusals
    actions = {change.path: change.action for change in allowed.changes}
    assert actions == {f"param/{name}": "cast from the same master" for name in WEIGHTS}


def test_buffers_are_never_cast() -> None:
    live = with_tensors(DEEPSPEED, ("buffer", "running", "bfloat16", (3,)))
    (refusal,) = judge(DEEPSPEED, live, Policy(dtype="cast")).refusals
    assert refusal.where == "buffer/running" and "no master to be cast from" in refusal.remedy


# -- everything together


def test_all_differences_are_listed_at_once() -> None:
    live = DEEPSPEED
    for facts, changes, *_ in SINGLE:
        if facts is DEEPSPEED and "pinned/deepspeed/gradient_clipping" not in changes:
            live = but(live, changes)
    live = with_tensors(but(live, {"topology/world_size": 3}), ("param", "new", "bfloat16", (2,)))
    refused = judge(DEEPSPEED, live, STRICT)
    for text in ("world_size", "zero_stage", "sub_group_size", "global_batch_size", "params.lr", "warmup_num_steps"):
        assert text in texts(refused)
    for text in ("initial_lr", "betas[1]", "weight_decay", "amsgrad", "optimizer.type", "content", "bf16.enabled"):
        assert text in texts(refused)
    for text in ("resid_pdrop", "config.seed", "torch: saved", "cuda", "param/new"):
        assert text in texts(refused)
    allowed = judge(DEEPSPEED, live, everything_allowed())
    assert [problem.where for problem in allowed.refusals] == ["param/new"]
    assert {problem.where for problem in refused.refusals} - {"param/new"} <= {
        change.path.split(".")[0] if change.path.startswith("group ") else change.path for change in allowed.changes
    }


def test_a_section_that_only_one_side_has_is_judged_leaf_by_leaf() -> None:
    live = but(DEEPSPEED, {"pinned/deepspeed/optimizer": ABSENT})
    where = {problem.where for problem in judge(DEEPSPEED, live, Policy(learning_rate="override")).refusals}
    assert where == {f"deepspeed.optimizer.{leaf}" for leaf in ("type", "params.weight_decay", "params.betas")}


VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text("ab.", max_size=3)
SETTINGS = st.dictionaries(
    st.sampled_from(["deepspeed", "model", "optimizer", "lr", "a", "bf16"]),
    st.recursive(VALUES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", min_size=1), inner)),
    max_size=4,
)


@given(pinned=SETTINGS, group=SETTINGS, versions=st.dictionaries(st.text("ab"), st.text("12.")))
@settings(max_examples=60, deadline=None)
def test_a_run_may_always_resume_itself(pinned: Any, group: Any, versions: dict[str, str]) -> None:
    groups = ({"members": ["w"], **group},)
    saved = replace(DEEPSPEED, pinned=pinned, groups=groups, versions=versions)
    again = replace(
        saved,
        pinned=canonical.decode(json.loads(canonical.dumps(canonical.encode(pinned)))),
        groups=canonical.decode(json.loads(canonical.dumps(canonical.encode(list(groups))))),
    )
    for policy in (STRICT, Policy.preset("flexible")):
        assert judge(saved, again, policy) == Judgement((), (), ())


@given(saved=SETTINGS, live=SETTINGS)
@settings(max_examples=60, deadline=None)
def test_every_difference_is_either_changed_or_refused(saved: Any, live: Any) -> None:
    runs = replace(DEEPSPEED, pinned=saved), replace(DEEPSPEED, pinned=live)
    total = len(judge(*runs, STRICT).refusals)
    for said in ({"dtype": "cast"}, {"configuration": "warn"}, {"learning_rate": "override"}, {"topology": "reshard"}):
        found = judge(*runs, Policy.from_mapping(said))
        assert len(found.changes) + len(found.refusals) == total


# -- facts of a real manifest, tables, JSON


def test_the_facts_of_a_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(commit(tmp_path, 3))
    copies = [TensorSpec(TensorKey("buffer", f"seen@rank{rank}"), "int64", ()) for rank in (0, 1)]
    moment = TensorSpec(TensorKey("param", "odd@rank1"), "bfloat16", (2,))
    added = tuple(TensorEntry(spec, "0" * 16, True, None) for spec in (*copies, moment))
    facts = RunFacts.of_manifest(replace(manifest, tensors=manifest.tensors + added))
    assert {str(key) for key in facts.tensors} == {
        *(f"{kind}/layers.0.{name}" for kind in ("param", "master") for name in ("weight", "bias")),
        "buffer/norm.running_mean",
        "buffer/seen",
        "param/odd@rank1",
    }
    assert all(key == spec.key for key, spec in facts.tensors.items())
    assert facts.topology == {"engine": "deepspeed", "zero_stage": 3, "world_size": 2}
    assert set(facts.pinned) == {"config", "model", "optimizer"} and set(facts.data) == {
        "fingerprint",
        "global_batch_size",
    }
    assert facts.groups[0]["betas"] == (0.9, 0.95) and facts.aliases == {"head.weight": "layers.0.weight"}
    assert judge(facts, RunFacts.of_manifest(replace(manifest, tensors=manifest.tensors + added)), STRICT) == Judgement(
        (), (), ()
    )


def test_the_table_is_aligned_and_counts_what_is_alike() -> None:
    changes = [
        Change("topology", "world_size", 8, 6, "every rank reads its own part of the new layout"),
        Change("learning rate", "deepspeed.optimizer.params.lr", 0.003, 0.001, SCHEDULE),
        *(Change("dtype", f"param/{n}", "bfloat16", "float16", "cast from the same master") for n in range(9)),
    ]
    lines = changes_table(changes).splitlines()
    assert lines[0].split() == ["what", "before", "after", "what", "is", "done"]
    assert len(lines) == 4 and "param/0 (and 8 alike)" in lines[3]
    column = lines[0].index("before")
    assert [line[column:].split()[0] for line in lines[1:]] == ["8", "0.003", "bfloat16"]
    assert changes_table(()) == ""


def test_a_change_goes_through_json() -> None:
    change = Change("hyperparameters", "group 0.betas", (0.9, 0.95), float("inf"), LIVE)
    document = json.loads(json.dumps(change.to_json(), allow_nan=False))
    assert document["path"] == "group 0.betas" and document["part"] == "hyperparameters"
    assert canonical.decode(document["before"]) == (0.9, 0.95) and canonical.decode(document["after"]) == float("inf")
    assert str(change) == f"group 0.betas: (0.9, 0.95) → inf; {LIVE}"
