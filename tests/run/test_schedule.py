"""When to save: by steps, by rank 0's clock, and by what a save costs and how often machines fail."""

from __future__ import annotations

import pytest

from resume_kit.errors import UsageError
from resume_kit.recovery.intervals import best_interval
from resume_kit.run.schedule import Every, Pace, Schedule


class FakeClock:
    """Seconds, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("given", "every"),
    [
        (None, None),
        (20, Every(steps=20)),
        ("auto", Every()),
        ("90s", Every(seconds=90.0)),
        ("15m", Every(seconds=900.0)),
        ("1.5h", Every(seconds=5400.0)),
        ("15 m", Every(seconds=900.0)),
    ],
)
def test_what_can_be_meant(given: int | str | None, every: Every | None) -> None:
    assert Every.parse(given) == every


@pytest.mark.parametrize("given", [0, -5, True, "15", "15 minutes", "0m", "often", "", "-3m", 2.5])
def test_what_cannot(given: object) -> None:
    with pytest.raises(UsageError, match=r"give a number of steps, a time like"):
        Every.parse(given)  # type: ignore[arg-type]


def test_by_steps() -> None:
    schedule = Schedule(Every.parse(3), print)
    assert [step for step in range(1, 10) if schedule.due(step)] == [3, 6, 9]


def test_only_by_the_clock_a_save_that_was_not_begun_is_due_at_once_again() -> None:
    found = [Schedule(Every.parse(given), print).insists for given in (3, "1m", "auto", None)]
    assert found == [False, True, True, False]


def test_without_a_schedule_nothing_is_due() -> None:
    schedule = Schedule(None, print)
    assert not any(schedule.due(step) for step in range(1, 100))


def test_by_time_counted_from_the_begin_of_the_last_save() -> None:
    clock = FakeClock()
    schedule = Schedule(Every.parse("1m"), print, clock)
    schedule.start(0, None)
    found = []
    for step in range(1, 30):
        clock.now += 13.0
        if schedule.due(step):
            found.append(step)
            schedule.begun()
            clock.now += 5.0
    assert found == [5, 10, 15, 20, 25]


def test_time_before_the_resume_does_not_count() -> None:
    clock = FakeClock()
    schedule = Schedule(Every.parse("1m"), print, clock)
    clock.now += 500.0
    schedule.start(40, None)
    assert not schedule.due(41)
    clock.now += 61.0
    assert schedule.due(42)


# -- auto


def test_auto_learns_the_cost_early_and_then_takes_the_best_interval() -> None:
    clock, told = FakeClock(), list[str]()
    schedule = Schedule(Every.parse("auto"), told.append, clock)
    schedule.start(40, mtbf=36_000.0)
    assert next(step for step in range(41, 60) if schedule.due(step)) == 50
    schedule.begun()
    schedule.measured(cost=2.0, durable=30.0)
    best = best_interval(2.0, 36_000.0)
    assert 300 < best < 400
    clock.now += best - 1
    assert not schedule.due(51)
    clock.now += 2
    assert schedule.due(52)
    assert len(told) == 1 and "saves every 6 min" in told[0] and "2.00 s from training" in told[0]


def test_auto_never_saves_more_often_than_a_save_takes_nor_less_than_once_an_hour() -> None:
    clock = FakeClock()
    schedule = Schedule(Every.parse("auto"), lambda _: None, clock)
    schedule.start(0, mtbf=3600.0)
    schedule.begun()
    schedule.measured(cost=0.001, durable=100.0)
    clock.now += 99.0
    assert not schedule.due(11)
    clock.now += 2.0
    assert schedule.due(12)
    schedule.start(12, mtbf=1e9)
    schedule.measured(cost=50.0, durable=100.0)
    clock.now += 3601.0
    assert schedule.due(13)


def test_auto_tells_only_changes_that_matter() -> None:
    told = list[str]()
    schedule = Schedule(Every.parse("auto"), told.append)
    schedule.start(0, mtbf=36_000.0)
    for cost in (2.0, 2.1, 2.2, 8.0):
        schedule.measured(cost, 1.0)
    assert len(told) == 2


# -- what a save costs


def test_the_cost_of_a_save_is_what_blocks_and_what_slows() -> None:
    pace = Pace()
    for seconds in (1.0, 1.0, 1.1, 0.9):
        pace.stepped(seconds, saving=False)
    pace.blocked(0.2)
    for seconds in (1.5, 1.25, 0.8):
        pace.stepped(seconds, saving=True)
    assert pace.last == 0.8
    assert pace.take_cost() == pytest.approx(0.2 + 0.5 + 0.25)
    assert pace.take_cost() == 0.0
