"""The journal's lines, one at a time, however long it is. No torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resume_kit.checkpoint.names import JOURNAL
from resume_kit.errors import CheckpointDamaged, Problem

#: Bytes at the journal's end that tell of the newest attempt.
_TAIL = 1 << 18

_IS_STEP = b'{"event":"step",'
#: A step's line, whole, as the journal writes it: attempt, time and step, then its figures.
_STEP = re.compile(_IS_STEP + rb'"attempt":(\d+),"time":(\d+\.\d+),"step":(\d+),[^{}\n]*\}\n')


@dataclass
class JournalLines:
    """Iterates over a run's events, oldest first, each with `event`, `attempt` (int) and `time` (Unix seconds).

    only: kinds of events that are wanted, and `start`; all others are passed over unread.
    steps_after: steps up to this one are passed over too. figures: without, of a step only attempt, time and number are
    read, which takes half the time.

    What a crash tore and what others wrote is passed over. So are stale lines, those that an attempt wrote after the
    start of a newer one. `stale` counts them, of the kinds that are wanted; and, where all are, `unreadable` the lines
    that are no JSON, besides those that a crash may cut off: each attempt's last.
    Raises `CheckpointDamaged` when the file cannot be read.
    """

    run: Path
    only: Collection[str] | None = None
    steps_after: int = -1
    figures: bool = True
    stale: int = field(default=0, init=False)
    unreadable: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.stale, self.unreadable, newest, torn = 0, 0, 0, False
        wanted = None if self.only is None else [f'"{kind}"'.encode() for kind in ("start", *self.only)]
        steps = self.only is None or "step" in self.only
        record: Any
        for line in _lines(self.run):
            if line.startswith(_IS_STEP):
                record = self._step(line) if steps else None
                if record is None:
                    if torn:
                        self.unreadable, torn = self.unreadable + 1, False
                    continue
            elif wanted is not None and not any(kind in line for kind in wanted):
                continue
            else:
                record = _parsed(line)
            if record is _TORN:
                self.unreadable += torn
                torn = True
            if record is _TORN or line == b"\n":
                continue
            if torn:
                self.unreadable += not (isinstance(record, dict) and record.get("event") == "start")
                torn = False
            if not _is_event(record):
                continue
            if record["event"] == "start":
                newest = max(newest, record["attempt"])
            if record["attempt"] < newest:
                self.stale += 1
            elif self.only is None or record["event"] in self.only:
                yield record

    def _step(self, line: bytes) -> Any:
        """What the line of a step says, as far as it is wanted; None where it is not."""
        if (self.figures and self.steps_after < 0) or not (found := _STEP.fullmatch(line)):
            return _parsed(line)
        attempt, when, step = found.groups()
        if int(step) <= self.steps_after:
            return None
        if self.figures:
            return _parsed(line)
        return {"event": "step", "attempt": int(attempt), "time": float(when), "step": int(step)}


def last_number(run: Path) -> int:
    """The newest attempt that the journal tells of, from its last lines; 0 for none. Raises `CheckpointDamaged`."""
    found = [record["attempt"] for line in _lines(run, tail=_TAIL) if _is_event(record := _parsed(line))]
    return max(found or [event["attempt"] for event in JournalLines(run, {"start"})], default=0)


def _lines(run: Path, tail: int | None = None) -> Iterator[bytes]:
    """The journal's lines; those in its last `tail` bytes. None for a run without one."""
    try:
        with (run / JOURNAL).open("rb") as file:
            if tail is not None:
                file.seek(-min(tail, file.seek(0, os.SEEK_END)), os.SEEK_END)
            yield from file
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        problem = Problem("journal", str(run / JOURNAL), what, "check permissions")
        raise CheckpointDamaged("the journal cannot be read", [problem]) from error


_TORN = object()


def _parsed(line: bytes) -> Any:
    """What the line says; `_TORN` for one that is no JSON."""
    try:
        return json.loads(line) if line != b"\n" else None
    except (ValueError, RecursionError):
        return _TORN


def _is_event(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("event"), str)
        and type(record.get("attempt")) is int
        and isinstance(record.get("time"), float | int)
        and abs(record["time"]) < math.inf
    )
