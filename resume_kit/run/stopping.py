"""Why a run stops at a step boundary: a signal, a request, the deadline, a newer attempt. No torch.

A signal, wherever it comes, only leaves a note. At the next boundary the ranks tell each other in the step's own
exchange, so that all of them save and end at the same step, or none.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any, Protocol

from resume_kit.environment import deadline, under_torchrun
from resume_kit.errors import Problem, UsageError
from resume_kit.recovery.exits import Exit
from resume_kit.run.ending import end_process


class Stop(IntEnum):
    """Why to stop, as it travels in the exchange; the highest of all ranks counts."""

    NO = 0
    DEADLINE = 1
    REQUEST = 2
    SIGUSR2 = 3
    SIGUSR1 = 4
    SIGTERM = 5
    SUPERSEDED = 6


class Preempted(SystemExit):
    """The run is saved and stops here, on all ranks at the same step; start it again and it goes on.

    As a SystemExit it ends a script that knows nothing of it: `finally` blocks run, and the exit code is 75. Under
    torchrun it is 0, since torchrun would start the ranks again.
    """

    def __init__(self, step: int, by: str) -> None:
        self.status = int(Exit.FINISHED if under_torchrun() else Exit.PREEMPTED)
        super().__init__(self.status)
        self.step, self.by = step, by


@dataclass(frozen=True)
class Wish:
    """What a rank adds to a step's exchange: why to stop, since how many seconds, and whether to save now."""

    stop: Stop = Stop.NO
    age: float = 0.0
    save: bool = False


@dataclass(frozen=True)
class Agreed:
    """What all ranks do at this boundary. `rank` is the first that wished to stop."""

    stop: Stop = Stop.NO
    age: float = 0.0
    save: bool = False
    rank: int = 0


def agree(wishes: Sequence[Wish]) -> Agreed:
    """Any rank's wish to stop counts, the gravest first; when to save is rank 0's word."""
    stop = max(wish.stop for wish in wishes)
    with_it = [(rank, wish.age) for rank, wish in enumerate(wishes) if wish.stop == stop]
    return Agreed(stop, max(age for _, age in with_it), wishes[0].save, with_it[0][0])


@dataclass(frozen=True)
class Deadline:
    """`at` (Unix seconds): when this process will be ended. A stop comes early enough for one more step and a save."""

    at: float

    #: Durations of a save to keep free: one may be under way, and the last is still to come.
    SAVES = 2.0
    #: Seconds to allow for a save that has not been measured.
    UNMEASURED = 60.0

    @classmethod
    def of(cls, given: float | None) -> Deadline | None:
        """The one given, else the environment's, if any. Raises `UsageError` for one that has passed."""
        at = deadline() if given is None else given
        if at is None or math.isinf(at):
            return None
        if at <= time.time():
            ago = time.time() - at
            remedy = "give a later one, or run.deadline=.inf for none, see also RESUME_KIT_DEADLINE, SLURM_JOB_END_TIME"
            raise UsageError(
                "no time is left to train", [Problem("deadline", "", f"it passed {ago:.0f} s ago", remedy)]
            )
        return cls(at)

    def near(self, now: float, step_seconds: float, save_seconds: float | None) -> bool:
        save = self.UNMEASURED if save_seconds is None else save_seconds
        return now + step_seconds + self.SAVES * save >= self.at


class Reasons:
    """The reasons to stop that have come to this rank, from any thread. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given: list[tuple[Stop, float, str]] = []

    def add(self, stop: Stop, text: str = "") -> None:
        """The first of a kind counts."""
        if all(stop != known for known, _, _ in list(self._given)):
            self._given.append((stop, self._clock(), text))

    @property
    def gravest(self) -> tuple[Stop, float]:
        """Why to stop, and since how many seconds."""
        stop, at = max(((stop, at) for stop, at, _ in list(self._given)), default=(Stop.NO, self._clock()))
        return stop, self._clock() - at

    def describe(self, agreed: Agreed) -> str:
        """What was agreed, for people; on the rank that wished it, with what it was told."""
        text = next((text for stop, _, text in list(self._given) if stop == agreed.stop), "")
        by = agreed.stop.name if agreed.stop >= Stop.SIGUSR2 else agreed.stop.name.lower()
        by += f" on rank {agreed.rank}" if by.startswith("SIG") else ""
        return f"{by}: {text}" if text else by


class Outlook(Protocol):
    """What a rank knows of whether a step boundary will come."""

    def asked(self, name: str) -> None:
        """The first signal has come. In a thread of its own: it may write."""

    def hopeless(self) -> str:
        """Why none will come, if that is known. Asked every second after the first signal; it may read files."""

    def overdue(self) -> str:
        """Why none is to be waited for any longer after SIGTERM, if so. Without files: they may be what hangs."""

    def failed(self, why: str) -> None:
        """The process ends over this."""


class StopSignals:
    """Takes SIGTERM, SIGUSR1 and SIGUSR2 as reasons to stop. For the main thread; elsewhere `note` says so.

    A second one, more than `GAP` seconds after the first, ends the process at once: within that time it is the same,
    passed on by a launcher and by the scheduler. A thread of its own reads them, so that this holds also while the
    main thread waits in a collective, where Python runs no handler.
    After the first, the process also ends when the outlook is that no boundary will come: this rank or another has
    failed or died, and what is left of it only waits, while its launcher wants to start anew.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    GAP = 3.0
    #: Seconds that a process may take to end once its run is over.
    EXIT_WITHIN = 120.0
    _POLL = 1.0

    def __init__(self, reasons: Reasons, outlook: Outlook) -> None:
        self._reasons, self._outlook = reasons, outlook
        self._previous: dict[signal.Signals, Any] = {}
        self._closed = threading.Event()
        self._code: int | None = None
        self._bound: threading.Timer | None = None
        self.note = ""
        if threading.current_thread() is not threading.main_thread():
            self.note = "the kit was not made in the main thread: signals do not save the run, they end it"
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _leave_it_to_the_thread) for number in self.SIGNALS}
        os.register_at_fork(after_in_child=self._in_child)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def over(self, code: int) -> None:
        """The run has ended, the process is about to, with `code`: any signal ends it at once, and so does time."""
        self._code = code
        if self._bound is None:
            text = f"resume_kit: the run is over, but not its process after {self.EXIT_WITHIN:g} s; it ends now"
            self._bound = threading.Timer(self.EXIT_WITHIN, end_process, [code, text])
            self._bound.daemon = True
            self._bound.start()

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        self._closed.set()
        if self._bound is not None:
            self._bound.cancel()
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)

    def _listen(self) -> None:
        try:
            self._serve()
        except Exception:
            traceback.print_exc()
            # signal.signal is for the main thread, which may wait in a collective; a signal that nobody reads must kill
            for number in self.SIGNALS:
                ctypes.CDLL(None).signal(int(number), None)

    def _serve(self) -> None:
        poll = select.poll()  # select() takes no descriptor beyond 1,023, and a mesh of 1,000 ranks has more
        poll.register(self._reader, select.POLLIN)
        first: tuple[int, float] | None = None
        while True:
            ready = poll.poll(None if first is None else 1000 * self._POLL)
            waited = first is not None and first[0] == signal.SIGTERM and self._code is None
            if waited and (why := self._outlook.overdue()):
                self._despair(why)
            if not ready:
                continue
            byte = os.read(self._reader, 1)
            if not byte:
                break
            if byte[0] not in self.SIGNALS:
                continue
            name, now = signal.Signals(byte[0]).name, time.monotonic()
            if first is not None and now - first[1] <= self.GAP:
                continue
            if self._code is not None:
                end_process(self._code, f"resume_kit: {name}: the run is over, its process ends at once")
            if first is not None:
                text = f"resume_kit: {name}, the second signal: ended at once; the last commit stands"
                end_process(128 + byte[0], text)
            first = byte[0], now
            self._reasons.add(Stop[name])
            threading.Thread(target=self._outlook.asked, args=(name,), daemon=True).start()
            threading.Thread(target=self._look, name="outlook", daemon=True).start()
        os.close(self._reader)

    def _look(self) -> None:
        while not self._closed.wait(self._POLL):
            if self._code is None and (why := self._outlook.hopeless()):
                self._despair(why)

    def _despair(self, why: str) -> None:
        text = f"resume_kit: stopped by a signal; no step will come to its end: {why}"
        end_process(Exit.FAILED, text, lambda: self._outlook.failed(why))

    def _in_child(self) -> None:
        """A data worker tells nobody, dies of SIGTERM as ever, and lives on when the whole job gets SIGUSR1."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._previous[signal.SIGTERM])


def _leave_it_to_the_thread(_number: int, _frame: FrameType | None) -> None:
    """The interpreter has written the number into the pipe."""
