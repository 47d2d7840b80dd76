"""A reading into tensors made for it, in place of a live engine's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.carrying import ReadAccount
from resume_kit.checkpoint.pages import PAGE
from resume_kit.checkpoint.records import TensorKey
from resume_kit.checkpoint.transfers import Transfer
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


def surplus_allowed(order: ReadOrder) -> float:
    """Bytes that may be read in vain: 5% of what is wanted, gaps of less than a page, and the headers of files of which
    all pieces are wanted."""
    allowed = 0.0
    for rank, index in order.indices.items():
        wanted = np.zeros(index.data.size, np.bool_)
        for want, parts in order.wants:
            for part in parts:
                if part.rank == rank:
                    assert part.piece.offset is not None
                    item = want.spec.itemsize
                    transfer = Transfer.between(part.piece.box, part.piece.offset, part.box, item, 0)
                    for start in transfer.starts():
                        wanted[start : start + transfer.length] = True
        count = int(wanted.sum())
        allowed += count / 20
        if count == sum(piece.nbytes for piece in index.pieces):
            allowed += index.data.size - count
            continue
        for start in range(0, index.data.size, index.data.block_bytes):
            block = wanted[start : start + index.data.block_bytes]
            edges = [-1, *np.flatnonzero(block).tolist(), len(block)]
            gaps = [after - before - 1 for before, after in pairwise(edges)]
            allowed += sum(gap for gap in gaps if gap < PAGE) if block.any() else 0
    return allowed
