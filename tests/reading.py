"""A reading into tensors made for it, in place of a live engine's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.carrying import ReadAccount
from resume_kit.checkpoint.records import TensorKey
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.reading import filled_by, read_into


@dataclass(frozen=True)
class Read:
    tensors: dict[tuple[TensorKey, Box], torch.Tensor]
    account: ReadAccount

    def get(self, key: TensorKey, box: Box) -> torch.Tensor | None:
        """The box as a 1-D tensor of box.numel elements; None where the files do not hold all of it."""
        return self.tensors.get((key, box))


def read(directory: Path, order: ReadOrder, *, readers: int | None = None) -> Read:
    """Read all that is wanted and in the files."""
    filled = filled_by(order)
    tensors = {
        (want.spec.key, want.box): torch.zeros(want.box.numel, dtype=getattr(torch, want.spec.dtype))
        for want, _ in order.wants
        if (want.spec.key, want.box) in filled
    }
    places = {box: [tensor] for box, tensor in tensors.items()}
    return Read(tensors, read_into(directory, order, places, readers=readers))
