"""The fingerprint of `resume_kit.algebra.fingerprint` in torch operations: for any device, not fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from resume_kit.algebra.boxes import Runs
from resume_kit.algebra.fingerprint import MASK, MIX, STEP

# Elements at a time. For fp32 on 2 shared EPYC cores: 2**16 0.6, 2**17 0.7, 2**18 0.8 to 0.9, 2**20 0.6 GB/s;
# when three tensors share w(i): 1.1, 1.5, 1.7, 1.8. A GPU's chunk has to outweigh its launches.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 20

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}


def torch_sums(runs: Runs, many: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum of each of `many`, which hold the elements of one box in C order on one device: int64 [n]."""
    device = many[0].device
    scratch = _Scratch(device, _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK)
    bits = [data.detach().reshape(-1).view(_UNSIGNED[data.dtype.itemsize]) for data in many]
    totals = torch.zeros(len(many), dtype=torch.int64, device=device)
    done = 0
    for weight in _weights(runs, scratch):
        product = scratch.spare[: weight.numel()]
        for total, part in zip(totals, bits, strict=True):
            product.copy_(part[done : done + weight.numel()])
            total += product.mul_(weight).sum()
        done += weight.numel()
    return totals


def signed(value: int) -> int:
    """The two's complement of an integer mod 2**64, which is how torch takes a constant."""
    return (value + (1 << 63) & MASK) - (1 << 63)


@dataclass(slots=True)
class _Scratch:
    """The buffers of one pass, int64 [chunk] each: 0, 1, 2, …; their products with STEP; weights; one for any use."""

    device: torch.device
    chunk: int
    ramp: torch.Tensor = field(init=False)
    steps: torch.Tensor = field(init=False)
    weight: torch.Tensor = field(init=False)
    spare: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ramp = torch.arange(self.chunk, dtype=torch.int64, device=self.device)
        self.steps = self.ramp * signed(STEP)
        self.weight = torch.empty_like(self.ramp)
        self.spare = torch.empty_like(self.ramp)


def _weights(runs: Runs, scratch: _Scratch) -> Iterator[torch.Tensor]:
    """w(i) for the flat indices of all runs in order, at most a chunk at a time, each in the same buffer."""
    if not runs.count:
        return
    if runs.count == 1 or runs.length >= scratch.chunk:
        for run in range(runs.count):
            first = int(runs.starts(run, run + 1)[0])
            for low in range(0, runs.length, scratch.chunk):
                z = scratch.weight[: min(scratch.chunk, runs.length - low)]
                torch.add(scratch.steps[: z.numel()], signed((first + low + 1) * STEP & MASK), out=z)
                yield _mix(z, scratch)
        return
    within = scratch.steps[: runs.length]
    rows = scratch.chunk // runs.length
    for row in range(0, runs.count, rows):
        numbers = scratch.ramp[: min(rows, runs.count - row)] + row
        starts = torch.full_like(numbers, runs.first + 1)
        for inner, count, stride in runs.grid:
            starts += numbers // inner % count * stride
        z = scratch.weight[: numbers.numel() * runs.length]
        torch.add((starts * signed(STEP))[:, None], within, out=z.view(-1, runs.length))
        yield _mix(z, scratch)


def _mix(z: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """w from (i + 1) * STEP, in place."""
    z ^= _upper(z, scratch)
    z *= signed(MIX)
    z ^= _upper(z, scratch)
    return z.bitwise_or_(1)


def _upper(z: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """z >> 32 without a sign."""
    shifted = scratch.spare[: z.numel()]
    torch.bitwise_right_shift(z, 32, out=shifted)
    return shifted.bitwise_and_((1 << 32) - 1)
