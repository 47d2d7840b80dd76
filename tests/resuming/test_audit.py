"""The replay audit: a step that was trained before must come out as the journal has it."""

from __future__ import annotations

from typing import Any

import pytest

from resume_kit.errors import ReplayMismatch
from resume_kit.resuming.audit import ReplayAudit

NAN, INF = float("nan"), float("inf")
STEP: dict[str, Any] = {"step": 7, "batch": "8a3f", "samples": 56, "loss": 2.5, "grad_norm": 1.25, "lr": 0.003}


def audit(tolerance: str = "exact", *, stop: bool = True, **recorded: Any) -> ReplayAudit:
    return ReplayAudit({7: {**STEP, **recorded}}, tolerance, stop)


def test_a_step_that_comes_out_as_before_passes_and_counts() -> None:
    replay = audit()
    assert replay.compare(STEP) == [] and replay.checked == 1
    assert replay.compare(dict(STEP)) == [] and replay.checked == 2


def test_a_new_step_is_not_compared() -> None:
    replay = audit()
    assert replay.compare({**STEP, "step": 8, "loss": 99.0, "batch": "other"}) == []
    assert replay.checked == 0


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr"])
@pytest.mark.parametrize("tolerance", ["exact", "standard"])
def test_a_figure_that_differs_stops(name: str, tolerance: str) -> None:
    now = {**STEP, name: STEP[name] * 1.01}
    with pytest.raises(ReplayMismatch, match="step 7, trained again, is not the step of the journal") as error:
        audit(tolerance).compare(now)
    (problem,) = error.value.problems
    assert problem.where == "step 7" and f"{name} was {STEP[name]!r} before the crash" in problem.what
    assert repr(now[name]) in problem.what and f"(tolerance: {tolerance})" in problem.what


def test_the_last_bit_counts_when_exact_and_not_within_a_tolerance() -> None:
    now = {**STEP, "loss": 2.5000000000000004}
    with pytest.raises(ReplayMismatch):
        audit("exact").compare(now)
    assert audit("strict").compare(now) == []


def test_a_policy_that_warns_gets_all_problems_and_goes_on() -> None:
    replay = audit(stop=False)
    problems = replay.compare({**STEP, "loss": 3.0, "lr": 0.1})
    assert [problem.what.split()[0] for problem in problems] == ["loss", "lr"]
    assert replay.checked == 1


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize(("name", "value"), [("batch", "0000"), ("samples", 64)])
def test_other_data_stops_whatever_the_policy_says(name: str, value: Any, stop: bool) -> None:
    with pytest.raises(ReplayMismatch, match=f"{name} was {STEP[name]}, now {value}") as error:
        audit("relaxed", stop=stop).compare({**STEP, name: value})
    assert "check the data and its position" in error.value.problems[0].remedy


def test_other_data_is_told_together_with_the_figures() -> None:
    with pytest.raises(ReplayMismatch) as error:
        audit(stop=False).compare({**STEP, "batch": "0000", "samples": 1, "loss": 9.0})
    assert [problem.what.split()[0] for problem in error.value.problems] == ["batch", "samples", "loss"]


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (None, None, True),
        (None, 1.0, False),
        (1.0, None, False),
        (NAN, NAN, True),
        (NAN, 1.0, False),
        (1.0, NAN, False),
        (None, NAN, False),
        (INF, INF, True),
        (INF, -INF, False),
        (INF, 1.0, False),
        (1.0, INF, False),
        (0.0, -0.0, True),
    ],
)
@pytest.mark.parametrize("tolerance", ["exact", "relaxed"])
def test_figures_that_are_no_numbers(before: float | None, now: float | None, same: bool, tolerance: str) -> None:
    found = audit(tolerance, stop=False, grad_norm=before).compare({**STEP, "grad_norm": now})
    assert (found == []) is same
    if not same:
        with pytest.raises(ReplayMismatch):
            audit(tolerance, grad_norm=before).compare({**STEP, "grad_norm": now})
