from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import canonical
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology
from tests.checkpoints import commit, resign
from tests.cli.conftest import Cli
from tests.cli.test_cli_bad_input import OTHER_TYPES, places
from tests.planning import megatron_checkpoint
from tests.planning.models import Gpt

MIXTURE = Gpt(layers=4, hidden=16, ffn=24, heads=4, groups=2, experts=4)


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """A checkpoint of a mixture of experts on TP2×PP2×DP2."""
    topology = MegatronTopology(world_size=8, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)
    return megatron_checkpoint.commit(tmp_path / "megatron", MIXTURE.geometry, topology)


def test_it_may_resume(cli: Cli, checkpoint: Path) -> None:
    result = cli("plan", checkpoint, "--target", "world=4", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert document["ok"] and document["problems"] == [] and document["policy"] == "flexible"
    assert document["target"] == {"engine": "deepspeed", "zero_stage": 3, "world_size": 4}
    change = document["changes"][0]
    assert (change["path"], change["before"], change["after"]) == ("world_size", 2, 4)
    reads = document["reads"]
    assert reads["bytes"] == 55 * 4 * 3 + 4 * 16  # masters and moments once, the buffer on every rank
    assert sum(row["bytes"] for row in reads["ranks"]) == reads["bytes"]
    assert reads["ranks"][3]["from_ranks"] == "0-1"  # of rank 0 the buffer
    assert reads["summary"]["bytes"]["max"] == max(row["bytes"] for row in reads["ranks"])
    assert all(row["peak_host_bytes"] > row["bytes"] for row in reads["ranks"])


def test_text(cli: Cli, checkpoint: Path) -> None:
    result = cli("plan", checkpoint, "--target", "stage=1,world=8")
    assert result.code == 0
    for words in (
        "may resume there",
        "flexible, the default",
        "deepspeed, zero_stage 1, 8 ranks",
        "8 samples, over 8 data parallel ranks",
        "what would change",
        "every rank reads its own part",
        "median",
    ):
        assert words in result.out
    assert "more; all are in --json" not in result.out


def test_many_ranks_are_summed_up(cli: Cli, tmp_path: Path) -> None:
    path = commit(tmp_path / "run", 10, weights={"w": (64, 4)})
    resign(path / "manifest.json", lambda document: document["data"].update(global_batch_size=16))
    result = cli("plan", path, "--target", "world=16")
    assert result.code == 0
    assert "8 more; all are in --json" in result.out
    lines = [line.split()[0] for line in result.out.partition("reads")[2].splitlines() if line.strip()]
    assert lines[-4:] == ["…", "min", "median", "max"]


def test_strict_refuses_and_lists_all(cli: Cli, checkpoint: Path) -> None:
    result = cli("plan", checkpoint, "--target", "stage=2,world=4", "--policy", "strict", "--json")
    assert result.code == 1
    assert {problem["where"] for problem in result.json["problems"]} == {"zero_stage", "world_size", "rng"}
    assert result.json["reads"] is not None  # the figures are known all the same
    text = cli("plan", checkpoint, "--target", "world=4", "--policy", "strict").out
    assert "may not resume there: 2 reasons" in text and "policy `topology: reshard`" in text
    assert cli("plan", checkpoint, "--target", "world=2", "--policy", "strict").code == 0


def test_a_policy_from_a_file(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("preset: flexible\nglobal_batch: change\n")
    target = ("--target", "world=3,micro_batch=2,accumulation=2")
    assert cli("plan", checkpoint, *target).code == 1
    result = cli("plan", checkpoint, *target, "--policy", policy, "--json")
    assert result.code == 0
    assert {change["path"] for change in result.json["changes"]} >= {"world_size", "global_batch_size"}
    assert cli("plan", checkpoint, "--target", "world=3", "--policy", policy).code == 0
    policy.write_text("topologie: equal\n")
    result = cli("plan", checkpoint, *target, "--policy", policy)
    assert result.code == 2 and "did you mean 'topology'?" in result.err
    assert cli("plan", checkpoint, *target, "--policy", tmp_path / "none.yaml").code == 2


def test_a_global_batch_that_does_not_divide(cli: Cli, checkpoint: Path) -> None:
    result = cli("plan", checkpoint, "--target", "world=3")
    assert result.code == 1
    assert "the global batch of 8 does not divide by 3 data parallel ranks" in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "wrld=3"], "did you mean 'world'?"),
        (["--target", ""], "is not KEY=VALUE"),
        ([], "--target"),
        (["--target", "world=2", "--policy", "lenient"], "cannot read the policy lenient"),
    ],
)
def test_wrong_usage(cli: Cli, checkpoint: Path, arguments: list[str], said: str) -> None:
    result = cli("plan", checkpoint, *arguments)
    assert result.code == 2 and said in result.err


def test_another_engine_is_refused(cli: Cli, checkpoint: Path, megatron: Path) -> None:
    for path, target in ((checkpoint, "engine=megatron,tp=2"), (megatron, "engine=deepspeed,stage=2")):
        result = cli("plan", path, "--target", target)
        assert result.code == 1
        assert "do not name and cut tensors alike" in result.out
    assert cli("plan", checkpoint, "--target", "engine=megatron", "--json").json["reads"] is None


def test_a_damaged_checkpoint_is_refused_with_all_that_is_wrong(cli: Cli, checkpoint: Path) -> None:
    (checkpoint / "rank-00001.index.json").unlink()
    result = cli("plan", checkpoint, "--target", "world=3", "--json")
    assert result.code == 1
    checks = [problem["check"] for problem in result.json["problems"]]
    assert "integrity" in checks and "target" in checks
    assert result.json["reads"] is None
    (checkpoint / "manifest.json").unlink()
    assert cli("plan", checkpoint, "--target", "world=3").code == 1


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {}},
        {"engine": {"engine": "deepspeed", "zero_stage": 3}},
        {"engine": {"engine": "megatron"}},
        {"pinned": {}},
        {"pinned": {"groups": [{}], "versions": {}}},
        {"data": {"global_batch_size": "many"}},
    ],
)
def test_a_signed_manifest_with_strange_fields(cli: Cli, checkpoint: Path, change: dict[str, Any]) -> None:
    resign(checkpoint / "manifest.json", lambda document: document.update(change))
    assert cli("plan", checkpoint, "--target", "world=4").code in (0, 1)


# -- Megatron


def test_megatron_elsewhere(cli: Cli, megatron: Path) -> None:
    target = "world=4,tp=1,pp=2,vpp=2,ep=2,sequence_parallel=off,distributed_optimizer=off"
    result = cli("plan", megatron, "--target", target, "--json")
    assert result.code == 0, result.out
    document = result.json
    topology = MegatronTopology(
        world_size=4, pipeline_parallel=2, virtual_pipeline=2, expert_parallel=2, distributed_optimizer=False
    )
    assert document["target"] == topology.to_engine()
    layout = megatron_layout(MIXTURE.geometry, topology)
    for rank, row in enumerate(document["reads"]["ranks"]):
        held = sum(piece.box.numel for piece in layout.held(rank)) * 2 * 4
        router_bias = 4 * 4 if rank >= 2 else 0  # layer 1, in chunks of one layer, is the second stage's
        assert row["bytes"] == held + router_bias


def test_what_would_change_is_said_in_one_row(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    before = MegatronTopology(world_size=8, tensor_parallel=2, pipeline_parallel=2)
    megatron = megatron_checkpoint.commit(
        tmp_path / "megatron", replace(MIXTURE, experts=0).geometry, before, parallel=before.to_settings()
    )
    target = ("--target", "world=4,tp=1,distributed_optimizer=off")
    text = cli("plan", megatron, *target).out.partition("what would change")[2].partition("\nreads\n")[0]
    (row,) = (line.split("  ") for line in text.splitlines() if line.startswith("topology"))
    assert [part.strip() for part in row if part][:3] == [
        "topology",
        "megatron, TP2 PP2 DP2 ETP2, 8 ranks",
        "megatron, TP1 PP2 DP2, 4 ranks",
    ]
    assert [line.split()[0] for line in text.strip().splitlines()[2:]] == ["topology", "distributed_optimizer", "rng"]
    changes = cli("plan", megatron, *target, "--json").json["changes"]
    assert {"world_size", "tensor_parallel", "parallel.tensor_model_parallel_size"} <= {c["path"] for c in changes}
    text = cli("plan", checkpoint, "--target", "stage=1,world=4").out
    assert "deepspeed, zero_stage 3, 2 ranks" in text.partition("what would change")[2]


def test_overlap_is_judged_and_stays_as_it_was(cli: Cli, tmp_path: Path) -> None:
    """As the job itself would: the engine pins it, its topology does not say it."""
    topology = MegatronTopology(world_size=4, overlap=True, bucket_size=500)
    pinned = {"parallel": topology.to_settings()}
    path = megatron_checkpoint.commit(tmp_path / "run", MIXTURE.geometry, topology, **pinned)
    same = cli("plan", path, "--target", "world=4", "--policy", "strict", "--json")
    assert same.code == 0 and same.json["changes"] == []
    assert [row["bytes"] for row in same.json["reads"]["ranks"]] == [
        row["bytes"]
        for row in cli("plan", path, "--target", "world=4,overlap=on,bucket_size=500", "--json").json["reads"]["ranks"]
    ]
    off = cli("plan", path, "--target", "world=4,overlap=off", "--policy", "strict", "--json")
    assert off.code == 1
    assert {p["where"] for p in off.json["problems"]} == {"parallel.overlap_grad_reduce", "parallel.bucket_size"}
    assert off.json["reads"]["ranks"] != same.json["reads"]["ranks"], "other buckets, other owners"


def test_a_bucket_size_that_nobody_chose_grows_with_the_ranks(cli: Cli, tmp_path: Path) -> None:
    topology = MegatronTopology(world_size=4, overlap=True)
    path = megatron_checkpoint.commit(tmp_path / "run", MIXTURE.geometry, topology, parallel=topology.to_settings())
    resign(path / "manifest.json", lambda document: document["data"].update(global_batch_size=64))
    changes = cli("plan", path, "--target", "world=64", "--json").json["changes"]
    sizes = {c["path"]: (c["before"], c["after"]) for c in changes}
    assert sizes["parallel.bucket_size"] == (40_000_000, 64_000_000)


def test_a_target_that_does_not_fit_is_refused_with_every_reason(cli: Cli, megatron: Path) -> None:
    result = cli("plan", megatron, "--target", "world=24,tp=8,pp=3,ep=3,sequence_parallel=off", "--json")
    assert result.code == 1
    said = "\n".join(problem["what"] for problem in result.json["problems"])
    for words in (
        "4 attention heads do not divide by tp 8",
        "4 layers do not divide by pp 3",
        "4 experts do not divide by ep 3",
        "experts with tp 8 need sequence parallelism",
    ):
        assert words in said
    assert result.json["reads"] is None


def test_a_checkpoint_without_its_geometry_is_refused(cli: Cli, megatron: Path) -> None:
    resign(megatron / "manifest.json", lambda document: document["pinned"].pop("geometry"))
    result = cli("plan", megatron, "--target", "world=4,pp=1")
    assert result.code == 1 and "no geometry table" in result.out


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.index.json"])
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_signed_documents_with_odd_values_anywhere(
    cli: Cli, checkpoint: Path, megatron: Path, name: str, engine: str
) -> None:
    directory, target = (checkpoint, "world=4") if engine == "deepspeed" else (megatron, "world=4,pp=1")
    rng = random.Random(11)
    paths = (directory / name, directory / "manifest.json")
    originals = {path: path.read_bytes() for path in paths}
    document = json.loads(originals[paths[0]])
    for place in rng.sample([p for p in places(document) if p and p[0] != "digest"], 60):
        odd = rng.choice([*OTHER_TYPES, {"$tuple": 3}, {"$items": [1]}])
        for path, content in originals.items():
            path.write_bytes(content)

        def change(inside: Any, place: tuple[Any, ...] = place, odd: Any = odd) -> None:
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = odd

        resign(paths[0], change)
        if name != "manifest.json":
            vouch_for(paths[0], 1)
        assert cli("plan", directory, "--target", target).code in (0, 1), (place, odd)


def vouch_for(index: Path, rank: int) -> None:
    """Let the manifest state the index as it is now, so that only its content can tell."""
    raw = index.read_bytes()
    stated = {"bytes": len(raw), "digest": canonical.digest(raw), "file": index.name}
    resign(index.parent / "manifest.json", lambda document: document["ranks"][rank].update(index=stated))


@pytest.mark.parametrize(
    "change",
    [
        {"holders": {"layers.0.weight": 5}},
        {"carried": [5]},
        {"carried": [{"engine": "megatron"}]},
        {"engine": {"engine": "megatron", "world_size": "eight"}},
        {"engine": {"engine": "megatron", "world_size": 8, "tensor_parallel": "two"}},
    ],
    ids=["holders", "carried", "carried without its size", "world size", "axis"],
)
def test_a_signed_manifest_that_says_odd_things_is_damaged(cli: Cli, megatron: Path, change: dict[str, Any]) -> None:
    resign(megatron / "manifest.json", lambda document: document.update(change))
    result = cli("plan", megatron, "--target", "world=4,tp=2")
    assert result.code == 1
    assert f"{next(iter(change))} is not what the format says" in result.out + result.err
    assert "Traceback" not in result.out + result.err


@pytest.mark.parametrize("lacking", ["tensor_parallel", "data_parallel", "expert_parallel", "pipeline_parallel"])
def test_a_signed_manifest_whose_engine_lacks_an_axis_gets_an_answer(cli: Cli, megatron: Path, lacking: str) -> None:
    resign(megatron / "manifest.json", lambda document: document["engine"].pop(lacking))
    result = cli("plan", megatron, "--target", "world=4,tp=2", "--json")
    assert result.code in (0, 1) and "changes" in result.json
