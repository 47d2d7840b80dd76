"""The fingerprint that no sharding can change, in NumPy: the reference, and the one for login nodes.

    F(T) = sum over i of w(i) * bits(x_i)  mod 2**64,    w(i) = splitmix64(i) | 1

i is the global C-order flat index; bits(x) is the element's bytes read as a little-endian unsigned integer,
zero-extended to 64 bits; splitmix64(i) is the first output of the generator with state i (Steele, Lea, Flood:
Fast splittable pseudorandom number generators, OOPSLA 2014).

F is linear: the sums over any boxes that cover T exactly once add up to F(T), whatever the topology. An odd
weight is invertible mod 2**64, so a change of any single element changes F with certainty; permuted, shifted
or swapped data changes it with overwhelming probability. F alone tells neither shape nor dtype (zeros of any
shape give 0): compare those too. It is evidence against faults, not against a forger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resume_kit.algebra.boxes import Box, Runs, flat_runs
from resume_kit.errors import UsageError

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

_CHUNK = 1 << 17  # elements at a time; a few 8-byte arrays of this size is all the memory it takes


def weights(offset: int, count: int) -> NDArray[np.uint64]:
    """w(i) for the flat indices offset .. offset+count-1, uint64 [count]."""
    return _weights_at(np.arange(offset, offset + count, dtype=np.uint64))


def fingerprint_of_box(data: NDArray[Any], shape: Sequence[int], box: Box) -> int:
    """The share of `box` in the fingerprint of a tensor of `shape`, in [0, 2**64).

    `data` holds the box's elements in C-order, in any shape, of any fixed-size dtype of 1, 2, 4 or 8 bytes.
    Raises UsageError for another dtype or a wrong number of elements, ValueError for a box not within the
    shape.
    """
    if data.dtype.itemsize not in (1, 2, 4, 8) or data.dtype.kind in "OSU" or data.dtype.hasobject:
        raise UsageError(f"no fingerprint for dtype {data.dtype}: it takes elements of 1, 2, 4 or 8 bytes")
    if data.size != box.numel:
        raise UsageError(f"box {box} has {box.numel} elements, its data has {data.size}")
    runs = flat_runs(shape, box)
    bits = np.ascontiguousarray(data).reshape(-1).view(f"<u{data.dtype.itemsize}")
    total = 0
    done = 0
    for index in _indices(runs):
        product = _weights_at(index)
        product *= bits[done : done + index.size]
        total += int(product.sum(dtype=np.uint64))
        done += index.size
    return total & MASK


def combine(parts: Iterable[int]) -> int:
    """The fingerprint of a whole from the shares of boxes that cover it exactly once."""
    return sum(parts) & MASK


def to_hex(fingerprint: int) -> str:
    """Sixteen lowercase hex digits. ValueError outside [0, 2**64)."""
    if not 0 <= fingerprint <= MASK:
        raise ValueError(f"not a 64-bit fingerprint: {fingerprint}")
    return f"{fingerprint:016x}"


def from_hex(text: str) -> int:
    """The inverse of `to_hex`. ValueError for anything that `to_hex` would not have written."""
    if re.fullmatch("[0-9a-f]{16}", text) is None:
        raise ValueError(f"not a fingerprint: {text!r} (it is written as 16 lowercase hex digits)")
    return int(text, 16)


def _indices(runs: Runs) -> Iterator[NDArray[np.uint64]]:
    """The flat indices of all runs in order, at most _CHUNK at a time."""
    if runs.length >= _CHUNK:
        for run in range(runs.count):
            first = int(runs.starts(run, run + 1)[0])
            for low in range(first, first + runs.length, _CHUNK):
                yield np.arange(low, min(low + _CHUNK, first + runs.length), dtype=np.uint64)
        return
    if not runs.count:
        return
    within = np.arange(runs.length, dtype=np.int64)
    rows = _CHUNK // runs.length
    for row in range(0, runs.count, rows):
        starts = runs.starts(row, min(row + rows, runs.count))
        yield (starts[:, None] + within).reshape(-1).view(np.uint64)


def _weights_at(index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """w(i) for each flat index, computed in place."""
    z = index
    z += np.uint64(GAMMA)
    z ^= z >> np.uint64(30)
    z *= np.uint64(MIX_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(MIX_2)
    z ^= z >> np.uint64(31)
    z |= np.uint64(1)
    return z
