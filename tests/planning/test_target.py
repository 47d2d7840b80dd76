"""Targets: read from a text, and every reason for which a model does not fit one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resume_kit.errors import UsageError
from resume_kit.planning.layouts.target import ModelSizes, Target, batch_problems, parse_target, target_problems
from resume_kit.planning.layouts.topology import MegatronTopology, ZeroTopology
from tests.planning.models import Gpt

MEGATRON = MegatronTopology(world_size=8, tensor_parallel=2, pipeline_parallel=2).to_engine()
DEEPSPEED = {"engine": "deepspeed", "zero_stage": 3, "world_size": 4}


def test_all_keys() -> None:
    text = "engine=megatron,world=16,tp=4,pp=2,vpp=2,ep=2,etp=1,distributed_optimizer=off,overlap=on,"
    text += "bucket_size=100,sequence_parallel=on,micro_batch=3,accumulation=5"
    assert parse_target(text, DEEPSPEED) == Target(
        MegatronTopology(
            world_size=16,
            tensor_parallel=4,
            pipeline_parallel=2,
            virtual_pipeline=2,
            expert_parallel=2,
            expert_tensor_parallel=1,
            distributed_optimizer=False,
            overlap=True,
            bucket_size=100,
            sequence_parallel=True,
        ),
        3,
        5,
    )
    assert parse_target(" engine = deepspeed , stage=2, world=6", MEGATRON) == Target(
        ZeroTopology(stage=2, world_size=6)
    )


def test_what_is_not_said_stays_as_it_was() -> None:
    assert parse_target("world=6", DEEPSPEED).topology == ZeroTopology(stage=3, world_size=6)
    found = parse_target("tp=4", MEGATRON).topology
    assert found == MegatronTopology(world_size=8, tensor_parallel=4, pipeline_parallel=2)
    assert found.to_engine()["expert_tensor_parallel"] == 4  # it follows tp, as it did
    own = {**MEGATRON, "expert_tensor_parallel": 1, "expert_parallel": 2}
    assert parse_target("tp=4", own).topology.to_engine()["expert_tensor_parallel"] == 1
    assert parse_target("engine=megatron,tp=2", DEEPSPEED).topology == MegatronTopology(world_size=4, tensor_parallel=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wrld=6", "deepspeed has no 'wrld'; did you mean 'world'?"),
        ("tp=2", "deepspeed has no 'tp'"),
        ("engine=megatron,stage=2", "megatron has no 'stage'"),
        ("engine=deepsped", "did you mean 'deepspeed'?"),
        ("world=0", "world is '0'; give a whole number of 1 or more"),
        ("world=-1", "world is '-1'"),
        ("world=²", "world is '²'"),
        ("world", "'world' is not KEY=VALUE"),
        ("world=", "'world=' is not KEY=VALUE"),
        ("", "'' is not KEY=VALUE"),
        ("world=2,world=3", "world is said twice"),
        ("engine=megatron,overlap=yes", "overlap is 'yes'; say on or off"),
    ],
)
def test_a_text_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text, DEEPSPEED)
    assert said in str(caught.value)


@pytest.mark.parametrize("engine", [{}, {"engine": "fsdp"}, {"engine": {"a": 1}}])
def test_a_saved_engine_that_is_none(engine: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the saved topology has engine") as caught:
        parse_target("world=2", engine)
    assert not isinstance(caught.value, UsageError)


def test_all_that_is_wrong_with_a_text_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_target("engine=megatron,tpp=2,pp=x,overlap=1", DEEPSPEED)
    assert len(caught.value.problems) == 3


SIZES = ModelSizes.of_geometry(Gpt(layers=4, hidden=16, ffn=24, heads=4, groups=2, vocabulary=48).geometry)
MIXTURE = ModelSizes.of_geometry(Gpt(layers=4, hidden=16, ffn=24, heads=4, groups=4, experts=6).geometry)


def reasons(sizes: ModelSizes, **fields: object) -> list[str]:
    topology = MegatronTopology(**fields)  # type: ignore[arg-type]
    problems = target_problems(sizes, topology)
    assert all(problem.check == "target" and problem.remedy for problem in problems)
    return [problem.what for problem in problems]


def test_a_fitting_target_has_no_problem() -> None:
    assert reasons(SIZES, world_size=16, tensor_parallel=4, pipeline_parallel=2, virtual_pipeline=2) == []
    assert (
        reasons(
            MIXTURE,
            world_size=6,
            tensor_parallel=2,
            expert_parallel=3,
            expert_tensor_parallel=2,
            sequence_parallel=True,
        )
        == []
    )
    assert target_problems(None, ZeroTopology(stage=3, world_size=5)) == []


@pytest.mark.parametrize(
    ("sizes", "fields", "said"),
    [
        (SIZES, {"world_size": 8, "tensor_parallel": 8}, ["4 attention heads do not divide by tp 8"]),
        (replace(SIZES, query_groups=3), {"world_size": 2, "tensor_parallel": 2}, ["3 query groups neither"]),
        (SIZES, {"world_size": 3, "pipeline_parallel": 3}, ["4 layers do not divide by pp 3"]),
        (
            SIZES,
            {"world_size": 2, "pipeline_parallel": 2, "virtual_pipeline": 3},
            ["4 layers do not divide by pp 2 × vpp 3 = 6"],
        ),
        (SIZES, {"world_size": 1, "virtual_pipeline": 2}, ["vpp 2 interleaves"]),
        (SIZES, {"world_size": 6, "tensor_parallel": 4}, ["tp 4 × pp 1 = 4 does not divide the world of 6"]),
        (SIZES, {"world_size": 2, "expert_parallel": 2}, ["the model has none"]),
        (SIZES, {"world_size": 2, "sequence_parallel": True}, ["sequence parallelism splits"]),
        (SIZES, {"world_size": 2, "tensor_parallel": 0}, ["at least 1"]),
        (
            replace(SIZES, vocabulary=50),
            {"world_size": 4, "tensor_parallel": 4},
            ["padded to 50 rows", "a padding to at least 52"],
        ),
        (replace(SIZES, split={"ffn": 22}), {"world_size": 4, "tensor_parallel": 4}, ["ffn, 22, does not divide"]),
        (MIXTURE, {"world_size": 4, "expert_parallel": 4}, ["6 experts do not divide by ep 4"]),
        (
            MIXTURE,
            {"world_size": 4, "expert_parallel": 3},
            ["etp 1 × ep 3 × pp 1 = 3 does not divide the world of 4"],
        ),
        (MIXTURE, {"world_size": 2, "tensor_parallel": 2}, ["experts with tp 2 need sequence parallelism"]),
        (
            MIXTURE,
            {"world_size": 2, "tensor_parallel": 2, "expert_tensor_parallel": 1, "sequence_parallel": True},
            ["etp 1 with tp 2 and ep 1"],
        ),
        (
            replace(MIXTURE, expert_split={"expert ffn": 7}),
            {"world_size": 4, "expert_parallel": 2, "expert_tensor_parallel": 2},
            ["expert ffn, 7, does not divide by etp 2"],
        ),
    ],
)
def test_every_reason(sizes: ModelSizes, fields: dict[str, object], said: list[str]) -> None:
    found = reasons(sizes, **fields)
    for words in said:
        assert any(words in what for what in found), found


def test_a_world_beyond_all_measure_is_refused() -> None:
    assert reasons(SIZES, world_size=10**12) == ["1,000,000,000,000 ranks are more than 65,536"]
    assert len(target_problems(None, ZeroTopology(world_size=65537))) == 1


def test_several_reasons_are_given_together() -> None:
    found = reasons(SIZES, world_size=9, tensor_parallel=5, pipeline_parallel=3)
    assert len(found) >= 5


def test_zero_has_three_stages() -> None:
    assert [p.where for p in target_problems(None, ZeroTopology(stage=4, world_size=2))] == ["ZeRO stage 4"]
    assert [p.where for p in target_problems(None, ZeroTopology(stage=1, world_size=0))] == ["world"]


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "said"),
    [
        (None, None, None),
        (2, None, None),
        (2, 2, None),
        (2, 3, "micro_batch 2 × accumulation 3 × 4 data parallel ranks make a global batch of 24; it was 16"),
        (None, 3, "the global batch of 16 does not divide by accumulation 3 × 4 data parallel ranks"),
    ],
)
def test_the_global_batch(micro_batch: int | None, accumulation: int | None, said: str | None) -> None:
    target = Target(MegatronTopology(world_size=8, tensor_parallel=2), micro_batch, accumulation)
    assert [problem.what for problem in batch_problems(target, 16)] == ([said] if said else [])
