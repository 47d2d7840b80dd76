"""Two ranks, each on a GPU of its own, under NCCL: trained, saved, resumed, and every step again as it was.

That the steps are the same is the replay audit's to say: a run that goes back to an older checkpoint must come by the
recorded losses again, at full precision. Skipped without two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import text_file

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")

SHORT = ("run.steps=6", "run.save_every=3", "run.deterministic=true", "data.num_workers=0")
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")


def train(entry: str, config: str, run_dir: Path, *settings: str, ranks: int = 2) -> str:
    """Run an entry to its end under torchrun; its output. Fails with that where the entry fails."""
    every = (*SHORT, f"run.dir={run_dir}", f"data.path={text_file(run_dir.parent)}", *settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"launch/{entry}", "--config", f"configs/{config}", *(w for s in every for w in ("--set", s))]
    # one thread on a host, whatever the number of ranks: torchrun sees to it only for more than one
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def losses(run_dir: Path) -> list[tuple[int, Any]]:
    """(step, loss) of every step in the journal, those that were trained again too."""
    events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]


def require_replayed(run_dir: Path) -> None:
    """Steps 1 to 6, and then 4 to 6 once more with the same losses, bit for bit."""
    found = losses(run_dir)
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert found[3:6] == found[6:]


@pytest.mark.parametrize("stage", [3, 2])
def test_zero_resumes_bit_identically(stage: int, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", (f"deepspeed.zero_optimization.stage={stage}",)
    train("train_zero3.py", "zero3_tiny.yaml", run_dir, *settings)
    train("train_zero3.py", "zero3_tiny.yaml", run_dir, *settings, "run.resume_at=3")
    require_replayed(run_dir)


@pytest.mark.parametrize(
    "settings",
    [("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",), OVERLAP],
    ids=["tensor", "pipeline", "data"],
)
def test_megatron_resumes_bit_identically(settings: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train("train_megatron.py", "megatron_tiny.yaml", run_dir, *settings)
    train("train_megatron.py", "megatron_tiny.yaml", run_dir, *settings, "run.resume_at=3")
    require_replayed(run_dir)


def test_megatron_goes_to_another_topology_and_on(tmp_path: Path) -> None:
    """Two tensor ranks read together what two stages, then two data-parallel ranks, have saved."""
    run_dir, flexible = tmp_path / "run", "policy.preset=flexible"
    train("train_megatron.py", "megatron_tiny.yaml", run_dir, flexible, "parallel.pipeline=2")
    train("train_megatron.py", "megatron_tiny.yaml", run_dir, flexible, "parallel.tensor=2", "run.steps=9")
    train("train_megatron.py", "megatron_tiny.yaml", run_dir, flexible, *OVERLAP, "run.steps=12")
    train("train_megatron.py", "megatron_tiny.yaml", run_dir, flexible, "run.steps=15", ranks=1)
    assert [step for step, _ in losses(run_dir)] == [*range(1, 16)]
