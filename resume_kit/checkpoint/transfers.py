"""The way of bytes from a piece in a file to a wanted box in memory: strided runs on both sides. Pure geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resume_kit.algebra.boxes import Box, boxes_of_flat_range, flat_strides


@dataclass(frozen=True, slots=True)
class Transfer:
    """Runs of `length` bytes, contiguous in the file and in buffer number `target`, the same order in both.

    The first goes from byte `offset` of the file to byte `at` of the buffer. Each axis of `grid`, outermost first,
    repeats the runs below it: (count, stride in the file, stride in the buffer), in bytes.
    """

    offset: int
    target: int
    at: int
    length: int
    grid: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def between(cls, piece: Box, offset: int, wanted: Box, itemsize: int, target: int) -> Transfer:
        """The elements that `piece`, at byte `offset` of a file, and the box `wanted`, all of a buffer, have in common.

        Both lie in C order. ValueError where they have none.
        """
        common = piece.intersect(wanted)
        if common is None:
            raise ValueError(f"nothing of {wanted} is in the piece {piece}")
        strides = flat_strides(piece.shape), flat_strides(wanted.shape)
        skip = sum((lo - base) * step for lo, base, step in zip(common.lo, piece.lo, strides[0], strict=True))
        at = sum((lo - base) * step for lo, base, step in zip(common.lo, wanted.lo, strides[1], strict=True))
        length, grid = itemsize, list[tuple[int, int, int]]()
        for count, *steps in reversed(list(zip(common.shape, *strides, strict=True))):
            source, aim = (step * itemsize for step in steps)
            if count == 1:
                continue
            if not grid and source == aim == length:
                length *= count
            elif grid and (source, aim) == (grid[0][0] * grid[0][1], grid[0][0] * grid[0][2]):
                grid[0] = (grid[0][0] * count, *grid[0][1:])
            else:
                grid.insert(0, (count, source, aim))
        return cls(offset + skip * itemsize, target, at * itemsize, length, tuple(grid))

    @property
    def stop(self) -> int:
        """End of the last run in the file."""
        return self.offset + self.length + sum((count - 1) * stride for count, stride, _ in self.grid)

    @property
    def nbytes(self) -> int:
        return self.length * math.prod(count for count, _, _ in self.grid)

    def starts(self) -> NDArray[np.int64]:
        """Where each run starts in the file, in file order."""
        found = np.array([self.offset], np.int64)
        for count, stride, _ in self.grid:
            found = (found[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        return found

    def clip(self, start: int, stop: int) -> tuple[Transfer, ...]:
        """What of this lies in bytes [start, stop) of the file, runs cut where need be."""
        if start <= self.offset and self.stop <= stop:
            return (self,)
        if not self.grid:
            first, last = max(start, self.offset), min(stop, self.stop)
            moved = self.at + first - self.offset
            return (Transfer(first, self.target, moved, last - first),) if first < last else ()
        shape = (*(count for count, _, _ in self.grid), self.length)
        ends = self._bytes_before(start), self._bytes_before(stop)
        return tuple(self._part(box) for box in boxes_of_flat_range(shape, *ends)) if ends[0] < ends[1] else ()

    def move(self, window: memoryview, start: int, buffer: memoryview) -> None:
        """Copy to `buffer` from `window`, which holds the file from byte `start` on. Other threads run meanwhile."""
        counts, sources, aims = zip(*self.grid, strict=True) if self.grid else ((), (), ())
        unit = math.gcd(8, self.length, *sources, *aims) if self.grid else 1
        shape, dtype = (*counts, self.length // unit), np.dtype(f"u{unit}")
        into = np.ndarray(shape, dtype, buffer, self.at, (*aims, unit))
        into[...] = np.ndarray(shape, dtype, window, self.offset - start, (*sources, unit))

    def _bytes_before(self, position: int) -> int:
        """How many bytes of the runs lie before byte `position` of the file."""
        left, size, found = max(0, position - self.offset), self.nbytes, 0
        for count, stride, _ in self.grid:
            size //= count
            index = min(left // stride, count - 1)
            found += index * size
            left -= index * stride
        return found + min(left, self.length)

    def _part(self, box: Box) -> Transfer:
        grid = [(n, source, aim) for n, (_, source, aim) in zip(box.shape, self.grid, strict=False) if n > 1]
        offset, at = self.offset + box.lo[-1], self.at + box.lo[-1]
        for index, (_, source, aim) in zip(box.lo, self.grid, strict=False):
            offset += index * source
            at += index * aim
        return Transfer(offset, self.target, at, box.shape[-1], tuple(grid))
