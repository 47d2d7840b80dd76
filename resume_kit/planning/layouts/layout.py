"""A layout: every rank's boxes of the masters under one topology."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resume_kit.algebra.boxes import Box
from resume_kit.planning.table import BoxTable, Flags, Ints, boxes_of_flat_ranges


@dataclass(frozen=True, slots=True)
class Held:
    """A box of a weight's master that a rank holds. The optimizer's tensors have the same boxes.

    Of all ranks that hold an element one owns it, and its file has the bytes; the others have copies. What a rank
    holds whole and reads in part, because data-parallel ranks give each other the rest, counts by that part only.
    """

    name: str
    box: Box
    owned: bool


@dataclass(frozen=True, eq=False)
class Layout:
    """The boxes of all ranks."""

    world_size: int
    table: BoxTable

    def held(self, rank: int) -> list[Held]:
        """What one rank holds. IndexError for a rank that is not in the world."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of a world of {self.world_size}")
        rows = self.table.of_rank(rank)
        named = zip(rows.tensor.tolist(), rows.boxes(), rows.owned.tolist(), strict=True)
        return [Held(rows.names[tensor], box, owned) for tensor, box, owned in named]


def table_of_ranges(
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    *,
    slices: Ints,
    tensor: Ints,
    rank: Ints,
    start: Ints,
    stop: Ints,
    origin: Ints,
    owned: Flags,
) -> BoxTable:
    """The table of flat ranges [start, stop) of slices (of shape `slices`, first element at `origin`) of tensors."""
    row, lo, hi = boxes_of_flat_ranges(slices, start, stop)
    order = np.argsort(rank[row], kind="stable")
    row = row[order]
    shift = origin[row]
    return BoxTable(names, shapes, tensor[row], rank[row], lo[order] + shift, hi[order] + shift, owned[row])
