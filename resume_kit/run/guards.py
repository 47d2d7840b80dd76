"""What watches over an attempt on each rank: signals, requests to stop, the watchdog, last words."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from resume_kit.recovery.exits import Exit
from resume_kit.run.attempt import Attempt
from resume_kit.run.last_words import LastWords
from resume_kit.run.stopping import Reasons, Stop, StopSignals
from resume_kit.run.watchdog import Watchdog


class Guards:
    """Made with the kit, closed at the end of the run. `hang_after`: see `Watchdog`."""

    #: Seconds after which a rank 0 that another attempt has superseded ends without a step boundary.
    LEAVE_AFTER = 30.0

    def __init__(self, attempt: Attempt, rank: int, hang_after: float | None) -> None:
        self.reasons = Reasons()
        self.words = LastWords(attempt, rank)
        self.watchdog = Watchdog(hang_after, self.words)
        self.signals = StopSignals(self.reasons, self.words.of_any)
        self._leaving: threading.Timer | None = None
        attempt.watch(on_stop=self._requested, on_superseded=self._superseded)

    def reached(self, step: int) -> None:
        """So many optimizer steps have been taken."""
        self.words.step = step

    def stand_down(self) -> None:
        """The run is over for this rank, but not its process: watch for hangs and newer attempts no more."""
        self.watchdog.off()
        if self._leaving is not None:
            self._leaving.cancel()

    def close(self) -> None:
        self.stand_down()
        self.signals.close()
        self.words.close()

    def _requested(self, request: Mapping[str, Any]) -> None:
        by, reason = request.get("by") or "somebody", request.get("reason") or "no reason given"
        self.reasons.add(Stop.REQUEST, f"{by}: {reason}")

    def _superseded(self, newer: int) -> None:
        """On rank 0: all ranks are told at the next boundary. Where none comes, since peers are gone, it ends alone."""
        self.reasons.add(Stop.SUPERSEDED, f"attempt {newer}")
        if self._leaving is None:
            self._leaving = threading.Timer(self.LEAVE_AFTER, self._leave, [newer])
            self._leaving.daemon = True
            self._leaving.start()

    def _leave(self, newer: int) -> None:
        text = f"attempt {newer} holds the run directory, and no step came to its end in {self.LEAVE_AFTER:g} s"
        with suppress(OSError, ValueError):
            print(f"resume_kit: {text}; this process ends", file=sys.stderr, flush=True)
        self.words.record(text, kind="fenced")
        os._exit(Exit.FENCED)
