"""Intervals: Daly's optimum and loss against each other and against runs that fail at random."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from resume_kit.recovery.history import history
from resume_kit.recovery.intervals import PRIOR_GPU_HOURS, best_interval, blended_mtbf, expected_loss
from tests.recovery.runs import attempt


def simulated_loss(interval: float, cost: float, mtbf: float, restart: float, *, segments: int, seed: int) -> float:
    """The fraction of time lost by a run with exponential failures, which hit restarts and saves too."""
    draw = random.Random(seed)
    wall, to_failure = 0.0, draw.expovariate(1 / mtbf)
    for _ in range(segments):
        todo = interval + cost
        while todo > 0:
            spent = min(todo, to_failure)
            wall, to_failure = wall + spent, to_failure - spent
            if to_failure > 0:
                todo -= spent
            else:  # back to the last checkpoint, after a restart
                to_failure = draw.expovariate(1 / mtbf)
                todo = restart + interval + cost
    return 1 - segments * interval / wall


@pytest.mark.parametrize(
    ("interval", "cost", "mtbf_seconds", "restart"),
    [(60, 2, 900, 30), (300, 30, 1000, 120), (20, 0, 3600, 0), (900, 5, 700, 60)],
)
def test_the_expected_loss_is_that_of_a_simulated_run(
    interval: float, cost: float, mtbf_seconds: float, restart: float
) -> None:
    simulated = simulated_loss(interval, cost, mtbf_seconds, restart, segments=30_000, seed=1)
    assert expected_loss(interval, cost, mtbf_seconds, restart) == pytest.approx(simulated, abs=0.01)


@pytest.mark.parametrize("cost", [0.01, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("mtbf_seconds", [1800.0, 10_000.0, 1e6])
def test_no_other_interval_loses_noticeably_less_than_the_best(cost: float, mtbf_seconds: float) -> None:
    best = best_interval(cost, mtbf_seconds)
    loss = expected_loss(best, cost, mtbf_seconds)
    others = [expected_loss(best * 1.02**n, cost, mtbf_seconds) for n in range(-150, 151)]
    assert loss <= min(others) * 1.001
    assert expected_loss(best / 2, cost, mtbf_seconds) > loss < expected_loss(best * 2, cost, mtbf_seconds)


def test_the_first_order_is_youngs() -> None:
    assert best_interval(1, 1e9) == pytest.approx(math.sqrt(2 * 1 * 1e9), rel=1e-3)


def test_the_ends_of_the_scale() -> None:
    assert best_interval(0, 100) == 0
    assert best_interval(200, 100) == best_interval(1e9, 100) == 100  # saves longer than the run lives: Daly's bound
    assert expected_loss(1e9, 1, 100) == 1.0
    assert expected_loss(1e-6, 0, 1e6) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("arguments", [(-1, 100), (1, 0), (math.nan, 1)])
def test_what_makes_no_sense_is_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no interval follows from cost"):
        best_interval(*arguments)


def test_the_prior_is_that_of_llama_3() -> None:
    assert round(PRIOR_GPU_HOURS) == 50_677
    assert blended_mtbf([], 16_384) == pytest.approx(54 * 86400 / 419)


def test_one_failure_is_weighed_against_the_prior(tmp_path: Path) -> None:
    written = attempt(tmp_path, 1)
    written.time += 3600
    written.words(0, "RuntimeError: x")
    assert blended_mtbf(history(tmp_path), 4) == pytest.approx((PRIOR_GPU_HOURS + 4) / (1 + 1) / 4 * 3600)


def test_a_run_that_fails_often_expects_more_failures(tmp_path: Path) -> None:
    """Three failures in 3 x 1 hour of 4 ranks; what was preempted adds its hours, and no failure."""
    for number in (1, 2, 3):
        written = attempt(tmp_path, number, at=number * 10_000)
        written.time += 3600
        written.words(0, "RuntimeError: x")
    preempted = attempt(tmp_path, 4, at=40_000)
    preempted.time += 7200
    preempted.ended("preempted", "SIGTERM")
    hours = 3 * 4 + 8
    assert blended_mtbf(history(tmp_path), 4) == pytest.approx(hours / (3 - 1) / 4 * 3600), (
        "not the prior's twelve thousand hours"
    )
    assert blended_mtbf(history(tmp_path), 8) == pytest.approx(blended_mtbf(history(tmp_path), 4) / 2)
