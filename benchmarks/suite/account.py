"""A part of a preset that is being measured: what it is, what is known of it so far, when it must end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite import storage
from benchmarks.suite.presets import Leg, Preset, WorkloadSpec
from benchmarks.suite.results import Results, Row
from benchmarks.suite.timing import Clock
from resume_kit.checkpoint.filesystems import in_memory


@dataclass
class Job:
    """What to measure, and where. deadline: Unix seconds after which no repeat begins; results: written to `out`."""

    preset: Preset
    spec: WorkloadSpec
    work: Sequence[Path]
    out: Path
    results: Results
    leg: Leg | None = None
    deadline: float | None = None

    @property
    def part(self) -> str:
        return self.leg.name if self.leg else self.spec.name


@dataclass
class Account:
    """What rank 0 writes of the part so far."""

    job: Job
    clock: Clock
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def publish(self) -> None:
        """Write what is known; a run that is killed keeps it."""
        self.facts["seconds"] = time.perf_counter() - self.began
        if self.clock.rank == 0:
            self.job.results.replace_part(self.job.part, self.facts, self.rows)
            self.job.results.write(self.job.out)

    def say(self, text: str) -> None:
        if self.clock.rank == 0:
            print(f"[{self.job.part}] {text}", flush=True)

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is used up, as rank 0 sees it; says so in the facts."""
        late = self.job.deadline is not None and time.time() > self.job.deadline
        if late := self.clock.agreed(late):
            self.facts.setdefault("ended early", []).append(what)
            self.say(f"the budget is used up: {what}")
        return late


def place_of(job: Job, folder: Path) -> Path:
    """Where a workload and its legs write on a file system."""
    return folder / "resume-kit-benchmarks" / job.spec.name


def run_of_legs(job: Job) -> Path:
    """The run directory that a workload begins and its legs resume."""
    return place_of(job, job.work[0]) / "run"


def label_of(account: Account, folder: Path) -> str:
    """A name of the file system that means something elsewhere too; its facts go to the account."""
    kind = storage.file_system(folder)
    targets = account.facts["targets"]
    label = kind if kind not in targets else f"{kind} {len(targets) + 1}"
    cold = "memory: cannot be dropped" if in_memory(folder) else "dropped by posix_fadvise after fsync"
    targets[label] = {"file system": kind, "caches before reads": cold}
    return label


def median_text(row: Row, metric: str) -> str:
    spread = row.spread(metric)
    return f"{spread.median:.3f} s" if spread else row.failure or "n/a"
