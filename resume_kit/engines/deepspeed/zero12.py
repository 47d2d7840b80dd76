"""ZeRO-1 and ZeRO-2: the low-precision weights are whole on every rank, the optimizer's flats are partitioned."""

from __future__ import annotations

from typing import Any

import torch

from resume_kit.engines.adapter import LivePiece, Replica
from resume_kit.engines.deepspeed.fragments import Fragment
from resume_kit.engines.pieces import weight_spec


class Zero12Partitioning:
    """Layout of `DeepSpeedZeroOptimizer`, read through each weight's fragment mapping."""

    def __init__(self, optimizer: Any, names: dict[int, str], module: torch.nn.Module) -> None:
        self._optimizer = optimizer
        self._names = names
        self._weights = {names[id(p)]: p for p in module.parameters()}
        self._trainable = {name for members in self.members() for name in members}

    @property
    def base(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = self._optimizer.optimizer
        return base

    def members(self) -> list[list[str]]:
        return [[self._names[id(p)] for p in group] for group in self._optimizer.bit16_groups]

    def flats(self) -> list[tuple[int, torch.Tensor]]:
        return list(enumerate(self._optimizer.single_partition_of_fp32_groups))

    def fragments(self) -> list[Fragment]:
        found = []
        for group, weights in enumerate(self._optimizer.bit16_groups):
            flat = self._optimizer.single_partition_of_fp32_groups[group]
            for weight in weights:
                mapping = weight._hp_mapping
                if mapping is None:
                    continue
                tensor, optimizer = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                found.append(
                    Fragment(
                        name=self._names[id(weight)],
                        shape=tuple(weight.shape),
                        group=group,
                        flat=flat,
                        flat_start=optimizer.start,
                        start=tensor.start,
                        numel=tensor.numel,
                        low_precision=weight.data.view(-1).narrow(0, tensor.start, tensor.numel),
                    )
                )
        return found

    def frozen(self) -> tuple[list[LivePiece], list[Replica]]:
        return [], [self._replica(name, restored=True) for name in self._weights if name not in self._trainable]

    def copies(self) -> list[Replica]:
        return [self._replica(name, restored=False) for name in self._weights if name in self._trainable]

    def _replica(self, name: str, *, restored: bool) -> Replica:
        weight = self._weights[name].data
        return Replica(weight_spec(name, weight.dtype, tuple(weight.shape)), weight, restored=restored)

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def settle(self) -> None:
        """Nothing is gathered for a forward: every rank holds all weights."""
