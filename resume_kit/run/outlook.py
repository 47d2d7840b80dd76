"""Whether a step boundary can still come, once a signal has asked for one. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from resume_kit.recovery.identity import Identity, is_dead
from resume_kit.run.last_words import LastWords
from resume_kit.run.watchdog import Watchdog


class RankOutlook:
    """What one rank knows: the last words of all, which processes of its host live, and how long its steps take.

    peers: all ranks' processes, by rank. A launcher sends SIGTERM also when a rank has died: then it is not the step
    that takes long, it never comes to its end, and under NCCL no error tells so.
    """

    #: Seconds without a sign of progress that SIGTERM leaves a rank at least.
    PATIENCE = 60.0
    #: The same in steps, of which the last counts, and the longest: an evaluation lies between two of them.
    STEPS, LONGEST = 5.0, 2.0
    #: Seconds that a process of this host has been gone before it counts as dead: one that has saved may end first.
    GONE_FOR = 10.0

    def __init__(self, words: LastWords, watchdog: Watchdog, peers: Mapping[int, Identity]) -> None:
        self._words, self._watchdog, self._peers = words, watchdog, peers
        self._gone_since: float | None = None
        self._waits = 0
        self._seen = -1
        self._quiet, self._looked = 0.0, time.monotonic()
        self._reached: float | None = None
        self.last_step = self._longest = 0.0

    def reached(self) -> None:
        """A step boundary has come."""
        now = time.monotonic()
        if self._reached is not None:
            self.last_step = now - self._reached
            self._longest = max(self._longest, self.last_step)
        self._reached = now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In a save or a resume: its waits have bounds of their own."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            self._watchdog.alive()

    def asked(self, name: str) -> None:
        self._words.asked(name)

    def hopeless(self) -> str:
        with suppress(Exception):  # whatever lies in the folder
            if said := self._words.of_any():
                return said
        gone = next((rank for rank, process in self._peers.items() if is_dead(process)), None)
        if gone is None:
            self._gone_since = None
            return ""
        now = time.monotonic()
        self._gone_since = now if self._gone_since is None else self._gone_since
        if now - self._gone_since < self.GONE_FOR:
            return ""
        return f"its peer, rank {gone} (process {self._peers[gone].pid} on this host), has died without a word"

    def overdue(self) -> str:
        now, signs = time.monotonic(), self._watchdog.signs
        if self._waits or signs != self._seen:
            self._seen, self._quiet = signs, 0.0
        else:
            self._quiet += min(now - self._looked, 2.0)  # a process that was stopped meanwhile has not been slow
        self._looked = now
        allowed = max(self.PATIENCE, self.STEPS * self.last_step, self.LONGEST * self._longest)
        if self._quiet <= allowed:
            return ""
        return f"no progress for {allowed:.0f} s after SIGTERM; a peer may be gone"

    def failed(self, why: str) -> None:
        self._words.record(why)
