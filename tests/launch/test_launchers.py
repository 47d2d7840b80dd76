"""The training entry under the real launchers, and what a person sees when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(launcher: str, run: Path, *settings: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    entry = [str(ROOT / "launch" / "train_zero3.py"), "--config", str(ROOT / "configs" / "zero3_tiny.yaml")]
    commands = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "deepspeed": [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"),
            f"--master_port={free_port()}",
        ],
    }
    for setting in (f"run.dir={run}", "data.max_bytes=200000", *settings):
        entry += ["--set", setting]
    command = [*commands[launcher], *entry]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=ROOT, check=False
    )


def test_starts_under_deepspeed_and_resumes_under_torchrun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = launch("deepspeed", run, "run.steps=3", "run.save_every=2")
    assert started.returncode == 0, started.stdout[-3000:] + started.stderr[-3000:]
    assert "step 3 loss " in started.stdout
    resumed = launch("torchrun", run, "run.steps=4", "run.save_every=2")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "training goes on after step 2, proved" in resumed.stdout
    lines = [line.split() for line in resumed.stdout.splitlines() if line.startswith("step ")]
    assert [line[1] for line in lines] == ["3", "4"]
    assert [line[::2] for line in lines] == [["step", "loss", "grad_norm", "lr", "tokens"]] * 2

    refused = launch("torchrun", run, "run.steps=5", "model.attn_pdrop=0.2")
    assert refused.returncode != 0
    assert "ERROR: step-000000004 must not be resumed by this run" in refused.stderr
    assert "model.attn_pdrop: saved with 0.1, live 0.2" in refused.stderr
    assert 'train_zero3.py", line' not in refused.stderr
    events = [json.loads(line)["event"] for line in (run / "journal.jsonl").read_text().splitlines()]
    assert events[-2:] == ["start", "refuse"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.sequence_lenght=64", "'data.sequence_lenght'; did you mean 'data.sequence_length'?"),
        ("policy.gaet=true", "policy has no field 'gaet'; did you mean 'gate'?"),
        ("run.steps=many", "run.steps is 'many'; it must be int"),
    ],
)
def test_a_wrong_key_is_one_line_and_exit_code_2(setting: str, message: str, tmp_path: Path) -> None:
    entry = [sys.executable, str(ROOT / "launch" / "train_zero3.py")]
    entry += ["--config", str(ROOT / "configs" / "zero3_tiny.yaml"), "--set", setting]
    ended = subprocess.run(entry, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
