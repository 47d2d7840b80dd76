"""Fingerprints at the speed of device memory: the tables and launches of `triton_kernels.sum_tiles`.

One launch an element size takes all pieces of long runs, another those of short runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from resume_kit.algebra.boxes import Runs
from resume_kit.engines import fingerprint_tiles as tiles
from resume_kit.engines.triton_kernels import sum_tiles

BLOCK, UNROLL, WARPS = 1024, 4, 4
"""Positions that a program adds up side by side, 8 a thread; how many such blocks a step of its loop has; warps."""


class TileSums:
    """The weighted sums of fixed pieces of memory of one device; it keeps the tensors.

    pieces: (row of the result, contiguous data, runs of its box), each of which `takes`.
    """

    def __init__(self, pieces: Sequence[tuple[int, torch.Tensor, Runs]]) -> None:
        self._kept = pieces
        kinds: list[tuple[int, bool, int]] = []  # element size, short runs, rows
        tables: list[NDArray[np.int64]] = []
        for size in sorted({data.element_size() for _, data, _ in pieces}):
            same = [(row, data.data_ptr(), runs) for row, data, runs in pieces if data.element_size() == size]
            for grid, table in enumerate(tiles.tables(same, size)):
                if len(table):
                    kinds.append((size, bool(grid), len(table)))
                    tables.append(table)
        self._launches = list(zip(kinds, to_device(tables, pieces[0][1].device), strict=True))

    def add_to(self, out: torch.Tensor) -> None:
        """Add each piece's weighted sum to its row of `out`, int64 on the pieces' device, on its current stream."""
        with torch.cuda.device(out.get_device()):
            for (size, grid, rows), table in self._launches:
                sum_tiles[(rows,)](table, out, SIZE=size, GRID=grid, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=WARPS)


def takes(data: torch.Tensor, runs: Runs) -> bool:
    """Whether this piece can be one of `TileSums`."""
    return tiles.takes(data.data_ptr(), data.element_size(), runs)


def to_device(tables: Sequence[NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """The tables on the device, flat, by one copy from pinned memory that nothing waits for."""
    # Each begins at an even number, for Triton compiles another kernel for a pointer that is not a multiple of 16.
    starts = np.cumsum([0, *(table.size + table.size % 2 for table in tables)]).tolist()
    memory = torch.empty(starts[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
    for start, table in zip(starts, tables, strict=False):
        memory.numpy()[start : start + table.size] = table.reshape(-1)
    moved = memory.to(device, non_blocking=True)
    return [moved[start : start + table.size] for start, table in zip(starts, tables, strict=False)]


def warm_up(device: torch.device) -> None:
    """Compile the kernels of all element sizes."""
    everything: list[Any] = [
        (0, torch.zeros(8, dtype=dtype, device=device), runs)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)
        for runs in (Runs(0, 8, 1, ()), Runs(0, 4, 2, ((1, 2, 6),)))
    ]
    TileSums(everything).add_to(torch.zeros(2, dtype=torch.int64, device=device))
