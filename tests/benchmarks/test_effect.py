"""What saving costs a step, where the test knows the times of steps and saves: a fake clock, no process group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.suite import effect
from benchmarks.suite.effect import Effect
from benchmarks.suite.results import Row


class FakeTime:
    """The seconds that steps and saves take, and `Clock`'s calls on one rank."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def barrier(self) -> None: ...

    def synchronize(self) -> None: ...

    def attempt(self, work: Callable[[], object]) -> None:
        work()

    def slowest(self, seconds: Iterable[float]) -> list[float]:
        return [*seconds]


class Training:
    """Steps of one second; beside a save, which goes on for `lasts` steps, of `beside` seconds."""

    def __init__(self, time: FakeTime, *, lasts: int, beside: float) -> None:
        self._time, self._lasts, self._beside = time, lasts, beside
        self._left = self.taken = 0
        self.saved: list[int] = []

    def step(self) -> int:
        self.taken += 1
        self._time.now += self._beside if self._left else 1.0
        self._left = max(self._left - 1, 0)
        return self.taken

    def save(self, step: int) -> None:
        self.saved.append(step)
        self._left = self._lasts

    def wait(self) -> None:
        self._time.now += self._left
        self._left = 0


@pytest.mark.parametrize(
    ("lasts", "beside", "saved", "mean"),
    [
        (9, 1.1, [1, 11], (2 * (1 + 9 * 1.1)) / 20),  # all nine steps beside each save are in the phase
        (3, 1.1, [1, 11], (2 * (7 + 3 * 1.1)) / 20),
        (12, 1.0, [1, 11], (20 + 2 + 3) / 20),  # the wait before the next save, and the one behind the last step
        (0, 1.0, [1, 11], 1.0),
    ],
)
def test_what_a_save_costs_is_in_the_phase(
    lasts: int, beside: float, saved: list[int], mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Any = FakeTime()
    monkeypatch.setattr(effect, "time", clock)
    training = Training(clock, lasts=lasts, beside=beside)
    system: Any = SimpleNamespace(save=training.save, wait=training.wait)
    discarded: list[Any] = []
    plain, row = (Row("part", "label", "training", name) for name in ("no saves", "system"))
    Effect(clock, training.step, discarded.append, steps=20, every=10).take(plain, [system], [row])
    before = 1 + 20 + 1  # a step before each phase, and the phase without saves
    assert [step - before for step in training.saved] == saved
    assert plain.samples["mean step"] == [pytest.approx(1.0)]
    assert row.samples["mean step"] == [pytest.approx(mean)]
    assert (len(row.samples["step"]), discarded) == (20, [system])
