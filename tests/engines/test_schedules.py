"""A fresh schedule is brought to where a saved one stands, and as many steps on as the policy asks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resume_kit.engines.schedules import (
    advance_torch_schedule,
    first_rates,
    samples_of_a_step,
    torch_schedule_problems,
    torch_schedule_settings,
)
from resume_kit.errors import UsageError


def lambdas(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def chained(optimizer: Any) -> Any:
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, cosine(optimizer)], [4])


def deepspeeds(optimizer: Any) -> Any:
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    return WarmupDecayLR(optimizer, 20, 0.0, 0.1, 5)


def one_cycle(optimizer: Any) -> Any:
    from deepspeed.runtime.lr_schedules import OneCycle

    return OneCycle(optimizer, 0.01, 0.1, cycle_first_step_size=5, cycle_momentum=False)


Make = Callable[[Any], Any]
SCHEDULES = [lambdas, cosine, chained, deepspeeds, one_cycle]


def stepped(make: Make, steps: int) -> tuple[Any, float]:
    """A schedule after `steps` optimizer steps, and its rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return scheduler, float(optimizer.param_groups[0]["lr"])


def record(scheduler: Any) -> dict[str, Any]:
    return {"class": type(scheduler).__name__, "state": scheduler.state_dict()}


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize(("taken", "offset"), [(7, 0), (7, 3), (7, -4), (7, -7), (0, 0), (0, 2), (1, -1)])
def test_it_stands_where_a_run_of_so_many_steps_would_stand(make: Make, taken: int, offset: int) -> None:
    saved, _ = stepped(make, taken)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    live = make(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance_torch_schedule(live, record(saved), offset)
    expected, rate = stepped(make, taken + offset)
    position = "last_batch_iteration" if hasattr(expected, "last_batch_iteration") else "last_epoch"
    assert getattr(live, position) == getattr(expected, position)
    if taken + offset:
        assert float(optimizer.param_groups[0]["lr"]) == rate


@pytest.mark.parametrize("make", SCHEDULES)
def test_it_does_not_go_to_before_its_start(make: Make) -> None:
    saved, _ = stepped(make, 3)
    live, _ = stepped(make, 0)
    assert len(torch_schedule_problems(live, record(saved), -4)) == 1
    with pytest.raises(UsageError, match=r"it is to go 4 steps back, and has made 3\n.*offset: -3"):
        advance_torch_schedule(live, record(saved), -4)


def test_a_schedule_that_tells_no_position_is_refused() -> None:
    live, _ = stepped(lambdas, 0)
    for saved in (None, {"class": "Own", "state": {"phase": 2}}):
        with pytest.raises(UsageError, match="does not tell how far it had come"):
            advance_torch_schedule(live, saved, 1)


def test_without_a_live_schedule_there_is_nothing_to_advance_and_nothing_to_shift() -> None:
    saved, _ = stepped(cosine, 3)
    for one in (None, record(saved)):
        advance_torch_schedule(None, one, 0)
        with pytest.raises(UsageError, match=r"no live schedule that could be shifted by \+5 steps"):
            advance_torch_schedule(None, one, 5)


@pytest.mark.parametrize("make", SCHEDULES)
def test_what_a_schedule_was_made_with_does_not_move_with_it(make: Make) -> None:
    assert torch_schedule_settings(stepped(make, 3)[0]) == torch_schedule_settings(stepped(make, 0)[0])


def test_the_settings_are_all_that_is_plain() -> None:
    assert torch_schedule_settings(None) == torch_schedule_settings(stepped(deepspeeds, 2)[0]) == {}
    assert torch_schedule_settings(stepped(cosine, 2)[0]) == {"T_max": 20, "eta_min": 0.0, "base_lrs": [0.1]}
    found = torch_schedule_settings(stepped(chained, 2)[0])
    assert found["_milestones"] == [4]
    assert found["_schedulers"][0] == {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 4, "base_lrs": [0.1]}

    def own(optimizer: Any) -> Any:
        scheduler = lambdas(optimizer)
        scheduler.form = lambda step: step
        return scheduler

    assert "form" not in torch_schedule_settings(stepped(own, 1)[0])


@pytest.mark.parametrize(
    ("num_steps", "steps", "expected"), [(0, 0, 8), (32, 4, 8), (12, 4, 8), (4, 4, 1), (3, 4, 1), (0, 4, 8)]
)
def test_a_megatron_schedule_counts_samples_unless_it_has_counted_no_more_than_steps(
    num_steps: int, steps: int, expected: int
) -> None:
    saved = {"scheduler": {"state": {"num_steps": num_steps}}, "counters": {"steps": steps}}
    assert samples_of_a_step(saved, 8) == expected


@pytest.mark.parametrize("make", SCHEDULES)
def test_first_rates_stay_however_far_their_schedule_goes(make: Make) -> None:
    scheduler, rate = stepped(make, 1)
    assert first_rates(scheduler, [rate]) == [rate]
    scheduler.step()
    assert first_rates(scheduler, [rate / 2]) == [rate]
    other, _ = stepped(make, 3)
    assert first_rates(other, [0.5]) == [0.5]


def test_rates_without_a_schedule_are_what_they_are() -> None:
    assert first_rates(None, [0.1]) == [0.1] and first_rates(None, [0.2]) == [0.2]
