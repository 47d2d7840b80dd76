"""The replay audit: a step that was trained before must come out as the journal has it."""

from __future__ import annotations

from typing import Any

import pytest

from resume_kit.errors import ReplayMismatch
from resume_kit.policy.judgement import Change, Judgement
from resume_kit.policy.parts import Part
from resume_kit.resuming.audit import Lineage, ReplayAudit, recorded_steps

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


def judged(*changes: tuple[Part, str]) -> Judgement:
    return Judgement(tuple(Change(part, path, 2, 3, "") for part, path in changes), (), ())


SHRINK, GROW = judged(("topology", "world_size")), judged(("topology", "tensor_parallel"))
OTHER_DATA = judged(("data", "content"))
FIRST = Lineage()


def test_a_run_in_which_nothing_changes_stays_in_its_lineage() -> None:
    assert FIRST.after(judged(), 4) == FIRST
    assert FIRST.after(judged(("versions", "torch")), 4) == FIRST
    moved = FIRST.after(SHRINK, 4)
    assert moved.after(judged(), 8) == moved


def test_a_change_begins_another_lineage_and_the_same_change_at_the_same_step_the_same() -> None:
    moved = FIRST.after(SHRINK, 4)
    assert moved == FIRST.after(SHRINK, 4)
    lineages = [
        FIRST,
        moved,
        FIRST.after(SHRINK, 6),
        FIRST.after(GROW, 4),
        moved.after(GROW, 4),
        moved.after(SHRINK, 4),
    ]
    assert len({one.figures for one in lineages}) == len(lineages)
    assert {one.samples for one in lineages} == {""}


@pytest.mark.parametrize(
    "part", ["topology", "rng", "learning rate", "hyperparameters", "optimizer state", "dtype", "configuration"]
)
def test_what_moves_a_figure_leaves_the_samples(part: Part) -> None:
    moved = FIRST.after(judged((part, "x")), 4)
    assert moved.figures and not moved.samples


@pytest.mark.parametrize("part", ["global batch", "data"])
def test_what_moves_the_samples_moves_the_figures(part: Part) -> None:
    moved = FIRST.after(judged((part, "x")), 4)
    assert moved.figures and moved.samples


def test_a_lineage_is_kept_in_a_checkpoint_and_missing_in_an_old_one() -> None:
    moved = FIRST.after(OTHER_DATA, 4).after(SHRINK, 6)
    assert Lineage.of_state({"lineage": moved.to_plain(), "user": {}}) == moved
    assert Lineage.of_state({"user": {}}) == FIRST


def attempt(number: int, lineage: Lineage, *steps: int) -> list[dict[str, Any]]:
    """What an attempt journals. Its loss is its number."""
    resumed = {"event": "resume", "attempt": number, "lineage": lineage.to_plain()}
    trained = [{**STEP, "event": "step", "attempt": number, "step": step, "loss": float(number)} for step in steps]
    return [{"event": "start", "attempt": number}, *([resumed] if number > 1 else []), *trained]


def held(events: list[dict[str, Any]], after: int, lineage: Lineage) -> dict[int, float | None]:
    """The loss that each step is held against, None where only its samples count."""
    found = recorded_steps(events, after, lineage)
    assert all({"batch", "samples"} < one.keys() for one in found)
    return {one["step"]: one.get("loss") for one in found}


def test_steps_of_another_lineage_are_held_against_their_samples_only() -> None:
    there = FIRST.after(SHRINK, 2)
    events = [*attempt(1, FIRST, 1, 2, 3), *attempt(2, there, 3, 4, 5)]
    assert held(events, 2, FIRST) == {3: 1.0, 4: None, 5: None}
    assert held(events, 2, there) == {3: 2.0, 4: 2.0, 5: 2.0}
    assert held(events, 4, there) == {5: 2.0}
    assert held(events, 2, FIRST.after(OTHER_DATA, 2)) == {}


def test_the_newest_of_a_lineage_counts_whatever_came_after_in_another() -> None:
    there = FIRST.after(SHRINK, 2)
    events = [*attempt(1, FIRST, 1, 2, 3), *attempt(2, FIRST, 3), *attempt(3, there, 3)]
    assert held(events, 2, FIRST) == {3: 2.0}
    events += attempt(4, FIRST, 3)
    assert held(events, 2, there) == {3: 3.0}


def test_there_and_back_is_not_where_it_came_from() -> None:
    there = FIRST.after(SHRINK, 2)
    back = there.after(GROW, 4)
    events = [*attempt(1, FIRST, 1, 2, 3, 4, 5, 6), *attempt(2, there, 3, 4)]
    assert held(events, 4, back) == {5: None, 6: None}
    events += attempt(3, back, 5, 6)
    assert held(events, 5, back) == {6: 3.0}
    assert held(events, 4, FIRST) == {5: 1.0, 6: 1.0}


def test_a_step_of_which_only_the_samples_count_may_have_any_loss_and_no_other_samples() -> None:
    replay = ReplayAudit({7: {"step": 7, "batch": "8a3f", "samples": 56}}, "exact", True)
    assert replay.compare({**STEP, "loss": 99.0, "lr": 0.0, "grad_norm": None}) == [] and replay.checked == 1
    with pytest.raises(ReplayMismatch, match="batch was 8a3f, now 0000"):
        replay.compare({**STEP, "batch": "0000"})
