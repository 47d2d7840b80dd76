"""Starts each part of a preset under torchrun, one after the other, within a budget of time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.suite.presets import Leg, Preset, WorkloadSpec
from resume_kit.errors import UsageError

_GRACE = 120.0  # seconds beyond its deadline for a part to finish a repeat, before it is killed

_FAREWELL = 60.0  # seconds for torchrun to end its ranks, before it is killed itself

_SHARES = 5  # of the time that is left a workload gets so many shares, a leg one

Part = tuple[WorkloadSpec, Leg | None]


def parts_of(preset: Preset, only: Sequence[str] = ()) -> list[tuple[str, Part]]:
    """Names and contents of a preset's parts in order: each workload, then its legs. Raises `UsageError`."""
    every: list[tuple[str, Part]] = []
    for spec in preset.workloads:
        every += [(spec.name, (spec, None)), *((leg.name, (spec, leg)) for leg in spec.legs)]
    names = [name for name, _ in every]
    if strange := [name for name in only if name not in names]:
        raise UsageError(f"--only {strange[0]}: preset {preset.name} has {', '.join(names)}")
    return [(name, part) for name, part in every if not only or name in only]


def hide_gpus(preset: Preset) -> None:
    """Before torch is imported: a CPU preset leaves the GPUs of the machine alone."""
    if preset.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def run_parts(preset: Preset, arguments: Sequence[str], only: Sequence[str], budget: float | None) -> dict[str, str]:
    """Start every part; what went wrong, by part. `arguments` are those of `run`, for the ranks to read again.

    With a budget (seconds) each part gets a share of what the parts before it have left.
    """
    parts = parts_of(preset, only)
    end = None if budget is None else time.time() + budget
    failures: dict[str, str] = {}
    for number, (name, (spec, leg)) in enumerate(parts):
        if leg is not None and spec.name in failures:
            failures[name] = f"{spec.name} left no checkpoint"
            continue
        deadline = None if end is None else time.time() + max(0.0, end - time.time()) * share(parts[number:])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={leg.ranks if leg else spec.ranks}", "-m", "benchmarks", "run", *arguments]
        command += ["--part", name, *(["--deadline", f"{deadline:.0f}"] if deadline else [])]
        print(f"== {name}", flush=True)
        if problem := _finished(command, None if deadline is None else deadline - time.time() + _GRACE):
            failures[name] = problem
            print(f"== {name} {problem}", flush=True)
    return failures


def share(parts: Sequence[tuple[str, Part]]) -> float:
    """The first one's fraction of the time that is left for these parts."""
    weights = [_SHARES if leg is None else 1 for _, (_, leg) in parts]
    return weights[0] / sum(weights)


def _finished(command: Sequence[str], limit: float | None) -> str:
    """Run a command to its end, or to the limit; what was wrong, or nothing."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        code = process.wait(limit)
        return "" if code == 0 else f"ended with code {code}"
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which are in sessions of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(_FAREWELL)
        return f"was killed: it did not end within {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean(preset: Preset, work: Sequence[Path]) -> None:
    """Delete what the parts wrote."""
    for folder in work:
        for spec in preset.workloads:
            shutil.rmtree(folder / "resume-kit-benchmarks" / spec.name, ignore_errors=True)
        with suppress(OSError):
            (folder / "resume-kit-benchmarks").rmdir()
