"""Bringing a live LR schedule to the place where a saved one stands."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from resume_kit.errors import Problem, UsageError

#: Where schedulers keep the number of steps that they have made, and its value before the first.
_POSITIONS = (("last_batch_iteration", -1), ("last_epoch", 0))


def advance_torch_schedule(scheduler: Any, saved: Mapping[str, Any] | None, offset: int) -> None:
    """Step a fresh scheduler, of torch's or DeepSpeed's kind, as often as the saved one was, and `offset` times more.

    Does nothing without a scheduler. Raises `UsageError` when the saved one tells no position.
    """
    if scheduler is None:
        return
    state = dict((saved or {}).get("state", {}))
    name, start = next(((name, start) for name, start in _POSITIONS if name in state), ("", 0))
    if not name:
        what = f"the saved schedule ({(saved or {}).get('class', 'none')}) does not tell how far it had come"
        remedy = "set the policy `learning_rate: keep`"
        raise UsageError("the live schedule cannot be advanced", [Problem("learning rate", "schedule", what, remedy)])
    with warnings.catch_warnings():
        # torch says that a scheduler should not step before its optimizer; here the steps were taken long ago
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(shifted(int(state[name]) - start, offset) - _taken(scheduler, name, start)):
            scheduler.step()


def shifted(position: int, offset: int) -> int:
    """`position` steps of a schedule and `offset` more. Raises `UsageError` where that is before its start."""
    if position + offset < 0:
        what = f"it is to go {-offset} steps back, and has made {position}"
        remedy = f"set the policy `learning_rate: {{offset: {-position}}}`, or a later place"
        raise UsageError("the schedule cannot be shifted", [Problem("learning rate", "schedule", what, remedy)])
    return position + offset


def _taken(scheduler: Any, name: str, start: int) -> int:
    return int(getattr(scheduler, name, start)) - start
