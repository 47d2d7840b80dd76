"""The Triton kernels against the references. Without a CUDA device: TRITON_INTERPRET=1 where Triton is installed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="Triton comes with builds of torch for CUDA")
if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from resume_kit.algebra import fingerprint as reference  # noqa: E402
from resume_kit.algebra.boxes import Box, flat_runs  # noqa: E402
from resume_kit.engines import casts_triton, fingerprint_triton  # noqa: E402
from resume_kit.engines.fingerprint import as_unsigned  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def noise(count: int, dtype: torch.dtype, odd: int = 0) -> torch.Tensor:
    """Random bits, beginning `odd` elements after a multiple of 16 bytes."""
    raw = np.random.default_rng(count).integers(0, 256, (count + odd + 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).to(DEVICE).view(dtype)[odd:-1]


def on_tiles(pieces: list[tuple[torch.Tensor, tuple[int, ...], Box]]) -> list[int]:
    rows = [(n, data, flat_runs(shape, box)) for n, (data, shape, box) in enumerate(pieces)]
    out = torch.zeros(len(pieces), dtype=torch.int64, device=DEVICE)
    fingerprint_triton.TileSums(rows).add_to(out)
    return as_unsigned(out)


def in_numpy(pieces: list[tuple[torch.Tensor, tuple[int, ...], Box]]) -> list[int]:
    found = []
    for data, shape, box in pieces:
        bits = data.cpu().contiguous().view(torch.uint8).numpy().view(f"u{data.element_size()}")
        found.append(reference.reference_sum(bits, flat_runs(shape, box)))
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_long_runs(dtype: torch.dtype) -> None:
    shape = (1 << 40,)
    pieces = []
    for odd, first, count in [
        (0, 0, 5000),
        (1, 0, 70000),
        (3, (1 << 32) - 3000, 6001),
        (0, 12345, 1),
        (0, 9, 0),
    ]:
        pieces.append((noise(count, dtype, odd), shape, Box((first,), (first + count,))))
    assert on_tiles(pieces) == in_numpy(pieces)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_grids(dtype: torch.dtype) -> None:
    pieces = []
    for odd, shape, text in [
        (0, (40, 5000), "0:40,7:1203"),
        (1, (4000, 30), "9:3999,4:5"),
        (3, (9, 20, 4, 50), "0:9,3:17,1:3,20:43"),
        (1, (3, 40000), "0:3,3:9003"),
        (0, (1 << 20, 1 << 20), "1048570:1048573,1048571:1048576"),
    ]:
        box = Box.parse(text)
        pieces.append((noise(box.numel, dtype, odd), shape, box))
    assert on_tiles(pieces) == in_numpy(pieces)


def test_one_call_takes_all_element_sizes_and_keeps_the_order() -> None:
    whole, column = Box.whole((60, 50)), Box.parse("0:60,3:20")
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.int64] * 3
    pieces = [(noise(box.numel, t, n % 3), (60, 50), box) for box in (whole, column) for n, t in enumerate(dtypes)]
    assert on_tiles(pieces) == in_numpy(pieces)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("odd", "count"), [(0, 70000), (1, 5000), (0, 3)])
def test_miscasts_are_counted(dtype: torch.dtype, odd: int, count: int) -> None:
    master = noise(count, torch.float32, odd)
    if DEVICE.type == "cpu":
        if dtype is torch.bfloat16:
            pytest.skip("the interpreter cuts off where it should round to bf16")
        master = torch.where(master.isnan(), torch.zeros_like(master), master)  # its NaNs are its own too
    data = torch.cat([torch.zeros(odd, dtype=dtype, device=DEVICE), master.to(dtype)])[odd:]
    changed = data.clone()
    for at in {0, count // 2, count - 1}:
        changed.view(torch.int16)[at] ^= 1
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    casts_triton.add_mismatches([(1, (changed, master)), (0, (data, master))], out)
    assert out.tolist() == [0, len({0, count // 2, count - 1})]
