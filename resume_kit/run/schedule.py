"""When to save: every so many steps, every so many seconds, or as often as failures and the cost of a save call for.

Decided on rank 0, by its clock; the other ranks hear of it in the step's exchange. No torch.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from resume_kit.errors import UsageError
from resume_kit.recovery.intervals import best_interval

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """How often to save: `steps`, or `seconds`; "auto" where it says neither."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, given: int | str | None) -> Every | None:
        """From 20 (steps), "90s", "15m", "1.5h" (wall time), "auto", or None (never). Raises `UsageError`."""
        if given is None:
            return None
        if given == "auto":
            return cls()
        if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
            return cls(steps=given)
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([smh])", given) if isinstance(given, str) else None
        if match and float(match[1]) > 0:
            return cls(seconds=float(match[1]) * _UNITS[match[2]])
        raise UsageError(
            f'save_every is {given!r}; give a number of steps, a time like "90s", "15m" or "2h", or "auto"'
        )


class Pace:
    """How long steps take, alone and beside a save, on this rank; and from that what a save takes from training."""

    def __init__(self) -> None:
        self.last = 0.0
        self._alone: deque[float] = deque(maxlen=50)
        self._cost = 0.0

    def stepped(self, seconds: float, *, saving: bool) -> None:
        """A step took this long; `saving`: a save was under way beside it."""
        self.last = seconds
        if not saving:
            self._alone.append(seconds)
        elif self._alone:
            self._cost += max(0.0, seconds - statistics.median(self._alone))

    def blocked(self, seconds: float) -> None:
        """A save held training up between two steps."""
        self._cost += seconds

    def take_cost(self) -> float:
        """Seconds that the save that has just ended took from training."""
        cost, self._cost = self._cost, 0.0
        return cost


class Schedule:
    """Says on rank 0 whether to save. `clock` is monotonic, in seconds; `say` tells people what "auto" chose."""

    #: Steps before the first save of "auto": its cost is not known before, and that saving works is learnt soon.
    FIRST = 10
    #: Longest interval of "auto", in seconds: no estimate of how often a machine fails is trusted with more work.
    LONGEST = 3600.0
    #: A change of the interval that is told.
    _TOLD = 0.2

    def __init__(
        self, every: Every | None, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._say, self._clock = every, say, clock
        self._interval = every.seconds if every else None
        self._told: float | None = None
        self.start(0, mtbf=None)

    @property
    def auto(self) -> bool:
        return self._every == Every()

    @property
    def insists(self) -> bool:
        """Whether a save that is due and not begun is due again at the next step: by the clock."""
        return self._every is not None and not self._every.steps

    def start(self, step: int, mtbf: float | None) -> None:
        """Training goes on after `step`; `mtbf`: seconds between failures to expect, for "auto"."""
        self._first, self._mtbf = step + self.FIRST, mtbf
        self._last = self._clock()

    def due(self, step: int) -> bool:
        if self._every is None:
            return False
        if self._every.steps:
            return step % self._every.steps == 0
        if self._interval is None:
            return step >= self._first
        return self._clock() - self._last >= self._interval

    def begun(self) -> None:
        """A save begins: the time to the next counts from here."""
        self._last = self._clock()
        if self._interval is None:
            self._interval = self.LONGEST  # of "auto", until it is measured

    def measured(self, cost: float, durable: float) -> None:
        """A save took `cost` seconds from training, and was durable after `durable` seconds."""
        if not self.auto or self._mtbf is None:
            return
        best = min(best_interval(cost, self._mtbf), self.LONGEST)
        self._interval = max(best, durable)
        if self._told is None or abs(self._interval - self._told) > self._TOLD * self._told:
            self._told = self._interval
            self._say(
                f"saves every {_time(self._interval)}: one takes {cost:.2f} s from training and {durable:.1f} s to be"
                f" durable, a failure is expected every {_time(self._mtbf)}"
            )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
