"""Bringing a live LR schedule to the place where a saved one stands."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from resume_kit.errors import Problem, UsageError

#: Where schedulers keep the number of steps that they have made, and its value before the first.
_POSITIONS = (("last_batch_iteration", -1), ("last_epoch", 0))

#: What a scheduler of torch's kind keeps of where it stands, not of how it was made.
_MOVING = frozenset(
    {
        *(name for name, _ in _POSITIONS),
        "_step_count",
        "_last_lr",
        "_is_initial",
        "_get_lr_called_within_step",
    }
)

_FIRST_RATES: WeakKeyDictionary[Any, list[float]] = WeakKeyDictionary()


def position_problems(
    *, live: bool, saved: Mapping[str, Any] | None, position: int | None, offset: int
) -> list[Problem]:
    """Why no live schedule can stand `offset` steps after the `position` that `saved` tells; None: it tells none."""
    check, where = "learning rate", "schedule"
    if not live:
        what = f"there is no live schedule that could be shifted by {offset:+} steps"
        remedy = "give the kit an engine with a schedule, or leave `learning_rate: {offset: N}` out of the policy"
        return [Problem(check, where, what, remedy)] if offset else []
    if position is None:
        what = f"the saved schedule ({(saved or {}).get('class', 'none')}) does not tell how far it had come"
        return [Problem(check, where, what, "keep the schedule of the save, with the policy `learning_rate: keep`")]
    if position + offset < 0:
        what = f"it is to go {-offset} steps back, and has made {position}"
        remedy = f"set the policy `learning_rate: {{offset: {-position}}}`, or a later place"
        return [Problem(check, where, what, remedy if position else "leave the offset out of the policy")]
    return []


def require_position(problems: list[Problem]) -> None:
    """Raise `UsageError` for problems of a position."""
    if problems:
        raise UsageError("the live schedule cannot be advanced", problems)


def torch_schedule_problems(scheduler: Any, saved: Mapping[str, Any] | None, offset: int) -> list[Problem]:
    """Why `advance_torch_schedule` would raise."""
    found = _torch_position(saved)
    position = None if found is None else found[1]
    return position_problems(live=scheduler is not None, saved=saved, position=position, offset=offset)


def advance_torch_schedule(scheduler: Any, saved: Mapping[str, Any] | None, offset: int) -> None:
    """Step a fresh scheduler, of torch's or DeepSpeed's kind, as often as the saved one was, and `offset` times more.

    Does nothing without a scheduler. Raises `UsageError` when the saved one tells no position, or one before its start
    is asked for.
    """
    require_position(torch_schedule_problems(scheduler, saved, offset))
    found = _torch_position(saved)
    if scheduler is None or found is None:
        return
    name, position = found
    with warnings.catch_warnings():
        # torch says that a scheduler should not step before its optimizer; here the steps were taken long ago
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(position + offset - _taken(scheduler, name)):
            scheduler.step()


def torch_schedule_settings(scheduler: Any) -> dict[str, Any]:
    """What a scheduler of torch's kind was made with, as far as its state tells it in plain values: no functions."""
    settings: dict[str, Any] = {} if scheduler is None else _settings(scheduler.state_dict())
    return settings


def first_rates(scheduler: Any, rates: Sequence[float]) -> list[float]:
    """The groups' LRs as they were when first asked for, however far this schedule has moved them since.

    Without a schedule, `rates`: the LRs as they are.
    """
    return [*rates] if scheduler is None else _FIRST_RATES.setdefault(scheduler, [*rates])


def samples_of_a_step(saved: Mapping[str, Any], samples_per_step: int) -> int:
    """By how much one step moves a Megatron schedule: it counts samples, or steps where it has counted no more."""
    return 1 if 0 < saved["scheduler"]["state"]["num_steps"] <= saved["counters"]["steps"] else samples_per_step


def _torch_position(saved: Mapping[str, Any] | None) -> tuple[str, int] | None:
    """The name of the position in the saved state, and the number of steps made."""
    state = dict((saved or {}).get("state", {}))
    return next(((name, int(state[name]) - start) for name, start in _POSITIONS if name in state), None)


def _taken(scheduler: Any, name: str) -> int:
    start = dict(_POSITIONS)[name]
    return int(getattr(scheduler, name, start)) - start


def _settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _settings(item) for key, item in value.items() if key not in _MOVING and _is_plain(item)}
    if isinstance(value, list | tuple):
        return [_settings(item) for item in value if _is_plain(item)]
    return value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | Mapping)
