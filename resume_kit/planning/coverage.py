"""Exact-once coverage: do these boxes own every element of a tensor once, and none twice?

Boxes that are single runs (flat ranges, whole rows) are sorted by flat offset and scanned. Any other set
covers exactly once if and only if no two boxes meet and the numbers of elements add up. Pairs that may meet
come from a sweep over the axis that leaves the fewest: O(n log n) for slabs on any axis, n**1.5 for grids.
Where elements are missing, the region is halved at box faces towards a part that nobody claims.
Exactly-once validation as such is from Megatron's dist_checkpointing, which counts accesses in a dense grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from resume_kit.algebra.boxes import Box, boxes_of_flat_range, flat_strides

_Ints: TypeAlias = NDArray[np.int64]

_FEW = 16
_PAIRS = 1 << 20  # pairs of boxes compared at a time


@dataclass(frozen=True, slots=True)
class CoverageProblem:
    """One fault. `owners` are indices into the boxes: all who claim the whole of `box`; for a gap, none."""

    kind: Literal["gap", "overlap", "outside"]
    box: Box
    owners: tuple[int, ...]

    def __str__(self) -> str:
        where = f"elements [{self.box}]"
        if self.kind == "gap":
            return f"{where} are owned by nobody"
        if self.kind == "outside":
            return f"{where}, claimed by box {self.owners[0]}, are not within the tensor"
        return f"{where} are owned more than once, by boxes {', '.join(map(str, self.owners))}"


def find_coverage_problem(shape: Sequence[int], boxes: Sequence[Box]) -> CoverageProblem | None:
    """None where the boxes cover a tensor of `shape` exactly once, else one fault by name.

    Empty boxes claim nothing. A box of the wrong rank, or reaching past the shape, is "outside".
    """
    if len(boxes) <= _FEW and _follow_each_other(shape, boxes):
        return None
    whole = Box.whole(shape)
    for index, box in enumerate(boxes):
        if box.ndim != whole.ndim or not whole.contains(box):
            return CoverageProblem("outside", box, (index,))
    claims = [box for box in boxes if not box.empty]
    lo = np.array([box.lo for box in claims], np.int64).reshape(len(claims), whole.ndim)
    hi = np.array([box.hi for box in claims], np.int64).reshape(len(claims), whole.ndim)
    flat = _flat_ranges(shape, lo, hi)
    if flat is not None:
        kind, fault = _scan(shape, *flat)
    elif (fault := _overlap(lo, hi)) is not None:
        kind = "overlap"
    else:
        kind, fault = "gap", _gap(whole, lo, hi)
    if fault is None:
        return None
    if kind == "gap":
        return CoverageProblem("gap", fault, ())
    owners = tuple(index for index, box in enumerate(boxes) if box.contains(fault))
    return CoverageProblem("overlap", fault, owners)


def _follow_each_other(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether single runs, put in flat order, lead from the first element to the last: what nearly all tensors have.

    Without NumPy, whose calls cost more than a few boxes do.
    """
    strides = flat_strides(shape)
    runs: list[tuple[int, int]] = []
    for box in boxes:
        if box.ndim != len(shape):
            return False
        start, numel = 0, 1
        for lo, hi, size, stride in zip(box.lo, box.hi, shape, strides, strict=True):
            if not lo < hi <= size or (numel > 1 and hi - lo != size):
                return False
            start += lo * stride
            numel *= hi - lo
        runs.append((start, numel))
    reached = 0
    for start, numel in sorted(runs):
        if start != reached:
            return False
        reached += numel
    return reached == math.prod(shape)


def _flat_ranges(shape: Sequence[int], lo: _Ints, hi: _Ints) -> tuple[_Ints, _Ints] | None:
    """Flat start and stop of each box, or None unless every box is a single run."""
    extent = hi - lo
    partial = extent != np.array(shape, np.int64)
    partial_from_here = np.logical_or.accumulate(partial[:, ::-1], axis=1)[:, ::-1]
    if np.any((extent[:, :-1] > 1) & partial_from_here[:, 1:]):
        return None
    start = lo @ np.array(flat_strides(shape), np.int64)
    return start, start + extent.prod(axis=1)


def _scan(shape: Sequence[int], start: _Ints, stop: _Ints) -> tuple[Literal["gap", "overlap"], Box | None]:
    """The first fault of flat ranges, in flat order."""
    order = np.argsort(start, kind="stable")
    begin = np.append(start[order], math.prod(shape))
    reach = np.append(0, np.maximum.accumulate(stop[order]))
    faults = np.flatnonzero(begin != reach)
    if not faults.size:
        return "gap", None
    at = int(faults[0])
    first, last = int(begin[at]), int(reach[at])
    if first > last:
        return "gap", boxes_of_flat_range(shape, last, first)[0]
    return "overlap", boxes_of_flat_range(shape, first, min(last, int(stop[order[at]])))[0]


def _overlap(lo: _Ints, hi: _Ints) -> Box | None:
    """The meeting of two boxes, or None where no two meet."""
    sweeps = []
    for axis in range(lo.shape[1]):
        order = np.argsort(lo[:, axis], kind="stable")
        ends = np.searchsorted(lo[order, axis], hi[order, axis])
        sweeps.append((ends - np.arange(1, len(lo) + 1), order))
    follower_counts, order = min(sweeps, key=lambda sweep: int(sweep[0].sum()))
    lo, hi = lo[order], hi[order]
    totals = np.cumsum(follower_counts)
    row = 0
    while row < len(lo):
        before = int(totals[row - 1]) if row else 0
        next_row = max(row + 1, int(np.searchsorted(totals, before + _PAIRS, side="right")))
        counts = follower_counts[row:next_row]
        one = np.repeat(np.arange(row, next_row), counts)
        other = one + 1 + np.arange(one.size) - np.repeat(np.cumsum(counts) - counts, counts)
        for axis in range(lo.shape[1]):
            meets = (lo[one, axis] < hi[other, axis]) & (lo[other, axis] < hi[one, axis])
            one, other = one[meets], other[meets]
        if one.size:
            a, b = one[0], other[0]
            return _box(np.maximum(lo[a], lo[b]), np.minimum(hi[a], hi[b]))
        row = next_row
    return None


def _gap(region: Box, lo: _Ints, hi: _Ints) -> Box | None:
    """A part of `region` that no box claims, or None. The boxes must lie within it and must not meet."""
    if region.numel == int((hi - lo).prod(axis=1).sum()):
        return None
    while len(lo):
        faces = [np.concatenate([lo[:, axis], hi[:, axis]]) for axis in range(region.ndim)]
        inner = [f[(f > region.lo[axis]) & (f < region.hi[axis])] for axis, f in enumerate(faces)]
        axis = max(range(region.ndim), key=lambda a: inner[a].size)
        at = int(np.sort(inner[axis])[inner[axis].size // 2])
        for part in region.split(axis, at):
            part_lo, part_hi = np.maximum(lo, part.lo), np.minimum(hi, part.hi)
            inside = (part_lo < part_hi).all(axis=1)
            part_lo, part_hi = part_lo[inside], part_hi[inside]
            if int((part_hi - part_lo).prod(axis=1).sum()) < part.numel:
                break
        region, lo, hi = part, part_lo, part_hi
    return region


def _box(lo: _Ints, hi: _Ints) -> Box:
    return Box(tuple(lo.tolist()), tuple(hi.tolist()))
