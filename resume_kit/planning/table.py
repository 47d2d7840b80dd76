"""Boxes of many tensors on many ranks as columns of NumPy arrays: what a plan for thousands of ranks works on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from resume_kit.algebra.boxes import Box

Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class BoxTable:
    """Row i says: `rank[i]` has box [lo[i], hi[i]) of tensor `names[tensor[i]]`, and owns it or holds a copy.

    lo and hi have as many columns as the tensor of most axes; a tensor of fewer has [0, 1) in the rest. Rows are
    in rank order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tensor: Ints
    rank: Ints
    lo: Ints
    hi: Ints
    owned: Flags

    @property
    def numel(self) -> Ints:
        """Elements of each row's box."""
        volumes: Ints = (self.hi - self.lo).prod(axis=1)
        return volumes

    def __len__(self) -> int:
        return len(self.rank)

    def where(self, rows: Flags | slice) -> BoxTable:
        """The same tensors, some of the rows."""
        return BoxTable(
            self.names,
            self.shapes,
            self.tensor[rows],
            self.rank[rows],
            self.lo[rows],
            self.hi[rows],
            self.owned[rows],
        )

    def of_rank(self, rank: int) -> BoxTable:
        first, last = np.searchsorted(self.rank, (rank, rank + 1))
        return self.where(slice(int(first), int(last)))

    def boxes(self) -> list[Box]:
        ndims = [len(shape) for shape in self.shapes]
        rows = zip(self.tensor.tolist(), self.lo.tolist(), self.hi.tolist(), strict=True)
        return [Box(tuple(lo[: ndims[t]]), tuple(hi[: ndims[t]])) for t, lo, hi in rows]


def padded_shapes(shapes: Sequence[Sequence[int]]) -> Ints:
    """The shapes as rows of equal length, ones behind."""
    width = max([1, *map(len, shapes)])
    rows = [[*shape, *[1] * (width - len(shape))] for shape in shapes]
    return np.array(rows, np.int64).reshape(len(shapes), width)


def table_of(shapes: Mapping[str, tuple[int, ...]], rows: Iterable[tuple[str, int, Box, bool]]) -> BoxTable:
    """The table of (name, rank, box, owned) rows; boxes without elements are left out."""
    names = tuple(shapes)
    number = {name: i for i, name in enumerate(names)}
    kept = sorted(((rank, number[name], box, owned) for name, rank, box, owned in rows if not box.empty), key=_rank)
    width = max([1, *map(len, shapes.values())])
    ones = [(*(0,) * k,) for k in range(width + 1)], [(*(1,) * k,) for k in range(width + 1)]
    lo = [(*box.lo, *ones[0][width - box.ndim]) for _, _, box, _ in kept]
    hi = [(*box.hi, *ones[1][width - box.ndim]) for _, _, box, _ in kept]
    return BoxTable(
        names,
        tuple(shapes.values()),
        np.array([tensor for _, tensor, _, _ in kept], np.int64),
        np.array([rank for rank, _, _, _ in kept], np.int64),
        np.array(lo, np.int64).reshape(len(kept), width),
        np.array(hi, np.int64).reshape(len(kept), width),
        np.array([owned for _, _, _, owned in kept], np.bool_),
    )


def _rank(row: tuple[int, int, Box, bool]) -> int:
    return row[0]


def boxes_of_flat_ranges(shapes: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints, Ints]:
    """(row, lo, hi) of all boxes of the flat ranges [start, stop) of tensors of `shapes`, row by row in flat order.

    For each row the boxes of `algebra.boxes.boxes_of_flat_range`, for all rows at once: finer axes up to the next
    whole slab, then whole slabs, then finer axes again. `shapes` has one row of equal length per range.
    """
    live = np.flatnonzero(start < stop)
    shapes, position, stop = shapes[live], start[live].copy(), stop[live]
    axes = shapes.shape[1]
    strides = np.ones_like(shapes)
    strides[:, :-1] = np.cumprod(shapes[:, :0:-1], axis=1)[:, ::-1]
    found: list[tuple[Ints, Ints, Ints]] = []
    climbing = [(axis, True) for axis in range(axes - 1, 0, -1)]
    for axis, climb in [*climbing, *((axis, False) for axis in range(axes))]:
        stride = strides[:, axis]
        end = stop
        if climb:
            slab = strides[:, axis - 1]
            end = np.minimum(stop, -(-position // slab) * slab)
        count = (end - position) // stride
        rows = np.flatnonzero(count)
        if not rows.size:
            continue
        lo = position[rows, None] // strides[rows] % shapes[rows]
        hi = lo + 1
        hi[:, axis] = lo[:, axis] + count[rows]
        hi[:, axis + 1 :] = shapes[rows, axis + 1 :]
        position = position + count * stride
        found.append((rows, lo, hi))
    if not found:
        return np.zeros(0, np.int64), np.zeros((0, axes), np.int64), np.zeros((0, axes), np.int64)
    row, lo, hi = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(row, kind="stable")
    return live[row[order]], lo[order], hi[order]


def cut(offset: Ints, numel: Ints, chunk: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Ranges [offset, offset+numel) of a buffer that is cut into parts of `chunk`: (row, part, start, stop).

    `start` and `stop` are relative to the row's own offset. Rows without elements are in no part.
    """
    first = offset // chunk
    counts = np.where(numel > 0, (offset + numel - 1) // chunk - first + 1, 0)
    row = np.repeat(np.arange(len(offset)), counts)
    part = first[row] + run_numbers(counts)
    start = np.maximum(part * chunk[row] - offset[row], 0)
    stop = np.minimum((part + 1) * chunk[row] - offset[row], numel[row])
    return row, part, start, stop


def run_numbers(counts: Ints) -> Ints:
    """0, 1, …, count-1 for each count, one behind the other."""
    numbers: Ints = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def numel_of(shape: Sequence[int]) -> int:
    return math.prod(shape)
