"""Following a run through its journal, and the instants at which it is killed."""

from __future__ import annotations

import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from launch.demo.judging import Event, Kill
from launch.demo.processes import Launched
from launch.demo.screen import Screen
from resume_kit.checkpoint.names import JOURNAL, MANIFEST, ground, step_directory
from resume_kit.run.journal import read_journal

STALL_SECONDS = 900.0


class Stalled(Exception):
    """The journal has not grown for a long time."""


class Tail:
    """The events of a run's journal, read again when the file has grown."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._size = -1
        self._events: list[Event] = []

    def events(self) -> list[Event]:
        try:
            size = (self.run / JOURNAL).stat().st_size
        except FileNotFoundError:
            return []
        if size != self._size:
            self._events, self._size = list(read_journal(self.run)), size
        return self._events


class Trap(Protocol):
    """Decides when to kill. `sprung` is asked again and again, and waits itself until the very instant."""

    aim: str
    missed: list[int]  # steps whose save was over before it could be hit

    def sprung(self, events: list[Event]) -> bool: ...


class StepTrap:
    """Kills within the step after step `after`."""

    def __init__(self, after: int, step_seconds: float, chance: random.Random) -> None:
        self.aim = f"within step {after + 1}"
        self.missed: list[int] = []
        self._after = after
        self._wait = step_seconds * chance.uniform(0.1, 0.8)

    def sprung(self, events: list[Event]) -> bool:
        if not events or events[-1]["event"] != "step" or events[-1]["step"] < self._after:
            return False
        time.sleep(max(events[-1]["time"] + self._wait - time.time(), 0.0))
        return True


class SaveTrap:
    """Kills while a save's staging directory stands and files are written into it, from step `first` on."""

    def __init__(self, run: Path, first: int, save_seconds: float, chance: random.Random) -> None:
        self.aim = f"while the checkpoint of step {first} is written"
        self.missed: list[int] = []
        self._run = run
        self._first = first
        self._wait = save_seconds * chance.uniform(0.0, 0.7)

    def sprung(self, events: list[Event]) -> bool:
        self.missed = [e["step"] for e in events if e["event"] == "commit" and e["step"] >= self._first]
        if not events or events[-1]["event"] != "save" or events[-1]["step"] < self._first:
            return False
        staging = ground(self._run, events[-1]["attempt"]) / step_directory(events[-1]["step"])
        if not _has_files(staging):
            return False
        begun = time.monotonic()
        while time.monotonic() < begun + self._wait:
            if not staging.is_dir():
                return False
            time.sleep(0.001)
        return True


def _has_files(folder: Path) -> bool:
    try:
        return any(True for _ in folder.iterdir())
    except FileNotFoundError:
        return False


def follow(launched: Launched, tail: Tail, screen: Screen, *, steps: int, trap: Trap | None = None) -> Kill | None:
    """Show the run's progress until it ends (None) or the trap springs (the kill). Raises `Stalled`."""
    begun = grown = noted = time.monotonic()
    first = seen = len(tail.events())
    while launched.exit_code is None:
        events = tail.events()
        now = time.monotonic()
        if len(events) > seen:
            seen, grown = len(events), now
            if events[-1]["event"] == "step" and now - noted > 1.0:
                launched.note_family()
                noted = now
        if trap is not None and trap.sprung(events[first:]):
            return _kill(launched, tail)
        screen.live(f"      {progress(events[first:], steps)}  {now - begun:.0f} s")
        if now - grown > STALL_SECONDS:
            raise Stalled(f"the journal has not grown for {STALL_SECONDS:.0f} s")
        time.sleep(0.001 if trap is not None and seen > first else 0.02)
    return None


def _kill(launched: Launched, tail: Tail) -> Kill:
    instant = time.time()
    processes = launched.kill()
    events = tail.events()
    last, attempt = events[-1], int(events[-1]["attempt"])
    last_step = next((event["step"] for event in reversed(events) if event["event"] == "step"), 0)
    seconds_in = max(instant - float(last["time"]), 0.0)
    if last["event"] == "save":
        staging = ground(tail.run, attempt) / step_directory(last["step"])
        committed = (tail.run / step_directory(last["step"]) / MANIFEST).is_file()
        if staging.is_dir() and not committed:
            torn = tuple((path.name, path.stat().st_size) for path in sorted(staging.iterdir()))
            return Kill(attempt, processes, last_step, seconds_in, last["step"], torn)
    return Kill(attempt, processes, last_step, seconds_in)


def progress(events: list[Event], steps: int) -> str:
    """One line for what a run is doing, from the events of this start."""
    kinds = [event["event"] for event in events]
    if not events:
        return "starting the ranks (imports)"
    if "step" not in kinds:
        return "building the engine, resuming and proving" if "resume" not in kinds else "proved; first step"
    step = next(event for event in reversed(events) if event["event"] == "step")
    saving = "  saving" if kinds[-1] == "save" else ""
    return f"step {step['step']:>{len(str(steps))}}/{steps}  loss {float(step['loss']):.4f}{saving}"


def step_seconds(events: list[Event]) -> float:
    """Median time from one step to the next, saves left out."""
    gaps = [b["time"] - a["time"] for a, b in pairwise(events) if a["event"] == b["event"] == "step"]
    return statistics.median(gaps) if gaps else 0.1


def save_seconds(events: list[Event]) -> float:
    """Median time from the first byte written into a save's staging directory to its commit."""
    times = [
        sum(event["seconds"].get(p, 0.0) for p in ("write", "commit")) for event in events if event["event"] == "commit"
    ]
    return statistics.median(times) if times else 0.0
