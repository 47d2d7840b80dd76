"""The journal's lines, one at a time, however long it is. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resume_kit.checkpoint.names import JOURNAL
from resume_kit.errors import CheckpointDamaged, Problem


@dataclass
class JournalLines:
    """Iterates over a run's events, oldest first, each with `event`, `attempt` (int) and `time` (Unix seconds).

    What a crash tore and what others wrote is passed over. So are stale lines, those that an attempt wrote after the
    start of a newer one; `stale` counts them. Raises `CheckpointDamaged` when the file cannot be read.
    """

    run: Path
    stale: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.stale, newest = 0, 0
        try:
            with (self.run / JOURNAL).open("rb") as file:
                for line in file:
                    event = _event(line)
                    if event is None:
                        continue
                    if event["event"] == "start":
                        newest = max(newest, event["attempt"])
                    if event["attempt"] < newest:
                        self.stale += 1
                    else:
                        yield event
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            problem = Problem("journal", str(self.run / JOURNAL), what, "check permissions")
            raise CheckpointDamaged("the journal cannot be read", [problem]) from error


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = (
        isinstance(record, dict)
        and isinstance(record.get("event"), str)
        and type(record.get("attempt")) is int
        and isinstance(record.get("time"), float | int)
        and math.isfinite(record["time"])
    )
    return record if whole else None
