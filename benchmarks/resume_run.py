"""One real run at size: uninterrupted, then saved, ended and resumed; all records compared, all timings kept.

    python -m benchmarks.resume_run --config configs/zero3_1b.yaml --ranks 2 --out benchmarks/results/NAME.json

A record of one resume with its report. It is not a benchmark of speed: nothing is repeated and no peer is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.environment import software_versions
from resume_kit.run.journal import read_journal

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="where the runs lie; their checkpoints are deleted")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--entry", default="launch/train_zero3.py", help="the training entry to launch")
    options = parser.parse_args()

    reference, resumed = options.work / "reference", options.work / "resumed"
    settings = [f"run.save_every={options.save_every}", *options.set]
    seconds = {
        "reference": launch(options, [f"run.dir={reference}", f"run.steps={options.steps}", *settings]),
        "first part": launch(options, [f"run.dir={resumed}", f"run.steps={options.save_every}", *settings]),
        "second part": launch(options, [f"run.dir={resumed}", f"run.steps={options.steps}", *settings]),
    }
    result = compare(reference, resumed)
    result |= {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": software_versions(),
        "config": options.config,
        "settings": options.set,
        "ranks": options.ranks,
        "wall seconds of each start, imports included": seconds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for run in (reference, resumed):
        for step in names.checkpoint_steps(run):
            shutil.rmtree(run / names.step_directory(step))
    verdict = result["steps differing"] == 0 and result["final tensors differing"] == 0
    print(json.dumps({k: v for k, v in result.items() if k not in ("report", "records")}, indent=1))
    print("BIT-EXACT" if verdict else "DIFFERENT")
    return 0 if verdict else 1


def launch(options: argparse.Namespace, settings: list[str]) -> float:
    """Run the training entry once under torchrun; seconds of wall time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    command += [str(ROOT / options.entry), "--config", options.config]
    for setting in settings:
        command += ["--set", setting]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": _path()})
    return time.perf_counter() - start


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def compare(reference: Path, resumed: Path) -> dict[str, Any]:
    """Every step's record and every tensor's fingerprint of both runs."""
    one, two = steps_of(reference), steps_of(resumed)
    last = [newest(run) for run in (reference, resumed)]
    tensors = [{str(e.spec.key): e.fingerprint for e in manifest.tensors} for manifest in last]
    events = list(read_journal(resumed))
    resume = next(event for event in events if event["event"] == "resume")
    resume["report"]["run"] = resumed.name
    commits = [event for event in read_journal(reference) if event["event"] == "commit"]
    weights = [e.spec.numel for e in last[0].tensors if e.spec.key.kind == "param"]
    return {
        "parameters": sum(weights),
        "checkpoint bytes": last[0].total_bytes,
        "steps compared": len(one),
        "steps differing": sum(one.get(step) != two.get(step) for step in one.keys() | two.keys()),
        "tensors compared": len(tensors[0]),
        "final tensors differing": sum(
            tensors[0].get(key) != tensors[1].get(key) for key in tensors[0].keys() | tensors[1].keys()
        ),
        "save seconds by phase (rank 0)": [commit["seconds"] for commit in commits],
        "resume seconds by stage": resume["report"]["seconds"],
        "seconds from start event to first step after the resume": first_step_after(events),
        "records": {step: list(values) for step, values in one.items()},
        "report": resume["report"],
    }


def steps_of(run: Path) -> dict[int, tuple[Any, ...]]:
    return {
        event["step"]: tuple(event[name] for name in ("loss", "grad_norm", "lr", "samples", "batch"))
        for event in read_journal(run)
        if event["event"] == "step"
    }


def newest(run: Path) -> Manifest:
    return read_manifest(run / names.step_directory(names.committed_steps(run)[-1]))


def first_step_after(events: list[dict[str, Any]]) -> float:
    start = max(event["time"] for event in events if event["event"] == "start")
    return float(min(e["time"] for e in events if e["event"] == "step" and e["time"] > start) - start)


def hardware() -> dict[str, Any]:
    found: dict[str, Any] = {"host cores": os.cpu_count(), "machine": platform.machine()}
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found["gpus"] = [line.strip() for line in answer.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        found["gpus"] = []
    return found


if __name__ == "__main__":
    sys.exit(main())
