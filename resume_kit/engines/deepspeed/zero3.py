"""ZeRO-3: every weight is a partition on every rank; small ones are kept whole besides (persistent)."""

from __future__ import annotations

from typing import Any

import torch

from resume_kit.engines.adapter import LivePiece, Replica
from resume_kit.engines.deepspeed.fragments import Fragment
from resume_kit.engines.pieces import flat_pieces, weight_spec


class Zero3Partitioning:
    """Layout of `DeepSpeedZeroOptimizer_Stage3`: rank r of W owns [r·P, min((r+1)·P, N)) of each flattened weight."""

    def __init__(self, optimizer: Any, names: dict[int, str], module: torch.nn.Module) -> None:
        self._optimizer = optimizer
        self._names = names
        self._weights: list[Any] = list(module.parameters())
        self._trainable = {name for members in self.members() for name in members}

    @property
    def base(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = self._optimizer.optimizer
        return base

    def members(self) -> list[list[str]]:
        groups: list[list[str]] = [[] for _ in self._optimizer.optimizer.param_groups]
        for sub_group, weights in enumerate(self._optimizer.fp16_groups):
            groups[self._optimizer.sub_group_to_group_id[sub_group]] += [self._names[id(p)] for p in weights]
        return groups

    def flats(self) -> list[tuple[int, torch.Tensor]]:
        groups = self._optimizer.sub_group_to_group_id
        return [(groups[i], flat) for i, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat)]

    def fragments(self) -> list[Fragment]:
        found = []
        for sub_group, weights in enumerate(self._optimizer.fp16_groups):
            flat = self._optimizer.fp32_partitioned_groups_flat[sub_group]
            position = 0
            for weight in weights:
                start, numel = self._owned(weight)
                if numel:
                    found.append(
                        Fragment(
                            name=self._names[id(weight)],
                            shape=tuple(weight.ds_shape),
                            group=self._optimizer.sub_group_to_group_id[sub_group],
                            flat=flat,
                            flat_start=position,
                            start=start,
                            numel=numel,
                            low_precision=weight.ds_tensor.data.view(-1).narrow(0, 0, numel),
                        )
                    )
                position += weight.partition_numel()
        return found

    def frozen(self) -> tuple[list[LivePiece], list[Replica]]:
        pieces: list[LivePiece] = []
        for weight in self._weights:
            name = self._names[id(weight)]
            start, numel = self._owned(weight)
            if name not in self._trainable and numel:
                spec = weight_spec(name, weight.ds_tensor.dtype, tuple(weight.ds_shape))
                pieces += flat_pieces(spec, start, weight.ds_tensor.data.view(-1).narrow(0, 0, numel))
        return pieces, []

    def copies(self) -> list[Replica]:
        whole = []
        for weight in self._weights:
            if weight.ds_persist and tuple(weight.data.shape) == tuple(weight.ds_shape):
                spec = weight_spec(self._names[id(weight)], weight.dtype, tuple(weight.ds_shape))
                whole.append(Replica(spec, weight.data, restored=False))
        return whole

    def publish(self) -> None:
        self._optimizer._partition_all_parameters()
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def settle(self) -> None:
        self.publish()

    @staticmethod
    def _owned(weight: Any) -> tuple[int, int]:
        """First element and number of elements of `weight` that this rank owns, padding left out."""
        size = weight.partition_numel()
        start = min(size * torch.distributed.get_rank(group=weight.ds_process_group), weight.ds_numel)
        return start, min(size, weight.ds_numel - start)
