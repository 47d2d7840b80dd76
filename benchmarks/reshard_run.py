"""A real run at size that changes its topology from leg to leg; what each resume read, proved and took is kept.

    python -m benchmarks.reshard_run --entry launch/train_megatron.py --config configs/megatron_1b.yaml \
        --work /scratch --out benchmarks/results/NAME.json \
        --leg 'ranks=2 parallel.tensor=2' --leg 'ranks=2 parallel.pipeline=2' --leg 'ranks=1 device=cuda'

Each leg is a start of the same run under torchrun: it resumes what the leg before has saved, trains two steps, saves
and ends. `device=cpu` hides the GPUs. Every resume proves that the tensors are those that were saved, or refuses; here
the manifests before and after are compared too. A record of real runs, not a benchmark of speed: nothing is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, hardware
from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.environment import software_versions
from resume_kit.run.journal import read_journal

STEPS = 2


@dataclass(frozen=True)
class Leg:
    """One start of the run: ranks, the device they use, and settings of the training entry."""

    ranks: int
    device: str
    settings: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Leg:
        words = dict(word.split("=", 1) for word in text.split())
        ranks, device = int(words.pop("ranks")), words.pop("device", "cuda")
        return cls(ranks, device, tuple(f"{key}={value}" for key, value in words.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--entry", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], help="for all legs")
    parser.add_argument("--leg", action="append", required=True, type=Leg.parse)
    parser.add_argument("--work", required=True, type=Path, help="where the run lies; it is deleted afterwards")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    run = options.work / "reshard-run"
    shutil.rmtree(run, ignore_errors=True)
    legs = []
    for number, leg in enumerate(options.leg):
        took = launch(options, leg, run, steps=STEPS * (number + 1))
        legs.append({"leg": f"{leg.ranks} {leg.device} ranks, {' '.join(leg.settings)}", "wall seconds": took})
        legs[-1] |= account(run)
    document = {
        "what": "one run, another topology at every start; each resume proved by fingerprints of all tensors",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": software_versions(),
        "config": options.config,
        "settings": options.set,
        "parameters": sum(e.spec.numel for e in newest(run).tensors if e.spec.key.kind == "param"),
        "checkpoint bytes": newest(run).total_bytes,
        "legs": legs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    for leg_account in legs:
        print(json.dumps({k: v for k, v in leg_account.items() if k != "report"}), flush=True)
    shutil.rmtree(run)
    return 0


def launch(options: argparse.Namespace, leg: Leg, run: Path, *, steps: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={leg.ranks}"]
    command += [str(ROOT / options.entry), "--config", options.config]
    every = [f"run.dir={run}", f"run.steps={steps}", f"run.save_every={STEPS}", "policy.preset=flexible"]
    for setting in [*every, *options.set, *leg.settings]:
        command += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if leg.device == "cpu":
        threads = str(max(1, (os.cpu_count() or 1) // leg.ranks))
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return time.perf_counter() - start


def newest(run: Path) -> Manifest:
    return read_manifest(run / names.step_directory(names.committed_steps(run)[-1]))


def account(run: Path) -> dict[str, Any]:
    """What the run's last attempt did: its resume's report, its save, its steps."""
    events = list(read_journal(run))
    last = [event for event in events if event["attempt"] == events[-1]["attempt"]]
    found: dict[str, Any] = {"topology": last[0]["topology"]}
    for event in last:
        if event["event"] == "resume":
            report = event["report"]
            found |= {
                "resumed at step": event["step"],
                "resume seconds by stage": report["seconds"],
                "read": {key: value for key, value in report["read"].items() if key != "by_rank"},
                "checks": [check for check in report["checks"] if check["stage"] in ("prove", "gate", "hand-over")],
                "changes": [f"{c['path']}: {c['before']} -> {c['after']}" for c in report["changes"]],
            }
        if event["event"] == "commit":
            found["save seconds by phase (rank 0)"] = event["seconds"]
    found["losses"] = {event["step"]: event["loss"] for event in last if event["event"] == "step"}
    found["checkpoints"] = names.checkpoint_steps(run)
    return found


if __name__ == "__main__":
    sys.exit(main())
