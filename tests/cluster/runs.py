"""Training runs on the cluster, and what they must be equal to: the same run, never disturbed, on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from launch.demo.judging import FIGURES
from resume_kit.checkpoint.names import step_directory
from tests.cluster.cluster import Cluster, ClusterError
from tests.cluster.paced import Pace
from tests.conftest import Ranks
from tests.ranks import ROOT

Event = dict[str, Any]
Found = TypeVar("Found")

ZERO3, MEGATRON = "zero3", "megatron"
WITHOUT_GPUS = ("--gpus-per-node=0",)
SMALL = ("data.max_bytes=200000", "data.num_workers=0", "run.keep_last=100", "policy.gate=false")
"""Fewer seconds, and no checkpoint is deleted: what was committed must be there at the end."""


def train_reference(rank: int, world_size: int, kind: str, arguments: list[str]) -> None:
    """The real entry, on ranks that a fork server starts."""
    if kind == ZERO3:
        from launch.train_zero3 import main
    else:
        from launch.train_megatron import main
    assert main(arguments) == 0


@dataclass
class Run:
    """A run, its journal, and the jobs that train it. Steps wait for `allow`, see `tests.cluster.paced`."""

    cluster: Cluster
    folder: Path
    kind: str
    settings: tuple[str, ...]
    jobs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.pace = Pace(self.folder / "pace")
        self.allow(0)

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    def arguments(self, *settings: str, directory: Path | None = None) -> list[str]:
        every = (*SMALL, *self.settings, *settings, f"run.dir={directory or self.directory}")
        return ["--config", f"configs/{self.kind}_tiny.yaml", *(word for one in every for word in ("--set", one))]

    def submit(self, *settings: str, options: tuple[str, ...] = (), paced: bool = True, **env: str) -> int:
        """Queue the batch script of this kind; the job's id."""
        if paced:
            entry = str(ROOT / "tests" / "cluster" / "paced.py")
            env |= {"TRAIN": entry, "PACE": str(self.folder / "pace"), "ENTRY": f"launch.train_{self.kind}"}
        job = self.cluster.submit(
            ROOT / "launch" / f"{self.kind}.sbatch",
            *self.arguments(*settings),
            options=(*WITHOUT_GPUS, f"--output={self.folder}/job-%j.out", *options),
            **env,
        )
        self.jobs.append(job)
        return job

    def allow(self, step: int) -> None:
        """Let steps up to this one end."""
        self.pace.allow(step)

    def train_to(self, step: int, *, attempt: int | None = None, timeout: float = 90) -> None:
        """Let the run come to a step, and wait until it is there, in this attempt where it is given."""
        self.allow(step)

        def there() -> bool:
            return any(e["step"] == step for e in self.steps() if attempt in (None, e["attempt"]))

        self.wait_for(f"step {step}", there, timeout)

    def walk(self, what: str, look: Callable[[], Found | None], *, last: int, timeout: float = 60) -> Found:
        """Let a step end every half second, up to `last`, until `look` returns something true."""
        began, start = time.monotonic(), self.pace.allowed

        def look_and_go_on() -> Found | None:
            self.allow(min(last, start + int((time.monotonic() - began) / 0.5)))
            return look()

        return self.wait_for(what, look_and_go_on, timeout)

    def wait_for(self, what: str, look: Callable[[], Found | None], timeout: float = 90) -> Found:
        """`Cluster.wait_for`; the error has the ends of the jobs' output too."""
        try:
            return self.cluster.wait_for(what, look, timeout)
        except ClusterError as error:
            output = "\n".join(f"--- {f.name}\n{f.read_text()[-6000:]}" for f in sorted(self.folder.glob("*.out")))
            raise ClusterError(f"{error}\n{output}") from None

    def job_is(self, job: int, state: str, *, restarts: int | None = None) -> bool:
        found = self.cluster.job(job)
        return found["JobState"] == state and (restarts is None or int(found["Restarts"]) == restarts)

    # ---- what is on disk

    def events(self, *names: str) -> list[Event]:
        """The journal, all of its lines, stale ones too."""
        try:
            lines = (self.directory / "journal.jsonl").read_text().split("\n")
        except FileNotFoundError:
            return []
        whole = [json.loads(line) for line in lines[:-1] if line]
        return [event for event in whole if not names or event["event"] in names]

    def steps(self) -> list[Event]:
        return self.events("step")

    def first_steps(self) -> dict[int, int]:
        """The first step that each attempt trained."""
        found: dict[int, int] = {}
        for event in self.steps():
            found.setdefault(event["attempt"], event["step"])
        return found

    def committed(self) -> list[int]:
        return [event["step"] for event in self.events("commit")]

    def ended(self, attempt: int) -> Event:
        """The last word of an attempt; empty where it had none."""
        try:
            ended: Event = json.loads((self.directory / f"attempts/{attempt:06d}/ended.json").read_text())
        except FileNotFoundError:
            return {}
        return ended

    def output(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("*.out")))

    def next(self) -> str:
        return self.cluster.run(None, "resume-kit", "next", str(self.directory)).stdout.strip()

    # ---- processes

    def processes_on(self, node: int) -> dict[int, dict[str, str]]:
        """This run's launchers and ranks on a node: process, as this machine numbers it -> its environment."""
        found = {}
        for pid in self.cluster.pids(node):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if f"run.dir={self.directory}".encode() in words:
                found[pid] = dict(item.decode(errors="replace").split("=", 1) for item in environment if b"=" in item)
        return found

    def ranks_on(self, node: int) -> dict[int, int]:
        """Global rank -> process."""
        return {int(env["RANK"]): pid for pid, env in self.processes_on(node).items() if "RANK" in env}

    def kill_rank(self, node: int, rank: int) -> None:
        os.kill(self.ranks_on(node)[rank], signal.SIGKILL)

    def require_alike(self, reference: Iterable[Event], *, last: int) -> None:
        """On other numbers of ranks: the reference's samples in its order, losses close to its, all commits."""
        wanted = {event["step"]: event for event in reference}
        for event in self.steps():
            right = wanted[event["step"]]
            assert [event[name] for name in ("samples", "batch")] == [right[name] for name in ("samples", "batch")]
            assert event["loss"] == pytest.approx(right["loss"], abs=5e-3), f"step {event['step']}"
        self._require_whole(last)

    def require_equal(self, reference: Iterable[Event], *, last: int) -> None:
        """Every step that was trained, once or again, is the reference's bit for bit; all commits are there."""
        wanted = {event["step"]: event for event in reference}
        trained = self.steps()
        differing = [
            f"step {event['step']} of attempt {event['attempt']}: {name} {event[name]!r}, not {right[name]!r}"
            for event in trained
            for right in [wanted[event["step"]]]
            for name in FIGURES
            if event[name] != right[name]
        ]
        assert not differing, "\n".join(differing)
        self._require_whole(last)

    def _require_whole(self, last: int) -> None:
        assert {event["step"] for event in self.steps()} == set(range(1, last + 1))
        missing = [step for step in self.committed() if not (self.directory / step_directory(step)).is_dir()]
        assert not missing, f"committed and lost: {missing}"


class References:
    """Undisturbed runs, each made once a session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Any, ...], list[Event]] = {}

    def of(self, ranks: Ranks, run: Run, world_size: int, *settings: str) -> list[Event]:
        """The step events of the same settings on `world_size` ranks of this machine."""
        key = (run.kind, run.settings, world_size, settings)
        if key not in self._made:
            directory = self._folder / f"reference-{len(self._made)}"
            ranks.run(train_reference, world_size, run.kind, run.arguments(*settings, directory=directory), timeout=180)
            lines = (directory / "journal.jsonl").read_text().splitlines()
            self._made[key] = [event for event in map(json.loads, lines) if event["event"] == "step"]
        return self._made[key]
