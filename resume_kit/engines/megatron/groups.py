"""Megatron's parameter groups without the topology in them: with expert parallelism a group is split in two.

Their order is the same on all ranks, in all topologies, and under other rates and decays: by what sort of group each
is, and only among groups of one sort by their numbers. Megatron's own would depend on where the experts are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from resume_kit.checkpoint import canonical
from resume_kit.engines.megatron.logical import LocalWeight
from resume_kit.engines.megatron.ownership import masters_of, single_optimizers
from resume_kit.engines.pieces import hyperparameters, set_hyperparameters
from resume_kit.errors import InconsistentState, Problem
from resume_kit.integrity.differences import differences

_TOPOLOGICAL = ("is_expert_parallel",)

#: Factors on rates and decays that tell sorts of groups apart, as biases without decay from weights with it.
_FACTORS = ("wd_mult", "lr_mult")

#: Where fused optimizers count the steps of a group, and only of one that has params on this rank.
_STEP = "step"


class LogicalGroups:
    """Groups that were constructed with the same hyperparameters are one logical group, in a fixed order.

    It keeps places of groups, not the groups: torch replaces them all when an optimizer loads a state.
    """

    def __init__(self, optimizer: Any, weights: Sequence[LocalWeight], scheduler: Any | None) -> None:
        self._optimizer = optimizer
        built: dict[bytes, dict[str, Any]] = {}
        self._places: dict[bytes, list[tuple[torch.optim.Optimizer, int]]] = {}
        for one in single_optimizers(optimizer):
            for number, group in enumerate(one.optimizer.param_groups):
                values = _constructed(group, scheduler)
                identity = canonical.dumps(canonical.encode(values))
                built[identity] = values
                self._places.setdefault(identity, []).append((one.optimizer, number))
        self._order = sorted(built, key=lambda identity: (*_sort_of_group(built[identity]), identity))
        self._built = built
        self._members = {identity: self._names(optimizer, weights, identity) for identity in self._order}

    @property
    def learning_rate(self) -> float:
        """Of the first group on this rank; the schedule sets it on every group, also on one without members."""
        return float(self._optimizer.param_groups[0]["lr"])

    def describe(self) -> tuple[dict[str, Any], ...]:
        """As constructed, with this rank's members by name."""
        return tuple({"members": self._members[identity], **self._built[identity]} for identity in self._order)

    def values(self) -> list[dict[str, Any]]:
        """As they are now. Raises `InconsistentState` where parts of one group have come apart."""
        problems: list[Problem] = []
        found = [self._value(number, self._physical(identity), problems) for number, identity in enumerate(self._order)]
        if problems:
            raise InconsistentState("parts of one parameter group have come apart", problems)
        return found

    def load(self, saved: Sequence[Mapping[str, Any]]) -> None:
        for identity, values in zip(self._order, saved, strict=True):
            for group in self._physical(identity):
                set_hyperparameters(group, values)

    def _physical(self, identity: bytes) -> list[dict[str, Any]]:
        """The groups that are one logical group, as the optimizers hold them now."""
        return [optimizer.param_groups[number] for optimizer, number in self._places[identity]]

    def _value(self, number: int, parts: Sequence[Mapping[str, Any]], problems: list[Problem]) -> dict[str, Any]:
        first, *others = [self._counted(part) for part in parts]
        for other in others:
            for path, one, two in differences(first, other):
                what = f"{one} for some of its weights, {two} for others"
                remedy = "change hyperparameters of dense and expert weights alike, or before the kit is made"
                problems.append(Problem("optimizer groups", f"group {number}, {path}", what, remedy))
        return first

    def _counted(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A physical group's values; one without params on this rank has taken the steps of those that have some."""
        values = hyperparameters(part, _TOPOLOGICAL)
        if not part["params"]:
            every = (group for identity in self._order for group in self._physical(identity))
            counted = [group for group in every if group["params"]]
            if counted and _STEP in counted[0]:
                values[_STEP] = hyperparameters(counted[0])[_STEP]
        return values

    def _names(self, optimizer: Any, weights: Sequence[LocalWeight], identity: bytes) -> list[str]:
        """Members on this rank. A weight none of whose elements this rank updates is another rank's to name."""
        updated = {id(param) for group in self._physical(identity) for param in group["params"]}
        masters = masters_of(optimizer)
        return sorted(
            {
                part.name
                for weight in weights
                if id(weight.weight) in masters and id(masters[id(weight.weight)].tensor) in updated
                for part in weight.parts
            }
        )


def _constructed(group: Mapping[str, Any], scheduler: Any | None) -> dict[str, Any]:
    """A group's hyperparameters as constructed: where the schedule puts them at its start, no steps counted."""
    values = hyperparameters(group, (*_TOPOLOGICAL, _STEP))
    if scheduler is not None:
        start = copy.copy(scheduler)
        start.num_steps = 0
        values["lr"] = start.get_lr(values)
        values["weight_decay"] = start.get_wd(values) * values.get("wd_mult", 1.0)
    return values


def _sort_of_group(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What to order groups by: flags, factors, then all numbers as numbers."""
    flags = {key: value for key, value in values.items() if value is None or isinstance(value, bool | str)}
    numbers = [(key, value) for key, value in sorted(values.items()) if type(value) in (int, float)]
    return canonical.dumps(flags), [values.get(name, 1.0) for name in _FACTORS], numbers
