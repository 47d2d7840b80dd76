"""Ends a rank that makes no progress, with its stacks, instead of a job that burns its hours in silence. No torch."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from resume_kit.errors import UsageError
from resume_kit.recovery.exits import Exit
from resume_kit.run.ending import end_process
from resume_kit.run.last_words import LastWords


class Watchdog:
    """Bounds the time between two signs of progress, in seconds; None watches nothing.

    A thread looks at the time that passed while it ran itself, so a process that was stopped (SIGSTOP, a job that
    SLURM suspends) is not taken for hung. While some call keeps the interpreter's lock no Python thread runs: then a
    thread of faulthandler, in C, ends the process `SLACK` seconds after the bound. It can leave nothing but the stacks,
    exits with 1, and does count time in which the process was stopped: so `SLACK` is longer than a job is suspended
    for, as a rule. The other ranks' watchdogs, which miss this one, do not wait for it. There is one such timer in a
    process: whoever else calls `faulthandler.dump_traceback_later` takes it.
    """

    SLACK = 6 * 3600.0

    def __init__(self, bound: float | None, words: LastWords) -> None:
        if bound is not None and not bound > 0:
            raise UsageError(f"hang_after is {bound}; give seconds, or leave it out")
        self._words = words
        self._bound = self._allowed = bound
        self._signs = 0
        self._sign: Callable[[], object] = lambda: None
        self._place = ""
        self._off: threading.Event | None = None
        self._stacks: TextIO | None = None

    def arm(self) -> None:
        """Watch from now on; again after `off` too."""
        if self._bound is None or self._off is not None:
            return
        with suppress(OSError):  # a disk that is full must not keep a run from being watched
            self._stacks = self._words.stacks.open("w")
        self._off = threading.Event()
        threading.Thread(target=self._watch, args=(self._off,), name="watchdog", daemon=True).start()

    @property
    def signs(self) -> int:
        """How many signs of progress there have been."""
        return self._signs

    def alive(self) -> None:
        """A sign of progress. Costs nothing."""
        self._signs += 1

    @contextmanager
    def within(self, place: str, *, sign: Callable[[], object] | None = None, more: float = 0.0) -> Iterator[None]:
        """Say where the kit is. What `sign` returns changes with progress; `more`: seconds beyond the bound."""
        before = self._place, self._sign, self._allowed
        self._place, self._sign = place, sign or self._sign
        if self._bound is not None:
            self._allowed = self._bound + more
        self.alive()
        try:
            yield
        finally:
            self._place, self._sign, self._allowed = before
            self.alive()

    def off(self) -> None:
        """Watch no longer."""
        if self._off is None:
            return
        self._off.set()
        self._off = None
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            self._stacks = None
            with suppress(OSError):
                self._words.stacks.unlink()

    def _watch(self, off: threading.Event) -> None:
        assert self._bound is not None
        tick = min(1.0, self._bound / 10)
        seen, passed, looked = self._seen(), 0.0, time.monotonic()
        while not off.wait(tick):
            now, found = time.monotonic(), self._seen()
            passed = 0.0 if found != seen else passed + min(now - looked, 2 * tick)
            seen, looked = found, now
            allowed = self._allowed or self._bound
            if passed > allowed:
                self._end(allowed)
            left = allowed - passed + self.SLACK
            faulthandler.dump_traceback_later(left, exit=True, file=self._stacks or sys.__stderr__ or 2)
        faulthandler.cancel_dump_traceback_later()

    def _seen(self) -> tuple[int, object]:
        return self._signs, self._sign()

    def _end(self, allowed: float) -> None:
        step = self._words.step
        place = self._place or f"in the training code since step {step}"
        text = f"no progress for {allowed:g} s, {place}"
        end_process(
            Exit.HUNG,
            f"\nERROR: rank {self._words.rank} hangs: {text}\n"
            f"    → stacks of its threads: {self._words.stacks}\n"
            f"    → it ends now with exit code {int(Exit.HUNG)}; the last commit stands\n"
            "    → if nothing was wrong, raise hang_after, or call kit.alive() in loops that do not call step()",
            lambda: self._write(text, step),
        )

    def _write(self, text: str, step: int) -> None:
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(self._stacks or 2, all_threads=True)
        self._words.record(text, kind="hung", step=step)
