"""The fingerprint of `resume_kit.algebra.fingerprint` in torch, on the device where the tensor lives.

Nothing here waits for the device: results are int64 tensors, the two's complement of the uint64 sum. Sums of
results, all-reduces of them among ranks and comparisons stay exact, for int64 arithmetic wraps in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from resume_kit.algebra.boxes import Box, Runs, flat_runs
from resume_kit.algebra.fingerprint import GAMMA, MASK, MIX_1, MIX_2
from resume_kit.errors import UsageError

# Elements at a time. For fp32 on 2 shared EPYC cores: 2**16 0.6, 2**17 0.7, 2**18 0.8 to 0.9, 2**20 0.6 GB/s;
# when three tensors share w(i): 1.1, 1.5, 1.7, 1.8. A GPU's chunk has to outweigh its launches.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 20
_GROUP = 8  # pieces of one box that share the computed weights

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}
_TAKEN = frozenset(
    {torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
    | {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
    | {torch.float8_e8m0fnu}
)

Piece = tuple[torch.Tensor, Sequence[int], Box]


def fingerprint_of_box(data: torch.Tensor, shape: Sequence[int], box: Box) -> torch.Tensor:
    """The share of `box` in the fingerprint of a tensor of `shape`: int64 [] on data's device, no host sync.

    `data` is contiguous and holds the box's elements in C-order, in any shape.
    Raises UsageError for a dtype, layout or number of elements that does not fit, ValueError for a box not
    within the shape.
    """
    return fingerprints([(data, shape, box)])[0]


def fingerprints(pieces: Iterable[Piece]) -> torch.Tensor:
    """`fingerprint_of_box` of each piece: int64 [n], on the pieces' device, or on the CPU where they lie on several.

    Neighbours with the same shape and box, as a master weight and its moments have, share their w(i).
    """
    sums: list[torch.Tensor] = []
    scratches: dict[torch.device, _Scratch] = {}
    for (shape, box, device), group in itertools.groupby(pieces, key=_place):
        if device not in scratches:
            scratches[device] = _Scratch(device, _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK)
        runs = flat_runs(shape, box)
        while some := list(itertools.islice(group, _GROUP)):
            sums.append(_sum(runs, [_bits(data, box) for data, _, _ in some], scratches[device]))
    if len(scratches) > 1:
        sums = [part.cpu() for part in sums]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)


def as_unsigned(fingerprint: torch.Tensor) -> list[int]:
    """The fingerprints as Python integers in [0, 2**64), flat. Waits for the device."""
    return [value & MASK for value in fingerprint.reshape(-1).tolist()]


@dataclass(slots=True)
class _Scratch:
    """The buffers of one pass, int64 [chunk] each: a constant ramp, the weights, and two for any use."""

    device: torch.device
    chunk: int
    ramp: torch.Tensor = field(init=False)
    weight: torch.Tensor = field(init=False)
    spare: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ramp = torch.arange(self.chunk, dtype=torch.int64, device=self.device)
        self.weight = torch.empty_like(self.ramp)
        self.spare = torch.empty_like(self.ramp)


def _place(piece: Piece) -> tuple[tuple[int, ...], Box, torch.device]:
    data, shape, box = piece
    return tuple(shape), box, data.device


def _bits(data: torch.Tensor, box: Box) -> torch.Tensor:
    """The elements as a flat view of integers that widen without a sign."""
    if data.dtype not in _TAKEN:
        raise UsageError(f"no fingerprint for dtype {data.dtype}: it takes plain numbers of 1 to 8 bytes")
    if data.numel() != box.numel or not data.is_contiguous():
        raise UsageError(
            f"box {box} needs {box.numel} contiguous elements, its data has {data.numel()} "
            f"(shape {tuple(data.shape)}, strides {data.stride()})"
        )
    return data.detach().reshape(-1).view(_UNSIGNED[data.dtype.itemsize])


def _sum(runs: Runs, many: Sequence[torch.Tensor], scratch: _Scratch) -> torch.Tensor:
    """The weighted sums of tensors that share their runs, int64 [len(many)]."""
    totals = torch.zeros(len(many), dtype=torch.int64, device=scratch.device)
    done = 0
    for weight in _weights(runs, scratch):
        product = scratch.spare[: weight.numel()]
        for total, bits in zip(totals, many, strict=True):
            product.copy_(bits[done : done + weight.numel()])
            total += product.mul_(weight).sum()
        done += weight.numel()
    return totals


def _weights(runs: Runs, scratch: _Scratch) -> Iterator[torch.Tensor]:
    """w(i) for the flat indices of all runs in order, at most a chunk at a time, each in the same buffer."""
    if not runs.count:
        return
    if runs.count == 1 or runs.length >= scratch.chunk:
        for run in range(runs.count):
            first = int(runs.starts(run, run + 1)[0])
            for low in range(0, runs.length, scratch.chunk):
                z = scratch.weight[: min(scratch.chunk, runs.length - low)]
                torch.add(scratch.ramp[: z.numel()], _signed(first + low + GAMMA), out=z)
                yield _mix(z, scratch)
        return
    within = scratch.ramp[: runs.length]
    rows = scratch.chunk // runs.length
    for row in range(0, runs.count, rows):
        numbers = scratch.ramp[: min(rows, runs.count - row)] + row
        starts = torch.full_like(numbers, _signed(runs.first + GAMMA))
        for inner, count, stride in runs.grid:
            starts += numbers // inner % count * stride
        z = scratch.weight[: numbers.numel() * runs.length]
        torch.add(starts[:, None], within, out=z.view(-1, runs.length))
        yield _mix(z, scratch)


def _mix(z: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """splitmix64's output for states z, made odd, in place."""
    shifted = scratch.spare[: z.numel()]
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, None)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        z ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            z *= _signed(factor)
    return z.bitwise_or_(1)


def _signed(value: int) -> int:
    """The two's complement of an integer mod 2**64, which is how torch takes a constant."""
    return (value + (1 << 63) & MASK) - (1 << 63)
