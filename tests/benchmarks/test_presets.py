"""Presets are complete, and the command line changes what it says and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from benchmarks.machine import ROOT
from benchmarks.peers.registry import PEERS
from benchmarks.suite.adjusting import adjusted
from benchmarks.suite.parts import parts_of, share
from benchmarks.suite.presets import PRESETS
from launch.config import TrainConfig, load_as
from launch.megatron_config import MegatronConfig
from resume_kit.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_every_workload_and_leg_can_be_configured(name: str) -> None:
    for spec in PRESETS[name].workloads:
        kind = MegatronConfig if spec.engine == "megatron" else TrainConfig
        for ranks, more in [(spec.ranks, ()), *((leg.ranks, leg.settings) for leg in spec.legs)]:
            config = load_as(kind, ROOT / spec.config, [*spec.settings, *more])
            if isinstance(config, MegatronConfig):
                topology = config.require_topology(ranks, config.model.padded_vocabulary(256))
                assert config.micro_batches(topology.data_parallel) >= 1
        assert all(spec.engine in PEERS[peer].engines for peer in spec.peers)
    assert set(PRESETS[name].effect) <= {"overlapped", "staged", "committed", *PEERS}


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rehearsal_differs_in_sizes_only(ranks: int) -> None:
    gpu, cpu = PRESETS[f"gpu-{ranks}x"], PRESETS[f"cpu-{ranks}x"]
    for real, rehearsed in zip(gpu.workloads, cpu.workloads, strict=True):
        assert replace(real, settings=()) == replace(rehearsed, settings=())
        assert real.ranks == ranks
        assert real.continues
    assert (gpu.device, cpu.device) == ("any", "cpu")
    assert "no measurement" in cpu.about
    assert [name for name, _ in parts_of(PRESETS["cpu-8x"])] == [
        "zero3",
        *("zero3-again", "zero3-on-6", "zero3-on-4", "zero3-on-8"),
        "megatron-tp2-pp2-dp2",
        *("megatron-again", "megatron-tp8", "megatron-tp4-pp2", "megatron-pp8", "megatron-dp8"),
    ]


@pytest.mark.parametrize(("name", "billions"), [("gpu-2x", 0.7), ("gpu-8x", 3.1)])
def test_several_gpus_train_as_many_parameters_as_it_says(name: str, billions: float) -> None:
    assert f"{billions} billion parameters" in PRESETS[name].about
    for spec in PRESETS[name].workloads:
        if spec.engine == "megatron":
            config = load_as(MegatronConfig, ROOT / spec.config, spec.settings)
            assert config.run.deterministic
            model = config.model
            sizes = (model.hidden_size, model.feed_forward, model.layers, model.vocabulary)
            heads, groups = model.attention_heads, model.query_groups or model.attention_heads
        else:
            mapping = load_as(TrainConfig, ROOT / spec.config, spec.settings).model
            names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
            sizes = tuple(mapping[name] for name in names)  # type: ignore[assignment] # four numbers
            heads, groups = mapping["num_attention_heads"], mapping["num_key_value_heads"]
        hidden, inner, layers, vocabulary = sizes
        attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * groups
        weights = layers * (attention + 3 * hidden * inner) + 2 * (vocabulary or 0) * hidden
        assert round(weights / 1e9, 1) == billions


def test_of_a_budget_a_workload_gets_five_times_as_much_as_a_leg() -> None:
    parts = parts_of(PRESETS["gpu-8x"])
    assert share(parts) == 5 / 19
    assert share(parts[1:]) == 1 / 14
    assert share(parts[-1:]) == 1


def test_settings_go_where_they_belong() -> None:
    preset = PRESETS["cpu-tiny"]
    changed = adjusted(preset, ["repeats=2", "zero3.model.n_layer=1"], peers="dcp,deepspeed,megatron-plain", ranks=1)
    assert (changed.repeats, changed.phases) == (2, preset.phases)
    assert changed.workload("zero3").settings == (*preset.workload("zero3").settings, "model.n_layer=1")
    assert changed.workload("megatron-tp2").settings == preset.workload("megatron-tp2").settings
    assert changed.workload("zero3").peers == ("dcp", "deepspeed")
    assert changed.workload("megatron-tp2").peers == ("dcp", "megatron-plain")
    assert [spec.ranks for spec in changed.workloads] == [1, 1]
    assert adjusted(preset, [], peers="none").workload("zero3").peers == ()
    assert adjusted(preset, []) == preset


@pytest.mark.parametrize(
    ("settings", "peers", "reason"),
    [
        (["repeats"], None, "write key=value"),
        (["repeats=many"], None, "whole number"),
        (["save_every=0"], None, "whole number"),
        (["zero.model.n_layer=1"], None, "choose one of"),
        ([], "dcp,deepsped", "did you mean 'deepspeed'"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: list[str], peers: str | None, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        adjusted(PRESETS["cpu-tiny"], settings, peers=peers)


def test_parts_come_in_order_legs_behind_their_workload() -> None:
    preset = PRESETS["cpu-tiny"]
    assert [name for name, _ in parts_of(preset)] == ["zero3", "zero3-on-3", "megatron-tp2", "megatron-pp2"]
    assert [name for name, _ in parts_of(preset, ["zero3"])] == ["zero3"]
    with pytest.raises(UsageError, match="has zero3, zero3-on-3"):
        parts_of(preset, ["zero9"])


def test_under_a_launcher_one_part_must_be_named(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    assert main(["run", "--preset", "cpu-tiny", "--out", str(tmp_path)]) == 2
    assert "one process group measures one part: say --only PART, of zero3, zero3-on-3" in capsys.readouterr().err
