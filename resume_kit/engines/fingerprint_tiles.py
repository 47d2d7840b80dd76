"""Pieces of device memory cut into the tiles that one program of `fingerprint_triton` takes each. NumPy only.

Loads are as wide as a vector of 16 bytes, so a tile's rows name the vector in which its first element lies, and the
elements of the tile as positions lo .. hi-1 from there: lo is 0 but for the first tile of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resume_kit.algebra.boxes import Runs
from resume_kit.algebra.fingerprint import STEP

VECTOR = 16
"""Bytes of a load."""

TILE = 1 << 16
"""Positions of a tile, at most."""

LONG = 1 << 13
"""Runs of so many elements have tiles of their own; shorter ones share one, which costs some operations an element."""

_MOST_GRIDS = 1 << 16

Piece = tuple[int, int, Runs]
"""Row of the result, address, runs."""


def takes(address: int, itemsize: int, runs: Runs) -> bool:
    """Whether tables are the way for this piece: not for one at an odd address, or of countless little grids."""
    return address % itemsize == 0 and (len(runs.grid) < 2 or runs.count // runs.grid[0][1] <= _MOST_GRIDS)


def tables(pieces: Sequence[Piece], itemsize: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tiles of long runs and those of short ones.

    Columns of both: vector (address / 16), z, lo, hi, row of the result, where z = (i + 1) * STEP of the flat index i
    that position 0 has (or would have). Of short runs, z is that of the first element of the run that the tile begins
    in, and then follow: elements of that run before position 0, what z gains from a run's end to the next one's start,
    ceil(2**31 / run length).
    """
    spans: list[NDArray[np.int64]] = [np.zeros((0, 4), np.int64)]
    grids: list[NDArray[np.int64]] = [np.zeros((0, 6), np.int64)]
    single: list[tuple[int, int, int, int]] = []
    for row, address, runs in pieces:
        if runs.count == 1:
            single.append((row, address, runs.first, runs.length))
        elif runs.count:
            short = runs.length < LONG
            per = runs.grid[0][1] if short else 1  # runs that go together: those along the innermost axis
            numbers = np.arange(0, runs.count, per)
            starts = np.full_like(numbers, runs.first)
            for inner, count, stride in runs.grid:
                starts += numbers // inner % count * stride
            size = per * runs.length
            some = np.empty((numbers.size, 6), np.int64)
            some[:, 0], some[:, 1], some[:, 2] = row, address + numbers * (runs.length * itemsize), starts
            some[:, 3], some[:, 4], some[:, 5] = size, runs.length, runs.grid[0][2] - runs.length
            (grids if short else spans).append(some if short else some[:, :4])
    if single:
        spans.append(np.array(single, np.int64))
    return _span_tiles(np.concatenate(spans), itemsize), _grid_tiles(np.concatenate(grids), itemsize)


def _span_tiles(spans: NDArray[np.int64], itemsize: int) -> NDArray[np.int64]:
    """Tiles [n, 5] of spans (row, address, first flat index, elements)."""
    row, address, first, size = spans.T
    which, vector, lo, hi, before = _tiles(address, size, itemsize)
    return np.stack([vector, _z(first[which] + before - lo), lo, hi, row[which]], 1)


def _grid_tiles(grids: NDArray[np.int64], itemsize: int) -> NDArray[np.int64]:
    """Tiles [n, 8] of grids (row, address, first flat index, elements, run length, gap)."""
    row, address, first, size, length, gap = grids.T
    which, vector, lo, hi, before = _tiles(address, size, itemsize)
    row, first, length, gap = row[which], first[which], length[which], gap[which]
    z = _z(first + before // length * (length + gap))
    return np.stack([vector, z, lo, hi, row, before % length - lo, _z(gap - 1), -(-(1 << 31) // length)], 1)


def _z(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """(index + 1) * STEP, the bits of the uint64."""
    return ((index + 1).view(np.uint64) * np.uint64(STEP)).view(np.int64)


def _tiles(
    address: NDArray[np.int64], size: NDArray[np.int64], itemsize: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Contiguous ranges as tiles: the range, vector, lo and hi of each, and the range's elements before it."""
    head = address % VECTOR // itemsize
    which, k = _repeated(-(-(head + size) // TILE))
    lo = np.where(k > 0, 0, head[which])
    hi = np.minimum(head[which] + size[which] - k * TILE, TILE)
    vector = (address - head * itemsize)[which] // VECTOR + k * (TILE * itemsize // VECTOR)
    return which, vector, lo, hi, np.where(k > 0, k * TILE - head[which], 0)


def _repeated(times: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each index of `times` as often as it says, and how many of the same come before."""
    which = np.repeat(np.arange(times.size), times)
    return which, np.arange(which.size) - np.repeat(np.cumsum(times) - times, times)
