"""Whether low-precision weights are, bit for bit, the cast of their masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resume_kit.engines.fingerprint import TRITON

if TRITON:
    from resume_kit.engines import casts_triton

# Elements cast at a time, so that no temporary is as large as a weight.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 24

_UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Pair = tuple[torch.Tensor, torch.Tensor]


def cast_mismatches(pairs: Sequence[Pair]) -> torch.Tensor:
    """How many elements of each `data` are not, bit for bit, what torch casts its `master` to: int64 [n].

    pairs: (data, master), contiguous, of as many elements, in the same order. The result is on data's device, or on
    the CPU where they lie on several. Waits for no device, but for a master on another one than its data.
    """
    by_device: dict[torch.device, list[tuple[int, Pair]]] = {}
    for number, (data, master) in enumerate(pairs):
        by_device.setdefault(data.device, []).append((number, (data.detach(), master.detach())))
    results = []
    for device, numbered in by_device.items():
        out = torch.zeros(len(pairs), dtype=torch.int64, device=device)
        by_kernel = [entry for entry in numbered if TRITON and casts_triton.takes(*entry[1])]
        if by_kernel:
            casts_triton.add_mismatches(by_kernel, out)
        for number, (data, master) in numbered:
            if not (TRITON and casts_triton.takes(data, master)):
                _add_mismatches(data.reshape(-1), master.reshape(-1), out[number])
        results.append(out)
    if len(results) == 1:
        return results[0]
    return sum((out.cpu() for out in results), torch.zeros(len(pairs), dtype=torch.int64))


def warm_up(device: torch.device) -> None:
    """Compile what is compiled on first use: seconds on a CUDA device, else nothing."""
    if device.type == "cuda" and TRITON:
        casts_triton.warm_up(device)


def _add_mismatches(data: torch.Tensor, master: torch.Tensor, count: torch.Tensor) -> None:
    bits = _UNSIGNED[data.element_size()]
    chunk = _CPU_CHUNK if data.device.type == "cpu" else _DEVICE_CHUNK
    for low in range(0, data.numel(), chunk):
        cast = master[low : low + chunk].to(device=data.device, dtype=data.dtype)
        count += (cast.view(bits) != data[low : low + chunk].view(bits)).sum()
