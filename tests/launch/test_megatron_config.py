"""A Megatron run's configuration: what ships loads, what cannot be meant is said, all of it at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launch.config import build, load_as
from launch.megatron_config import MegatronConfig, ModelConfig, ParallelConfig
from resume_kit.errors import UsageError
from tests.megatron_jobs import MegatronJob
from tests.ranks import ROOT

CONFIGS = sorted((ROOT / "configs").glob("megatron_*.yaml"))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    return path


def test_an_empty_file_gives_the_defaults(empty: Path) -> None:
    assert load_as(MegatronConfig, empty) == MegatronConfig()


def test_there_are_configurations_to_load() -> None:
    assert [path.name for path in CONFIGS] == ["megatron_1b.yaml", "megatron_tiny.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_configuration_that_ships_can_be_trained(path: Path, world_size: int) -> None:
    config = load_as(MegatronConfig, path, ["parallel.pipeline=2"] if world_size == 8 else [])
    topology = config.require_topology(world_size, config.model.padded_vocabulary(256))
    assert config.micro_batches(topology.data_parallel) >= 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch_size=0", "global_batch_size is 0; it must be at least 1"),
        ("parallel.tensor=0", "parallel.tensor is 0; it must be at least 1"),
        ("model.experts=-1", "model.experts is -1; it must be at least 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; give two numbers"),
        ("optimizer.betas=[a, b]", "optimizer.betas is ['a', 'b']; give two numbers"),
        ("optimizer.warmup_steps=1000", "optimizer.warmup_steps is 1000; it must be below decay_steps 1000"),
        ("optimizer.min_lr=1", "optimizer.min_lr is 1, above lr 0.003"),
        ("model.attention_heads=5", "model.hidden_size 64 is no multiple of attention_heads 5"),
        ("model.experts=4", "experts have no bias"),
        ("model={experts: 2, bias: false, experts_per_token: 3}", "experts_per_token is 3; there are 2 experts"),
        ("parallel={sequence: true, tensor: 3}", "cannot split data.sequence_length 128"),
        ("parallel.overlap_param_gather=true", "overlap_param_gather needs distributed_optimizer"),
        ("precision=fp16", "precision is 'fp16'; choose one of bf16, fp32"),
        ("optimizer.decay_style=WSD", "choose one of constant, linear, cosine, inverse-square-root"),
        ("model.position=rotary", "'model.position'; did you mean 'model.positions'?"),
        ("parallel.sequence=1", "parallel.sequence is 1; it must be bool"),
    ],
)
def test_what_cannot_be_meant_is_told(override: str, message: str, empty: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_as(MegatronConfig, empty, [override])


def test_all_that_cannot_be_meant_is_told_at_once(empty: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        load_as(MegatronConfig, empty, ["run.steps=0", "micro_batch_size=0", "parallel.pipeline=0", "model.experts=2"])
    assert len(refusal.value.problems) == 4


@pytest.mark.parametrize(
    ("given", "data", "padded"),
    [({}, 256, 256), ({}, 257, 384), ({"vocabulary": 32000}, 256, 32000), ({"vocabulary_multiple": 1}, 257, 257)],
)
def test_the_vocabulary_is_padded_alike_for_every_layout(given: dict[str, Any], data: int, padded: int) -> None:
    assert ModelConfig(**given).padded_vocabulary(data) == padded


@pytest.mark.parametrize(
    ("parallel", "batch", "data_parallel", "count"),
    [({}, 8, 1, 4), ({}, 8, 4, 1), ({"pipeline": 2, "virtual_pipeline": 2}, 8, 2, 2)],
)
def test_micro_batches_fill_the_global_batch(
    parallel: dict[str, int], batch: int, data_parallel: int, count: int
) -> None:
    config = MegatronConfig(micro_batch_size=2, global_batch_size=batch, parallel=ParallelConfig(**parallel))
    assert config.micro_batches(data_parallel) == count


def test_a_batch_that_cannot_be_cut_is_refused_with_all_its_factors() -> None:
    config = MegatronConfig(micro_batch_size=2, global_batch_size=8)
    with pytest.raises(UsageError, match=r"8 is no multiple of micro_batch_size 2 × 3 data-parallel ranks = 6"):
        config.micro_batches(3)
    config.parallel = ParallelConfig(pipeline=4, virtual_pipeline=2)
    with pytest.raises(UsageError, match=r"groups of 4, and a step has 2 .* choose global_batch_size as a multiple of"):
        config.micro_batches(2)


def test_every_reason_against_a_layout_is_told_at_once() -> None:
    config = build(MegatronConfig, {"parallel": {"tensor": 3, "pipeline": 3}, "model": {"layers": 4}})
    with pytest.raises(UsageError) as refusal:
        config.require_topology(8, vocabulary=256)
    text = str(refusal.value)
    for reason in ("does not divide the world of 8 ranks", "4 attention heads", "4 layers", "256 rows", "feed-forward"):
        assert reason in text


def test_where_a_run_lives_and_how_it_is_spread_is_not_pinned() -> None:
    pinned = MegatronJob().config().pinned()
    for change in ({"run_dir": "x"}, {"tp": 2}, {"overlap": True}, {"global_batch": 8}, {"steps": 99}):
        assert MegatronJob(**change).config().pinned() == pinned  # type: ignore[arg-type]
    for change in ({"seed": 1}, {"micro_batch": 2}):
        assert MegatronJob(**change).config().pinned() != pinned
