"""Casts checked at the speed of device memory: the tables and launches of `triton_kernels.count_miscasts`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from resume_kit.engines.fingerprint_triton import BLOCK, WARPS, to_device
from resume_kit.engines.triton_kernels import count_miscasts

_TILE = 1 << 16  # elements
_VECTOR = 16  # bytes of a load


def takes(data: torch.Tensor, master: torch.Tensor) -> bool:
    """Whether `add_mismatches` takes this pair: fp16 or bf16 from fp32, on one CUDA device."""
    return (
        data.is_cuda
        and data.device == master.device
        and data.dtype in (torch.float16, torch.bfloat16)
        and master.dtype is torch.float32
        and data.is_contiguous()
        and master.is_contiguous()
    )


def add_mismatches(pairs: Sequence[tuple[int, tuple[torch.Tensor, torch.Tensor]]], out: torch.Tensor) -> None:
    """Add to each pair's row of `out` how many elements of data are not the cast of master.

    pairs: (row of out, (data, master)). On the current stream of their device.
    """
    rows = np.array([(d.data_ptr(), m.data_ptr(), d.numel(), n) for n, (d, m) in pairs], np.int64)
    half = np.array([data.dtype is torch.float16 for _, (data, _) in pairs])
    aligned = (rows[:, 0] % _VECTOR == 0) & (rows[:, 1] % _VECTOR == 0)
    kinds = [(a, h) for a in (False, True) for h in (False, True)]
    tables = [_tiles(rows[(aligned == a) & (half == h)], _VECTOR if a else 1) for a, h in kinds]
    with torch.cuda.device(out.get_device()):
        for (is_aligned, is_half), rows, table in zip(kinds, tables, to_device(tables, out.device), strict=True):
            if len(rows):
                count_miscasts[(len(rows),)](table, out, ALIGNED=is_aligned, HALF=is_half, BLOCK=BLOCK, num_warps=WARPS)


def warm_up(device: torch.device) -> None:
    """Compile the kernels."""
    master = torch.zeros(8, device=device)
    pairs = [(0, (master[at:].to(dtype), master[at:])) for dtype in (torch.float16, torch.bfloat16) for at in (0, 1)]
    add_mismatches(pairs, torch.zeros(1, dtype=torch.int64, device=device))


def _tiles(rows: np.ndarray, unit: int) -> np.ndarray:
    """Rows (address, address of masters, elements, row of the result) as tiles, addresses in units of `unit` bytes."""
    times = -(-rows[:, 2] // _TILE)
    which = np.repeat(np.arange(len(rows)), times)
    before = (np.arange(which.size) - np.repeat(np.cumsum(times) - times, times)) * _TILE
    data, master, size, number = rows[which].T
    return np.stack(
        [(data + before * 2) // unit, (master + before * 4) // unit, np.minimum(size - before, _TILE), number], 1
    )
