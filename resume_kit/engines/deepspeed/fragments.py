"""How a ZeRO optimizer's flat partitions hold the logical tensors of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from resume_kit.engines.adapter import LivePiece, Replica


@dataclass(frozen=True, eq=False)
class Fragment:
    """The elements [start, start+numel) of a flattened weight that this rank owns.

    They lie at [flat_start, flat_start+numel) of `flat`, the tensor that the real optimizer updates;
    `low_precision` is the view of the same elements of the weight itself.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    flat: torch.Tensor
    flat_start: int
    start: int
    numel: int
    low_precision: torch.Tensor


class Partitioning(Protocol):
    """One ZeRO stage's layout on this rank."""

    @property
    def base(self) -> torch.optim.Optimizer:
        """The real optimizer."""

    def members(self) -> list[list[str]]:
        """Names of the trainable weights of each parameter group."""

    def flats(self) -> list[tuple[int, torch.Tensor]]:
        """(group, flat tensor) of every tensor that the real optimizer updates on this rank."""

    def fragments(self) -> list[Fragment]: ...

    def frozen(self) -> tuple[list[LivePiece], list[Replica]]:
        """Weights outside the optimizer: as owned pieces or as replicas."""

    def copies(self) -> list[Replica]:
        """Whole low-precision weights on this rank that follow from the fragments."""

    def publish(self) -> None:
        """Bring `copies` up to date with the owned low-precision fragments. Collective."""

    def settle(self) -> None:
        """Free what a forward/backward outside of training has gathered. Collective."""
