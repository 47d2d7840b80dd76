"""Megatron training: the same losses in every layout, and the entry under the real launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob, train
from tests.ranks import ROOT, RankFailure

PLAIN = MegatronJob(kit=False, steps=4, layers=4, dropout=0.0, precision="fp32")
MODERN = PLAIN.but(swiglu=True, norm="RMSNorm", rotary=True, groups=2, tied=False, model={"bias": False})
EXPERTS = PLAIN.but(layers=2, experts=4, swiglu=True, norm="RMSNorm")

Job = tuple[int, dict[str, Any]]

LAYOUTS: dict[str, Job] = {
    "dp2": (2, {}),
    "dp2, optimizer not distributed": (2, {"distributed_optimizer": False}),
    "dp2, overlapped, in buckets": (2, {"overlap": True, "bucket_size": 5000}),
    "dp2, overlapped, optimizer not distributed": (2, {"overlap": True, "distributed_optimizer": False}),
    "tp2": (2, {"tp": 2}),
    "tp2 sequence": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2 vpp2, overlapped": (2, {"pp": 2, "vpp": 2, "overlap": True, "bucket_size": 5000}),
    "pp4": (4, {"pp": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 pp2 vpp2 sequence": (4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True}),
    "tp2 pp2 dp2": (8, {"tp": 2, "pp": 2}),
    "tp2 dp2, optimizer not distributed": (4, {"tp": 2, "distributed_optimizer": False}),
}
MODERN_LAYOUTS: dict[str, Job] = {
    "tp2 sequence": (2, {"tp": 2, "sp": True}),
    "pp2 vpp2, overlapped": (2, {"pp": 2, "vpp": 2, "overlap": True}),
}
EXPERT_LAYOUTS: dict[str, Job] = {
    "ep2": (2, {"ep": 2}),
    "ep2, by gathering": (2, {"ep": 2, "model": {"dispatcher": "allgather"}}),
    "ep2, overlapped": (2, {"ep": 2, "overlap": True}),
    "ep2, optimizer not distributed": (2, {"ep": 2, "distributed_optimizer": False}),
    "tp2": (2, {"tp": 2, "sp": True}),
    "tp2 ep2 etp1": (2, {"tp": 2, "sp": True, "ep": 2, "etp": 1}),
    "tp2 ep2": (4, {"tp": 2, "sp": True, "ep": 2}),
    "tp2 pp2 ep2 etp1": (4, {"tp": 2, "pp": 2, "sp": True, "ep": 2, "etp": 1}),
}


@pytest.fixture(scope="module")
def known() -> dict[str, list[dict[str, Any]]]:
    """What one rank trained, by job."""
    return {}


def same_as_one_rank(
    ranks: Ranks, folder: Path, known: dict[str, list[dict[str, Any]]], job: MegatronJob, layout: Job
) -> None:
    world_size, changes = layout
    job = job.but(data=text_file(folder))
    name = repr(job.but(data=""))
    if name not in known:
        known[name] = ranks.run(train, 1, job.to_json())[0]["records"]
    every = ranks.run(train, world_size, job.but(**changes).to_json())
    assert all(one["records"] == every[0]["records"] for one in every)
    for found, wanted in zip(every[0]["records"], known[name], strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    losses = [record["loss"] for record in known[name]]
    assert losses[-1] < losses[0] - 0.1, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same(
    name: str, ranks: Ranks, tmp_path: Path, known: dict[str, list[dict[str, Any]]]
) -> None:
    same_as_one_rank(ranks, tmp_path, known, PLAIN, LAYOUTS[name])


@pytest.mark.parametrize("name", MODERN_LAYOUTS)
def test_a_modern_model_trains_the_same(
    name: str, ranks: Ranks, tmp_path: Path, known: dict[str, list[dict[str, Any]]]
) -> None:
    same_as_one_rank(ranks, tmp_path, known, MODERN, MODERN_LAYOUTS[name])


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_experts_train_the_same(
    name: str, ranks: Ranks, tmp_path: Path, known: dict[str, list[dict[str, Any]]]
) -> None:
    same_as_one_rank(ranks, tmp_path, known, EXPERTS, EXPERT_LAYOUTS[name])


def test_a_run_with_dropout_repeats_itself_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    job = MegatronJob(kit=False, steps=3, tp=2, sp=True, data=text_file(tmp_path))
    first, second = (ranks.run(train, 2, job.to_json())[0]["records"] for _ in range(2))
    assert first == second
    assert first != ranks.run(train, 2, job.but(dropout=0.0).to_json())[0]["records"]


def generators(rank: int, world_size: int, options: dict[str, Any]) -> tuple[list[float], dict[str, list[float]]]:
    """Draws of the default generator, and of each of Megatron's."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from launch.megatron_training import build

    build(MegatronJob(**options).config())
    drawn = {}
    for name in get_cuda_rng_tracker().get_states():
        with get_cuda_rng_tracker().fork(name):
            drawn[name] = torch.rand(4).tolist()
    return torch.rand(4).tolist(), drawn


def test_generators_agree_where_dropout_must_and_nowhere_else(ranks: Ranks, tmp_path: Path) -> None:
    options = MegatronJob(tp=2, layers=2, data=text_file(tmp_path)).to_json()
    default, named = zip(*ranks.run(generators, 4, options), strict=True)
    assert default[0] == default[1] != default[2] == default[3]
    split = [draws["model-parallel-rng"] for draws in named]
    assert split[0] != split[1]


# -- what cannot be


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (2, {"tp": 2, "heads": 1, "hidden": 8}, "1 attention heads do not divide by tp 2"),
        (2, {"pp": 2, "layers": 3}, "3 layers do not divide by pp 2"),
        (2, {"ep": 2, "experts": 3}, "3 experts do not divide by ep 2"),
        (2, {"tp": 3}, "tp 3 × pp 1 = 3 does not divide the world of 2 ranks"),
        (2, {"tp": 2, "experts": 2}, "experts with tp 2 need sequence parallelism"),
        (2, {"global_batch": 5}, "global_batch_size 5 is no multiple of micro_batch_size 1 × 2 data-parallel ranks"),
        (2, {"pp": 2, "vpp": 2, "layers": 4, "global_batch": 3}, "takes micro-batches in groups of 2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_is_built(
    world_size: int, changes: dict[str, Any], message: str, ranks: Ranks, tmp_path: Path
) -> None:
    job = MegatronJob(kit=False, data=text_file(tmp_path)).but(**changes)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, world_size, job.to_json())
    assert set(failure.value.error_types.values()) == {"resume_kit.errors.UsageError"}
    assert message in str(failure.value)


# -- the real launcher

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(run: Path, *settings: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "launch" / "train_megatron.py"), "--config", str(ROOT / "configs" / "megatron_tiny.yaml")]
    for setting in (f"run.dir={run}", "data.max_bytes=200000", "model.layers=2", *settings):
        command += ["--set", setting]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=ROOT, check=False)


def test_starts_and_resumes_under_torchrun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = launch(run, "run.steps=3", "run.save_every=2", "parallel.tensor=2")
    assert started.returncode == 0, started.stdout[-3000:] + started.stderr[-3000:]
    assert "gloo: no GPU is visible; tensor 2; 4 micro-batches a step" in started.stdout
    resumed = launch(run, "run.steps=4", "run.save_every=2", "parallel.tensor=2")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "training goes on after step 2, proved" in resumed.stdout
    lines = [line.split() for line in resumed.stdout.splitlines() if line.startswith("step ")]
    assert [line[1] for line in lines] == ["3", "4"]
    assert [line[::2] for line in lines] == [["step", "loss", "grad_norm", "lr", "tokens"]] * 2
    assert lines[0][9] == str(3 * 8 * 64)

    refused = launch(run, "run.steps=5", "parallel.tensor=2", "model.dropout=0.2")
    assert refused.returncode != 0
    assert "ERROR: step-000000004 must not be resumed by this run" in refused.stderr
    assert 'train_megatron.py", line' not in refused.stderr
    events = [json.loads(line)["event"] for line in (run / "journal.jsonl").read_text().splitlines()]
    assert events[-2:] == ["start", "refuse"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.tensr=2", "'parallel.tensr'; did you mean 'parallel.tensor'?"),
        ("precision=fp8", "precision is 'fp8'; choose one of bf16, fp32"),
        ("parallel.pipeline=3", "tp 1 × pp 3 = 3 does not divide the world of 1 ranks"),
        ("policy.gaet=true", "policy has no field 'gaet'; did you mean 'gate'?"),
    ],
)
def test_wrong_usage_is_a_readable_line_and_exit_code_2(setting: str, message: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train_megatron.py"), "--set", "data.max_bytes=100000"]
    command += ["--config", str(ROOT / "configs" / "megatron_tiny.yaml"), "--set", setting]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
