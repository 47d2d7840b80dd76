"""Fingerprints of live tensors (`resume_kit.algebra.fingerprint`), on the device where they lie.

By Triton kernels on CUDA devices, by the C extension for host memory, by torch operations elsewhere. Results are int64
tensors, the two's complement of the uint64 sum. Sums of results, all-reduces of them among ranks and comparisons stay
exact, for int64 arithmetic wraps in torch. Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch

from resume_kit.algebra import native
from resume_kit.algebra.boxes import Box, Runs, flat_runs
from resume_kit.algebra.fingerprint import MASK
from resume_kit.engines.fingerprint_torch import signed, torch_sums
from resume_kit.errors import UsageError

try:
    from resume_kit.engines import fingerprint_triton
except ImportError:
    TRITON = False
else:
    TRITON = True

TAKEN = frozenset(
    {torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
    | {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
    | {torch.float8_e8m0fnu}
)

Piece = tuple[torch.Tensor, Sequence[int], Box]
_Row = tuple[int, torch.Tensor, Runs]  # row of the result, contiguous data, runs of its box

_runs = lru_cache(1 << 14)(flat_runs)  # every save asks for the same boxes


def fingerprint_of_box(data: torch.Tensor, shape: Sequence[int], box: Box) -> torch.Tensor:
    """The share of `box` in the fingerprint of a tensor of `shape`: int64 [] on data's device, no host sync.

    `data` is contiguous and holds the box's elements in C-order, in any shape.
    Raises UsageError for a dtype, layout or number of elements that does not fit, ValueError for a box not
    within the shape.
    """
    return fingerprints([(data, shape, box)])[0]


def fingerprints(pieces: Iterable[Piece]) -> torch.Tensor:
    """`fingerprint_of_box` of each piece: int64 [n], on the pieces' device, or on the CPU where they lie on several."""
    return FingerprintPlan(pieces).run()


def as_unsigned(fingerprint: torch.Tensor) -> list[int]:
    """The fingerprints as Python integers in [0, 2**64), flat. Waits for the device."""
    return [value & MASK for value in fingerprint.reshape(-1).tolist()]


def backend(device: torch.device) -> str:
    """What takes the fingerprints of tensors on this device, for reports."""
    if device.type == "cuda" and TRITON:
        return "Triton"
    if device.type == "cpu" and native.AVAILABLE:
        return f"C, {native.instructions()}"
    return "torch"


def warm_up(device: torch.device) -> None:
    """Compile what is compiled on first use: seconds on a CUDA device, else nothing."""
    if device.type == "cuda" and TRITON:
        fingerprint_triton.warm_up(device)


class FingerprintPlan:
    """The fingerprints of pieces whose memory stays where it is, prepared once, to be taken any number of times.

    It keeps the tensors. Run it on the CUDA stream that it was made on, or on one that waits for that.
    Raises as `fingerprint_of_box` does.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        by_device: dict[torch.device, list[_Row]] = {}
        self._count = 0
        for data, shape, box in pieces:
            runs = _runs(tuple(shape), box)
            _require_fit(data, box, runs.count * runs.length)
            by_device.setdefault(data.device, []).append((self._count, data, runs))
            self._count += 1
        self._parts = {device: _parts(device, rows) for device, rows in by_device.items()}

    def run(self) -> torch.Tensor:
        """int64 [pieces] of what the memory holds now, on the pieces' device (on the CPU where they are several)."""
        results = []
        for device, parts in self._parts.items():
            out = torch.zeros(self._count, dtype=torch.int64, device=device)
            for add_to in parts:
                add_to(out)
            results.append(out)
        if len(results) == 1:
            return results[0]
        return sum((out.cpu() for out in results), torch.zeros(self._count, dtype=torch.int64))


def _require_fit(data: torch.Tensor, box: Box, numel: int) -> None:
    if data.dtype not in TAKEN:
        raise UsageError(f"no fingerprint for dtype {data.dtype}: it takes plain numbers of 1 to 8 bytes")
    if data.numel() != numel or not data.is_contiguous():
        raise UsageError(
            f"box {box} needs {numel} contiguous elements, its data has {data.numel()} "
            f"(shape {tuple(data.shape)}, strides {data.stride()})"
        )


def _parts(device: torch.device, rows: list[_Row]) -> list[Callable[[torch.Tensor], None]]:
    """Functions that together add each row's weighted sum to `out`."""
    if device.type == "cuda" and TRITON:
        fit = [row for row in rows if fingerprint_triton.takes(row[1], row[2])]
        others = [row for row in rows if not fingerprint_triton.takes(row[1], row[2])]
        first = [fingerprint_triton.TileSums(fit).add_to] if fit else []
        return first + ([lambda out: _add_torch_sums(others, out)] if others else [])
    if device.type == "cpu" and native.AVAILABLE:
        return [lambda out: _add_native_sums(rows, out)]
    return [lambda out: _add_torch_sums(rows, out)]


def _add_native_sums(rows: list[_Row], out: torch.Tensor) -> None:
    groups = _sharing(rows)
    boxes = [
        native.Arrays(tuple(d.data_ptr() for _, d, _ in g), tuple(d.element_size() for _, d, _ in g), g[0][2])
        for g in groups
    ]
    numbers = [number for group in groups for number, _, _ in group]
    sums = native.weighted_sums(boxes, torch.get_num_threads())
    out[numbers] = torch.tensor([signed(value) for value in sums], dtype=torch.int64)


def _add_torch_sums(rows: list[_Row], out: torch.Tensor) -> None:
    for group in _sharing(rows):
        sums = torch_sums(group[0][2], [data for _, data, _ in group])
        for (number, _, _), value in zip(group, sums, strict=True):
            out[number] += value


def _sharing(rows: list[_Row]) -> list[list[_Row]]:
    """Rows of the same runs together, a few at a time: they share the computed weights."""
    by_runs: dict[Runs, list[_Row]] = {}
    for row in rows:
        by_runs.setdefault(row[2], []).append(row)
    most = native.MAX_ARRAYS
    return [group[low : low + most] for group in by_runs.values() for low in range(0, len(group), most)]
