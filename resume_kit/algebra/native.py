"""Weighted sums over memory of this host by the C extension `_fingerprint`, on several threads where that pays.

The extension is optional: without a compiler at installation, or on a big-endian host, NumPy and torch do the same
sums at a tenth of the speed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from resume_kit.algebra.boxes import Runs

try:
    from resume_kit.algebra import _fingerprint
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = sys.byteorder == "little"

MAX_ARRAYS = 8
_PART = 1 << 22  # elements of a box that a thread takes at a time
_MASK = (1 << 64) - 1


def instructions() -> str:
    """The instruction set that the extension runs on: 'AVX-512', 'AVX2' or 'baseline'. Only where AVAILABLE."""
    return _fingerprint.INSTRUCTIONS


@dataclass(frozen=True, slots=True)
class Arrays:
    """Up to MAX_ARRAYS arrays, by address and itemsize, that each hold the elements of one box in C order.

    Whoever makes one keeps the memory alive.
    """

    addresses: tuple[int, ...]
    itemsizes: tuple[int, ...]
    runs: Runs

    @property
    def numel(self) -> int:
        return self.runs.length * self.runs.count

    def sums(self, begin: int, end: int) -> tuple[int, ...]:
        """The weighted sum of elements begin .. end-1 of each array. Lets other threads run."""
        runs = self.runs
        return _fingerprint.weighted_sums(
            self.addresses, self.itemsizes, runs.first, runs.length, runs.grid, begin, end
        )


def weighted_sums(boxes: Sequence[Arrays], threads: int | None = None) -> list[int]:
    """The sum of w(i) * bits(x_i) mod 2**64 of each array of each box, in order.

    `threads` defaults to the cores that this process may use. Needs AVAILABLE.
    """
    parts = [
        (box, begin, min(begin + _PART, box.numel)) for box in boxes for begin in range(0, max(box.numel, 1), _PART)
    ]
    threads = min(threads or len(os.sched_getaffinity(0)), sum(box.numel for box in boxes) // _PART)
    found = _in_threads(parts, threads) if threads > 1 else [box.sums(begin, end) for box, begin, end in parts]
    totals: list[int] = []
    shares = iter(found)
    for box in boxes:
        total = [0] * len(box.addresses)
        for _ in range(0, max(box.numel, 1), _PART):
            total = [(a + b) & _MASK for a, b in zip(total, next(shares), strict=True)]
        totals += total
    return totals


def _in_threads(parts: list[tuple[Arrays, int, int]], threads: int) -> list[tuple[int, ...]]:
    """Threads for this call only: those that idle in a pool are not there any more after a fork."""
    try:
        with ThreadPoolExecutor(threads, "fingerprint") as pool:
            return list(pool.map(Arrays.sums, *zip(*parts, strict=True)))
    except RuntimeError:  # the interpreter is shutting down, and a save is still being finished
        return [box.sums(begin, end) for box, begin, end in parts]
