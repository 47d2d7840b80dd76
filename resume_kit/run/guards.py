"""What watches over an attempt on each rank: signals, requests to stop, the watchdog, last words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from resume_kit.engines.coordination import Coordinator
from resume_kit.recovery.exits import Exit
from resume_kit.recovery.identity import Identity
from resume_kit.run.attempt import Attempt
from resume_kit.run.ending import end_process
from resume_kit.run.last_words import LastWords
from resume_kit.run.outlook import RankOutlook
from resume_kit.run.stopping import Reasons, Stop, StopSignals
from resume_kit.run.watchdog import Watchdog


class Guards:
    """Made with the kit, closed at the end of the run. `hang_after`: see `Watchdog`. Making them is collective."""

    #: Seconds, and steps, after which a rank 0 that another attempt has superseded ends without a step boundary.
    LEAVE_AFTER, LEAVE_AFTER_STEPS = 30.0, 3.0

    def __init__(self, attempt: Attempt, coordinator: Coordinator, hang_after: float | None) -> None:
        self.reasons = Reasons()
        self.words = LastWords(attempt, coordinator.rank)
        self.watchdog = Watchdog(hang_after, self.words)
        processes = coordinator.gather("processes", lambda: Identity.of_this_process().to_json())
        peers = {rank: Identity.from_json(process) for rank, process in enumerate(processes)}
        self._outlook = RankOutlook(self.words, self.watchdog, peers)
        self.signals = StopSignals(self.reasons, self._outlook)
        self._timeout = coordinator.timeout
        self._leaving: threading.Timer | None = None
        attempt.watch(on_stop=self._requested, on_superseded=self._superseded)

    def reached(self, step: int) -> None:
        """So many optimizer steps have been taken, and training goes on."""
        self.words.step, self.words.training = step, True
        self._outlook.reached()

    @contextmanager
    def waiting(self, place: str, sign: Callable[[], object] | None = None) -> Iterator[None]:
        """What the kit waits for itself has bounds of its own, of up to twice the timeout."""
        with self.watchdog.within(place, sign=sign, more=2 * self._timeout), self._outlook.waiting():
            yield

    def stand_down(self) -> None:
        """The run is over for this rank, but not its process: watch for hangs and newer attempts no more."""
        self.watchdog.off()
        if self._leaving is not None:
            self._leaving.cancel()

    def over(self, code: int) -> None:
        """Nothing is left to do but to end, with `code`. See `StopSignals.over`."""
        self.stand_down()
        self.signals.over(code)

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
            seconds = max(self.LEAVE_AFTER, self.LEAVE_AFTER_STEPS * self._outlook.last_step)
            self._leaving = threading.Timer(seconds, self._leave, [newer, seconds])
            self._leaving.daemon = True
            self._leaving.start()

    def _leave(self, newer: int, seconds: float) -> None:
        text = f"attempt {newer} holds the run directory, and no step came to its end in {seconds:.0f} s"
        end_process(
            Exit.FENCED,
            f"resume_kit: {text}; this process ends",
            lambda: self.words.record(text, kind="fenced"),
        )
