"""Boxes: the one way in which resume_kit says "this part of that tensor".

A `Box` is half-open and in the global coordinates of a logical tensor, free of any parallel layout. A flat
range of a tensor (what ZeRO and distributed optimizers own) is a short list of boxes, each contiguous in the
memory that holds that range; so saving, coverage, resharding and reading are all intersections of boxes.

The idea of a shard as global shape and offsets is that of torch DCP and of Megatron's dist_checkpointing;
flat ranges as several boxes follow ByteCheckpoint (Wan et al. 2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_EXTENT = re.compile(r"(0|[1-9][0-9]*):(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The elements x with lo[d] <= x[d] < hi[d] on every axis d. A 0-d tensor's has no axes, numel 1.

    Raises ValueError where lo and hi differ in rank or 0 <= lo <= hi does not hold.
    """

    lo: tuple[int, ...]
    hi: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lo) != len(self.hi):
            raise ValueError(f"box of unequal ranks: lo={self.lo}, hi={self.hi}")
        for first, last in zip(self.lo, self.hi, strict=True):
            if not 0 <= first <= last:
                raise ValueError(f"box needs 0 <= lo <= hi on every axis: lo={self.lo}, hi={self.hi}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of all elements of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def parse(cls, text: str) -> Box:
        """The inverse of `str(box)`. ValueError for anything that `str` would not have written."""
        parts = [_EXTENT.fullmatch(part) for part in text.split(",")] if text else []
        extents = [(int(part[1]), int(part[2])) for part in parts if part is not None]
        if len(extents) != len(parts):
            raise ValueError(f"not a box: {text!r} (a box is written like '0:128,64:96')")
        return cls(tuple(lo for lo, _ in extents), tuple(hi for _, hi in extents))

    def __str__(self) -> str:
        return ",".join(f"{lo}:{hi}" for lo, hi in zip(self.lo, self.hi, strict=True))

    @property
    def ndim(self) -> int:
        return len(self.lo)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(hi - lo for lo, hi in zip(self.lo, self.hi, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def empty(self) -> bool:
        return self.numel == 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing: `array[box.slices]`."""
        return tuple(slice(lo, hi) for lo, hi in zip(self.lo, self.hi, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, or None where there are none. ValueError for unequal ranks."""
        self._same_rank(other)
        lo = tuple(map(max, self.lo, other.lo))
        hi = tuple(map(min, self.hi, other.hi))
        return Box(lo, hi) if all(a < b for a, b in zip(lo, hi, strict=True)) else None

    def contains(self, other: Box) -> bool:
        """Whether other's bounds lie within these, on every axis. ValueError for unequal ranks."""
        self._same_rank(other)
        return all(a <= b for a, b in zip(self.lo, other.lo, strict=True)) and all(
            a >= b for a, b in zip(self.hi, other.hi, strict=True)
        )

    def relative_to(self, outer: Box) -> Box:
        """This box in coordinates that start at outer.lo. ValueError where outer does not contain it."""
        if not outer.contains(self):
            raise ValueError(f"box {self} is not within {outer}")
        return Box(
            tuple(a - b for a, b in zip(self.lo, outer.lo, strict=True)),
            tuple(a - b for a, b in zip(self.hi, outer.lo, strict=True)),
        )

    def shifted(self, by: Sequence[int]) -> Box:
        """This box moved by `by` on every axis."""
        return Box(
            tuple(a + b for a, b in zip(self.lo, by, strict=True)),
            tuple(a + b for a, b in zip(self.hi, by, strict=True)),
        )

    def split(self, axis: int, at: int) -> tuple[Box, Box]:
        """The parts below and from global coordinate `at`. ValueError unless both are non-empty there."""
        if not 0 <= axis < self.ndim or not self.lo[axis] < at < self.hi[axis]:
            raise ValueError(f"cannot split box {self} on axis {axis} at {at}")
        below = Box(self.lo, (*self.hi[:axis], at, *self.hi[axis + 1 :]))
        return below, Box((*self.lo[:axis], at, *self.lo[axis + 1 :]), self.hi)

    def _same_rank(self, other: Box) -> None:
        if self.ndim != other.ndim:
            raise ValueError(f"boxes of unequal ranks: '{self}' and '{other}'")


@dataclass(frozen=True, slots=True)
class Runs:
    """A box as contiguous runs of the tensor's C-order flat index, in flat order, each of `length` elements.

    Run r starts at `first + sum((r // inner) % count * stride for inner, count, stride in grid)`: kept as a
    grid so that a device can compute the offsets itself. `count` is the number of runs.
    """

    first: int
    length: int
    count: int
    grid: tuple[tuple[int, int, int], ...]

    def starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """The flat offsets of runs begin..end-1."""
        rows = np.arange(begin, end, dtype=np.int64)
        offsets = np.full(rows.shape, self.first, np.int64)
        for inner, count, stride in self.grid:
            offsets += rows // inner % count * stride
        return offsets

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The flat offset of every run, int64 [count]."""
        return self.starts(0, self.count)


def flat_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """C-order strides, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def flat_runs(shape: Sequence[int], box: Box) -> Runs:
    """`box` of a tensor of `shape` as the fewest equal runs. ValueError where the box is not within it."""
    if not Box.whole(shape).contains(box):
        raise ValueError(f"box {box} is not within shape {tuple(shape)}")
    if box.empty:
        return Runs(0, 0, 0, ())
    strides = flat_strides(shape)
    extents = box.shape
    cut = max((axis for axis, extent in enumerate(extents) if extent != shape[axis]), default=0)
    axes: list[tuple[int, int]] = []  # (count, stride), innermost first
    for axis in reversed(range(cut)):
        if extents[axis] == 1:
            continue
        if axes and strides[axis] == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * extents[axis], axes[-1][1])
        else:
            axes.append((extents[axis], strides[axis]))
    grid: list[tuple[int, int, int]] = []
    count = 1
    for extent, stride in axes:
        grid.append((count, extent, stride))
        count *= extent
    first = sum(lo * stride for lo, stride in zip(box.lo, strides, strict=True))
    return Runs(first, box.numel // count, count, tuple(grid))


def boxes_of_flat_range(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The C-order flat range [start, stop) as at most max(1, 2*ndim - 1) boxes, in flat order.

    Every box is one run: single on its leading axes, ranged on one, full on the rest. So each is contiguous
    in a memory that holds exactly this range. ValueError where the range is not within the tensor.
    """
    return _boxes_of_flat_range(tuple(shape), start, stop)


@lru_cache(1 << 14)  # a save asks for the same ranges each time, three or four times each
def _boxes_of_flat_range(shape: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"flat range [{start}, {stop}) is not within shape {shape}")
    if not shape:
        return (Box((), ()),) if start < stop else ()
    strides = flat_strides(shape)
    boxes: list[Box] = []
    while start < stop:
        axis = next(a for a, stride in enumerate(strides) if start % stride == 0 and start + stride <= stop)
        lo = [start // strides[a] % shape[a] for a in range(len(shape))]
        extent = min((stop - start) // strides[axis], shape[axis] - lo[axis])
        hi = [x + 1 for x in lo[:axis]] + [lo[axis] + extent, *shape[axis + 1 :]]
        boxes.append(Box(tuple(lo), tuple(hi)))
        start += extent * strides[axis]
    return tuple(boxes)
