"""A run's sums, and the points that are kept of a long curve."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from resume_kit.recovery.account import Account
from resume_kit.recovery.history import read_story
from resume_kit.recovery.traces import Trace, read_traces
from tests.recovery.runs import BATCH, START, attempt


def test_the_sums_of_a_run(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(34).ended("failed", "x")
    attempt(tmp_path, 2, at=100, ranks=2).resume(30).train(50).ended("finished")
    account = Account.of(read_story(tmp_path))
    assert account.wall == 100 + 40
    assert account.productive == 2 * 50
    assert account.goodput == pytest.approx(100 / 140)
    assert (account.lost_steps, account.lost_samples, account.failures) == (4, 4 * BATCH, 1)
    assert account.gpu_hours == pytest.approx((4 * 68 + 2 * 40) / 3600)
    assert (account.step, account.save_interval, account.save_interval_steps) == (2, 20, 10)
    assert account.save_blocked == pytest.approx(0.4) and account.save_durable == 1.0
    assert account.restart == 100 + 2 - 68
    assert Account.of(read_story(tmp_path), until=START + 200).goodput == pytest.approx(100 / 200)


def test_saves_before_a_stop_do_not_shorten_the_interval(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(23).commit(23).ended("preempted")
    assert Account.of(read_story(tmp_path)).save_interval_steps == 10


def test_what_the_run_has_not_shown_is_none(tmp_path: Path) -> None:
    attempt(tmp_path, 1, folder=False)
    account = Account.of(read_story(tmp_path))
    assert (account.step, account.save_interval, account.save_blocked, account.restart) == (None,) * 4
    assert account.goodput is None and account.wall == 0


def test_a_batch_size_that_nobody_told_leaves_the_samples_unknown(tmp_path: Path) -> None:
    attempt(tmp_path, 1, global_batch_size=None).train(13).ended("failed", "x")
    account = Account.of(read_story(tmp_path))
    assert (account.lost_steps, account.lost_samples) == (3, None)


def test_of_a_long_curve_points_are_kept_evenly(tmp_path: Path) -> None:
    trace = Trace(1)
    for step in range(1, 10_001):
        trace.take({"event": "step", "attempt": 1, "time": float(step), "step": step})
    steps = [moment.step for moment in trace.curve]
    assert 500 <= len(steps) <= 1000 and steps[0] == 1
    assert {b - a for a, b in pairwise(steps)} == {16}
    assert trace.trained == 10_000 and trace.step_seconds == 1.0
    assert read_traces(tmp_path).of == {}
