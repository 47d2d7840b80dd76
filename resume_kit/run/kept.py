"""What the kit itself keeps across saves of what a policy did to the run: a rewarming LR, reset moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class KeptState:
    """Part of the shared state. A rewarming LR is a factor on top of whatever schedule the engine has.

    `moments_since` counts the updates before the optimizer's state was last reset.
    """

    def __init__(self) -> None:
        self.moments_since = 0
        self._applied: dict[str, Any] = {}
        self._rewarm: dict[str, int] | None = None
        self._step = 0

    def to_plain(self) -> dict[str, Any]:
        return {"applied": self._applied, "moments_since": self.moments_since, "rewarm": self._rewarm}

    def begin(self, asked: Mapping[str, Any]) -> None:
        """A run without a checkpoint has nothing that an order of the policy could be carried out on: it is done."""
        self._applied = dict(asked)

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        self.moments_since = int(state.get("moments_since", 0))
        self._applied = dict(state.get("applied", {}))
        self._rewarm = state.get("rewarm")
        self._step = step

    def factor(self, step: int) -> float:
        """Factor on the LR of the update that follows `step` optimizer steps: from 1/N, the first, to 1."""
        if self._rewarm is None:
            return 1.0
        return min(1.0, (step - self._rewarm["from_step"] + 1) / self._rewarm["steps"])

    def reached(self, step: int) -> None:
        """Optimizer steps taken so far."""
        self._step = step

    def end(self) -> None:
        """Leave the LR alone from now on: the engine, and with it this hook, may outlive the kit."""
        self._rewarm = None

    def scale_rates(self, groups: list[dict[str, Any]]) -> Callable[[], None]:
        """Scale the LR of `groups` for one update; the function returned puts it back."""
        factor = self.factor(self._step)
        if factor == 1.0:
            return lambda: None
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor

        def put_back() -> None:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

        return put_back
