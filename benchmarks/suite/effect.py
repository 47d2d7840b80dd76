"""What saving costs a step: phases of training with and without saves, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from benchmarks.peers.peer import System
from benchmarks.suite.results import Row
from benchmarks.suite.timing import Clock, SystemFailed


class Effect:
    """Phases of `steps` steps; where a system saves, it does so after the first of every `every` of them.

    So the steps beside which a save is written are those of its own phase. A phase's `mean step` is its whole time by
    its steps, on the slowest rank, and holds the wait for a save that goes on behind the last step: in a run that goes
    on, the next save would wait for it. `step` are the single steps.
    """

    def __init__(
        self, clock: Clock, step: Callable[[], int], discard: Callable[[System], None], *, steps: int, every: int
    ) -> None:
        self._clock, self._step, self._discard = clock, step, discard
        self._steps, self._every = steps, every

    def take(self, plain: Row, systems: Sequence[System], rows: Sequence[Row]) -> None:
        """One phase without saves, then one with each system's."""
        self._phase(None, plain)
        for system, row in zip(systems, rows, strict=True):
            if row.failure:
                continue
            try:
                self._phase(system, row)
            except SystemFailed as failed:
                row.failure = str(failed)

    def _phase(self, system: System | None, row: Row) -> None:
        clock = self._clock
        single: list[float] = []
        whole: list[float] = []

        def train() -> None:
            start = before = time.perf_counter()
            for number in range(1, self._steps + 1):
                step = self._step()
                if system is not None and (number - 1) % self._every == 0:
                    system.wait()
                    system.save(step)
                now = time.perf_counter()
                single.append(now - before)
                before = now
            if system is not None:
                system.wait()
            clock.synchronize()
            whole.append((time.perf_counter() - start) / self._steps)

        self._step()  # what the phase before left to do, it does here
        clock.barrier()
        clock.attempt(train)
        if system is not None:
            self._discard(system)
        row.add({"mean step": clock.slowest(whole)[0]})
        for seconds in clock.slowest(single):
            row.add({"step": seconds})
