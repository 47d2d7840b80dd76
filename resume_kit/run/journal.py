"""The run's append-only journal: one JSON object a line, read back bit for bit. No torch.

Every event has `event`, `attempt` and `time` (Unix seconds). Non-finite floats are the strings "NaN", "Infinity"
and "-Infinity". A last line that a crash cut off is ignored.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import files
from resume_kit.checkpoint.names import JOURNAL
from resume_kit.recovery.events import JournalLines

EVENTS = frozenset({"start", "resume", "refuse", "step", "save", "skip", "commit", "preempt", "fenced", "end"})
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Journal:
    """Appends events of one attempt. Only one rank of a run writes, from any of its threads.

    `fence` is called before each line, and raises once the attempt may write no more.
    """

    def __init__(self, run: Path, *, attempt: int, fence: Callable[[], None] = lambda: None) -> None:
        self._attempt = attempt
        self._fence = fence
        self._path = path = run / JOURNAL
        self._torn = _ends_within_a_line(path)
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def write(self, event: str, fields: Mapping[str, Any], *, durable: bool = False) -> None:
        """Append one event in one write; `durable` waits until it is on disk."""
        if event not in EVENTS:
            raise ValueError(f"unknown event {event!r}")
        record = {"event": event, "attempt": self._attempt, "time": time.time(), **fields}
        line = json.dumps(_plain(record), separators=(",", ":"), allow_nan=False)
        with self._lock:
            data = (b"\n" if self._torn else b"") + line.encode() + b"\n"
            self._fence()
            self._torn = True
            try:
                if os.write(self._descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._torn = False
            except OSError as error:
                raise files.write_failed(self._path, error, len(data)) from error
        try:
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            raise files.write_failed(self._path, error, len(data)) from error

    def close(self) -> None:
        os.close(self._descriptor)


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def number(value: Any) -> Any:
    """A journaled figure as a float again where it was not finite."""
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def read_journal(run: Path) -> Iterator[dict[str, Any]]:
    """All whole events of a run, oldest first, without stale ones (`JournalLines` counts them).

    Nothing for a run without a journal.

    A torn line is skipped (a crash cut it off). Raises `CheckpointDamaged` when the file cannot be read.
    """
    return (event for event in JournalLines(run) if event["event"] in EVENTS)


def last_commit(run: Path) -> int | None:
    """Step of the newest commit that the journal tells of; None for a run that never committed."""
    return max((int(event["step"]) for event in JournalLines(run, {"commit"})), default=None)


def last_attempt(run: Path) -> int:
    """Number of the newest attempt that wrote to the journal; 0 for a new run."""
    return max((int(record["attempt"]) for record in read_journal(run)), default=0)


def run_id_of(run: Path) -> str | None:
    """The run's id, from its first start event."""
    return next((record["run_id"] for record in read_journal(run) if record["event"] == "start"), None)
