"""The fingerprint that no sharding can change: its definition, its reference in NumPy, and the one for host memory.

    F(T) = sum over i of w(i) * bits(x_i)  mod 2**64

    z    = (i + 1) * STEP  mod 2**64
    z    = (z ^ (z >> 32)) * MIX  mod 2**64
    w(i) = (z ^ (z >> 32)) | 1

i is the global C-order flat index; bits(x) is the element's bytes read as a little-endian unsigned integer,
zero-extended to 64 bits. The weights are a counter behind a mixer of one multiplication, after those of splitmix64
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), whose own two multiplications and
odd shifts would make a GPU wait for its integer units instead of its memory. That the weights are as good for this
end, tests/algebra/test_weights.py looks at: each bit of i changes each bit of w but the last for half of all i, and
w(i + d) - w(i) has no pattern.

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

from resume_kit.algebra import native
from resume_kit.algebra.boxes import Box, Runs, flat_runs
from resume_kit.errors import UsageError

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
MIX = 0xD6E8FEB86659FD93

_CHUNK = 1 << 17  # elements at a time; a few 8-byte arrays of this size is all the memory it takes


def weights(offset: int, count: int) -> NDArray[np.uint64]:
    """w(i) for the flat indices offset .. offset+count-1, uint64 [count]."""
    return weights_at(np.arange(offset, offset + count, dtype=np.uint64))


def weights_at(index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """w(i) for each flat index i, uint64 of the same shape."""
    z = index + np.uint64(1)
    z *= np.uint64(STEP)
    z ^= z >> np.uint64(32)
    z *= np.uint64(MIX)
    z ^= z >> np.uint64(32)
    z |= np.uint64(1)
    return z


def fingerprint_of_box(data: NDArray[Any], shape: Sequence[int], box: Box) -> int:
    """The share of `box` in the fingerprint of a tensor of `shape`, in [0, 2**64).

    `data` holds the box's elements in C-order, in any shape, of any fixed-size dtype of 1, 2, 4 or 8 bytes.
    Raises UsageError for another dtype or a wrong number of elements, ValueError for a box not within the
    shape.
    """
    bits, runs = _bits(data, box), flat_runs(shape, box)
    if not native.AVAILABLE:
        return reference_sum(bits, runs)
    return native.weighted_sums([native.Arrays((bits.ctypes.data,), (bits.itemsize,), runs)])[0]


def backend() -> str:
    """What `fingerprint_of_box` runs on, for reports."""
    return f"C, {native.instructions()}" if native.AVAILABLE else "NumPy"


def reference_sum(bits: NDArray[Any], runs: Runs) -> int:
    """The weighted sum of a box's elements (unsigned integers, flat, in C-order), in NumPy alone."""
    total = 0
    done = 0
    for index in _indices(runs):
        product = weights_at(index)
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


def _bits(data: NDArray[Any], box: Box) -> NDArray[Any]:
    """The elements as a flat array of unsigned integers of their own width."""
    if data.dtype.itemsize not in (1, 2, 4, 8) or data.dtype.kind in "OSU" or data.dtype.hasobject:
        raise UsageError(f"no fingerprint for dtype {data.dtype}: it takes elements of 1, 2, 4 or 8 bytes")
    if data.size != box.numel:
        raise UsageError(f"box {box} has {box.numel} elements, its data has {data.size}")
    return np.ascontiguousarray(data).reshape(-1).view(f"<u{data.dtype.itemsize}")


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
