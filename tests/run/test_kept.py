"""What the kit keeps of a policy's doing: a factor on the LR of each update, and what was done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import canonical
from resume_kit.run.kept import KeptState
from tests.conftest import Ranks
from tests.jobs import Job, text_file
from tests.run.test_unattended import build_kit


def kept(step: int, **state: Any) -> KeptState:
    """What a resume at `step` makes of a saved state."""
    found = KeptState()
    found.restore(canonical.decode(canonical.encode(state)), step)
    return found


def test_without_rewarming_rates_are_left_alone() -> None:
    groups = [{"lr": 0.1}, {"lr": 0.2}]
    for state in (KeptState(), kept(7), kept(7, rewarm=None)):
        put_back = state.scale_rates(groups)
        assert groups == [{"lr": 0.1}, {"lr": 0.2}] and state.factor(7) == 1.0
        put_back()
        assert groups == [{"lr": 0.1}, {"lr": 0.2}]


@pytest.mark.parametrize(("step", "factor"), [(10, 0.25), (11, 0.5), (12, 0.75), (13, 1.0), (1000, 1.0)])
def test_rewarming_rises_from_one_nth_to_one(step: int, factor: float) -> None:
    state = kept(10, rewarm={"steps": 4, "from_step": 10})
    state.reached(step)
    groups = [{"lr": 0.1}, {"lr": 0.2}]
    put_back = state.scale_rates(groups)
    assert state.factor(step) == factor
    assert groups == [{"lr": 0.1 * factor}, {"lr": 0.2 * factor}]
    put_back()
    assert groups == [{"lr": 0.1}, {"lr": 0.2}]


def test_it_survives_a_save() -> None:
    done = {"learning_rate": {"rewarm": 4}}
    state = kept(12, rewarm={"steps": 4, "from_step": 10}, applied=done, moments_since=3)
    again = kept(12, **state.to_plain())
    assert again.to_plain() == state.to_plain()
    assert again.moments_since == 3 and again.factor(12) == 0.75
    assert again.to_plain()["applied"] == done


def test_a_checkpoint_of_before_any_policy_is_taken() -> None:
    assert kept(3).to_plain() == KeptState().to_plain()


def test_orders_to_a_run_without_a_checkpoint_count_as_done() -> None:
    state = KeptState()
    state.begin({"learning_rate": {"rewarm": 4}, "optimizer_state": "reset"})
    plain = state.to_plain()
    assert plain.pop("applied") == {"learning_rate": {"rewarm": 4}, "optimizer_state": "reset"}
    assert plain == {key: value for key, value in KeptState().to_plain().items() if key != "applied"}
    assert state.factor(0) == 1.0


def test_a_kit_that_was_closed_leaves_the_rate_alone() -> None:
    state, groups = kept(7, rewarm={"steps": 4, "from_step": 7}), [{"lr": 0.4}]
    state.scale_rates(groups)()
    state.scale_rates(groups)
    assert groups[0]["lr"] == pytest.approx(0.1)
    state.end()
    state.scale_rates(groups)
    assert groups[0]["lr"] == pytest.approx(0.1)


def closed(rank: int, world_size: int, options: dict[str, Any]) -> list[float]:
    """The LR of an update before and after the kit was closed, in the middle of a rewarming."""
    _, loader, kit = build_kit(rank, world_size, options)
    kit.resume()
    kit._contents.kept.restore({"rewarm": {"steps": 4, "from_step": 0}}, 0)
    before, after = [{"lr": 0.4}], [{"lr": 0.4}]
    kit._contents.kept.scale_rates(before)
    kit.close()
    kit._contents.kept.scale_rates(after)
    loader.close()
    return [group["lr"] for group in (*before, *after)]


def test_a_closed_kit_leaves_the_rates_alone(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), stage=1)
    assert ranks.run(closed, 1, job.to_json()) == [[0.1, 0.4]]
