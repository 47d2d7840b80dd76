"""Megatron's parameter groups without the topology in them: with expert parallelism a group is split in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.engines.megatron.logical import LocalWeight
from resume_kit.engines.megatron.ownership import masters_of, single_optimizers
from resume_kit.engines.pieces import hyperparameters, set_hyperparameters

_TOPOLOGICAL = ("is_expert_parallel",)


class LogicalGroups:
    """Groups that were constructed with the same hyperparameters are one logical group, in a fixed order."""

    def __init__(self, optimizer: Any, weights: Sequence[LocalWeight]) -> None:
        physical = [group for one in single_optimizers(optimizer) for group in one.optimizer.param_groups]
        self._first = optimizer.param_groups[0]
        built: dict[bytes, dict[str, Any]] = {}
        self._physical: dict[bytes, list[dict[str, Any]]] = {}
        for group in physical:
            values = hyperparameters(group, _TOPOLOGICAL)
            identity = canonical.dumps(canonical.encode(values))
            built[identity] = values
            self._physical.setdefault(identity, []).append(group)
        self._order = sorted(built)
        self._built = built
        self._members = {identity: self._names(optimizer, weights, identity) for identity in self._order}

    @property
    def learning_rate(self) -> float:
        """Of the first group on this rank; the schedule sets it on every group, also on one without members."""
        return float(self._first["lr"])

    def describe(self) -> tuple[dict[str, Any], ...]:
        """As constructed, with this rank's members by name."""
        return tuple({"members": self._members[identity], **self._built[identity]} for identity in self._order)

    def values(self) -> list[dict[str, Any]]:
        """As they are now."""
        return [hyperparameters(self._physical[identity][0], _TOPOLOGICAL) for identity in self._order]

    def load(self, saved: Sequence[Mapping[str, Any]]) -> None:
        for identity, values in zip(self._order, saved, strict=True):
            for group in self._physical[identity]:
                set_hyperparameters(group, values)

    def _names(self, optimizer: Any, weights: Sequence[LocalWeight], identity: bytes) -> list[str]:
        """Members on this rank. A weight none of whose elements this rank updates is another rank's to name."""
        updated = {id(param) for group in self._physical[identity] for param in group["params"]}
        masters = masters_of(optimizer)
        return sorted(
            {
                part.name
                for weight in weights
                if id(weight.weight) in masters and id(masters[id(weight.weight)].tensor) in updated
                for part in weight.parts
            }
        )
