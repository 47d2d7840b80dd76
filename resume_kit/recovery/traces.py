"""What the journal tells of each attempt, gathered in one pass. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from resume_kit.recovery.events import JournalLines


@dataclass(frozen=True)
class Moment:
    """An optimizer step, and the Unix seconds at which it was done."""

    step: int
    time: float


@dataclass(frozen=True)
class Commit:
    """A commit in the journal. `blocked`: seconds it took from training; `durable`: seconds from its begin to the
    commit; None where the journal does not say."""

    step: int
    time: float
    attempt: int
    bytes: int | None
    blocked: float | None
    durable: float | None


#: Points of an attempt's curve that are kept: enough for a picture, however long the journal is.
_POINTS = 1000


@dataclass
class Trace:
    """What one attempt wrote into the journal.

    trained: steps, those trained twice within the attempt counted twice. gaps: seconds between two steps in a row.
    curve: some of the steps, evenly picked, the first among them.
    closing: the event that ended it, if one did. begun, skipped: saves.
    """

    number: int
    start: Mapping[str, Any] = field(default_factory=dict)
    resume: Mapping[str, Any] = field(default_factory=dict)
    first_step: Moment | None = None
    last_step: Moment | None = None
    trained: int = 0
    gaps: array[float] = field(default_factory=lambda: array("d"))
    curve: list[Moment] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    begun: int = 0
    skipped: int = 0
    closing: Mapping[str, Any] | None = None
    last_sign: float | None = None
    _stride: int = 1

    @property
    def resumed_from(self) -> int | None:
        """The step whose state it went on from: 0 for a new run, None where it did not come so far."""
        if self.resume:
            return int(self.resume["step"])
        return self.first_step.step - 1 if self.first_step else None

    @property
    def step_seconds(self) -> float | None:
        """Median seconds between two steps; None for fewer than two."""
        return median(self.gaps) if self.gaps else None

    def take(self, event: Mapping[str, Any]) -> None:
        """Add an event. Raises KeyError, TypeError or ValueError for one whose fields are not those of its kind."""
        when = float(event["time"])
        match event["event"]:
            case "step":
                self._step(Moment(int(event["step"]), when))
            case "start":
                self.start = event
            case "resume":
                int(event["step"])
                self.resume = event
            case "save":
                self.begun += 1
            case "skip":
                self.skipped += 1
            case "commit":
                self.commits.append(_commit(event, when))
            case "end" | "preempt" | "refuse" | "fenced":
                self.closing = event
        self.last_sign = max(when, self.last_sign or when)

    def _step(self, now: Moment) -> None:
        if self.last_step is not None and now.step == self.last_step.step + 1:
            self.gaps.append(now.time - self.last_step.time)
        self.first_step = self.first_step or now
        self.last_step = now
        self.closing = None  # a script may catch a refusal, and go on
        if self.trained % self._stride == 0:
            self.curve.append(now)
            if len(self.curve) == _POINTS:
                self.curve, self._stride = self.curve[::2], 2 * self._stride
        self.trained += 1


@dataclass(frozen=True)
class Traces:
    """All of a journal: the run's id, its attempts by number, and how many stale lines were passed over."""

    run_id: str | None
    of: Mapping[int, Trace]
    stale: int


def read_traces(run: Path) -> Traces:
    """Read the whole journal once: a million steps take about three seconds. Raises `CheckpointDamaged`."""
    lines, found, run_id = JournalLines(run, figures=False), dict[int, Trace](), None
    for event in lines:
        number = event["attempt"]
        trace = found.get(number)
        if trace is None:
            trace = found[number] = Trace(number)
        try:
            trace.take(event)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if run_id is None and event["event"] == "start" and isinstance(event.get("run_id"), str):
            run_id = event["run_id"]
    return Traces(run_id, dict(sorted(found.items())), lines.stale)


def _commit(event: Mapping[str, Any], when: float) -> Commit:
    seconds = event.get("seconds")
    seconds = seconds if isinstance(seconds, Mapping) else {}
    held_up = [float(seconds[phase]) for phase in ("gate", "capture") if phase in seconds]
    return Commit(
        step=int(event["step"]),
        time=when,
        attempt=int(event["attempt"]),
        bytes=int(event["bytes"]) if "bytes" in event else None,
        blocked=float(seconds["blocked"]) if "blocked" in seconds else sum(held_up) if held_up else None,
        durable=float(seconds["durable"]) if "durable" in seconds else None,
    )
