"""What all ranks agree on between two optimizer steps, beside the step's figures: to stop, or to save."""

from __future__ import annotations

import time
from collections.abc import Callable

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import Fenced
from resume_kit.recovery.exits import Exit
from resume_kit.run.attempt import Attempt
from resume_kit.run.guards import Guards
from resume_kit.run.saves import Saves
from resume_kit.run.schedule import Every, Pace, Schedule
from resume_kit.run.stopping import Agreed, Deadline, Preempted, Stop, Wish, agree


class Boundary:
    """`every`: when to save. `mtbf`: seconds between failures to expect of this job, for "auto".

    Every rank calls `wish`, exchanges it, and calls `passed` with what was agreed.
    """

    def __init__(
        self,
        attempt: Attempt,
        coordinator: Coordinator,
        saves: Saves,
        guards: Guards,
        *,
        every: Every | None,
        deadline: Deadline | None,
        mtbf: float,
        show: Callable[[str], None],
    ) -> None:
        self._attempt, self._coordinator, self._saves, self._guards = attempt, coordinator, saves, guards
        self._first = coordinator.rank == 0
        self._show = show
        self._deadline = deadline if self._first else None
        self._mtbf = mtbf
        self._schedule = Schedule(every, self._say)
        self._pace = Pace()
        self._last = saves.last
        self._left = time.monotonic()

    def begin(self, step: int) -> None:
        """Training goes on after `step`. Raises `Preempted` where a stop came before the first step."""
        if self._guards.signals.note:
            self._say(f"warning: {self._guards.signals.note}")
        self._guards.reached(step)
        self._schedule.start(step, self._mtbf if self._schedule.auto else None)
        wishes = self._coordinator.gather("stop", self._reasons)
        agreed = agree([Wish(Stop(int(stop)), age) for stop, age in wishes])
        if agreed.stop:
            self._stop(step, agreed, save=False)
        self._left = time.monotonic()

    def wish(self, step: int) -> Wish:
        """What this rank has to say at the boundary after `step`."""
        self._guards.reached(step)
        now = time.monotonic()
        self._pace.stepped(now - self._left, saving=self._saves.busy)
        durable = self._last.seconds["durable"] if self._last else None
        if self._deadline and self._deadline.near(time.time(), self._pace.last, durable):
            self._guards.reasons.add(Stop.DEADLINE)
        if isinstance(self._attempt.failure, Fenced):
            self._guards.reasons.add(Stop.SUPERSEDED)
        return Wish(*self._guards.reasons.gravest, self._schedule.due(step))

    def passed(self, step: int, agreed: Agreed) -> None:
        """Stop, or save, or neither. Raises `Preempted`, `Fenced`, or a save's failure, alike on all ranks."""
        began, saving = time.monotonic(), self._saves.busy
        if self._saves.last is not None and self._saves.last is not self._last:
            self._last = self._saves.last
            self._schedule.measured(self._pace.take_cost(), self._last.seconds["durable"])
        if agreed.stop:
            self._stop(step, agreed, save=True)
        if agreed.save:
            self._saves.scheduled(step, self._schedule.begun, insists=self._schedule.insists)
        self._left = time.monotonic()
        if saving or agreed.save:
            self._pace.blocked(self._left - began)

    def _stop(self, step: int, agreed: Agreed, *, save: bool) -> None:
        if agreed.stop is Stop.SUPERSEDED:
            self._guards.over(Exit.FENCED)
            self._coordinator.on_rank_zero("superseded", self._require)
        began = time.monotonic()
        by = self._coordinator.on_rank_zero("why it stops", lambda: self._guards.reasons.describe(agreed))
        if save:
            self._saves.settle()  # one that failed does not keep the last from being tried
            self._saves.now("committed")
        seconds = agreed.age + time.monotonic() - began
        self._attempt.record("preempt", {"step": step, "by": by, "seconds": seconds})
        self._attempt.ended("preempted", step=step, by=by)
        done = f"step {step} is saved, {seconds:.1f} s after it came" if save else "no step was trained"
        self._say(f"stopped by {by}: {done}. Start the same command again to go on")
        self._saves.close()
        self._guards.stand_down()
        self._coordinator.depart()
        stop = Preempted(step, by)
        self._guards.over(stop.status)
        raise stop

    def _require(self) -> None:
        if self._attempt.token is not None:
            self._attempt.token.require()

    def _reasons(self) -> list[float]:
        stop, age = self._guards.reasons.gravest
        return [float(stop), age]

    def _say(self, text: str) -> None:
        if self._first:
            self._show(text)
