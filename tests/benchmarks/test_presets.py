"""Presets are complete, and the command line changes what it says and nothing else."""

from __future__ import annotations

import os

import pytest

from benchmarks.peers.registry import PEERS
from benchmarks.suite.adjusting import adjusted
from benchmarks.suite.parts import parts_of
from benchmarks.suite.presets import PRESETS
from benchmarks.suite.workloads import ROOT
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
