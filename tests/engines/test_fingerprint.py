from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from resume_kit.algebra import fingerprint as reference  # noqa: E402
from resume_kit.algebra import native  # noqa: E402
from resume_kit.algebra.boxes import Box, boxes_of_flat_range  # noqa: E402
from resume_kit.engines import fingerprint as module  # noqa: E402
from resume_kit.engines import fingerprint_torch  # noqa: E402
from resume_kit.engines.fingerprint import FingerprintPlan, as_unsigned, fingerprint_of_box, fingerprints  # noqa: E402
from resume_kit.errors import UsageError  # noqa: E402

DTYPES = sorted(module.TAKEN, key=str)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=["C", "torch"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here runs by the C extension and without it (and, with a CUDA device, by Triton and without)."""
    if request.param == "C" and not native.AVAILABLE:
        pytest.skip("the C extension was not built (no compiler?)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "AVAILABLE", request.param == "C")
        patch.setattr(module, "TRITON", module.TRITON and request.param == "C")
        yield


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes, NaN patterns and all."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2 if dtype is torch.bool else 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def numpy_fingerprint(data: torch.Tensor, shape: tuple[int, ...], box: Box) -> int:
    raw = data.contiguous().reshape(-1).view(torch.uint8).numpy()
    return reference.fingerprint_of_box(raw.view(f"u{data.dtype.itemsize}"), shape, box)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["0:6,0:5,0:8", "2:3,1:4,0:8", "1:5,0:5,2:7", "0:6,1:3,3:4", "0:0,0:5,0:8"])
def test_torch_equals_numpy(dtype: torch.dtype, text: str, device: str) -> None:
    tensor, box = random_tensor((6, 5, 8), dtype, 7), Box.parse(text)
    piece = tensor[box.slices].contiguous()
    result = fingerprint_of_box(piece.to(device), tensor.shape, box)
    assert result.dtype is torch.int64 and result.shape == () and result.device.type == device
    assert as_unsigned(result) == [numpy_fingerprint(piece, (6, 5, 8), box)]


@given(
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_no_split_changes_the_fingerprint(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    tensor = random_tensor(shape, dtype, seed)
    at = data.draw(st.integers(0, tensor.numel()))
    flat = [*boxes_of_flat_range(shape, 0, at), *boxes_of_flat_range(shape, at, tensor.numel())]
    grid = [Box.whole(shape)]
    for axis, extent in enumerate(shape):
        if extent > 1:
            cut = data.draw(st.integers(1, extent - 1))
            grid = [part for box in grid for part in box.split(axis, cut)]
    expected = numpy_fingerprint(tensor, shape, Box.whole(shape))
    for boxes in (flat, grid):
        shares = fingerprints((tensor[box.slices].contiguous(), shape, box) for box in boxes)
        assert as_unsigned(shares.sum()) == [expected]
        assert reference.combine(as_unsigned(shares)) == expected


@pytest.mark.parametrize("text", ["0:40,0:50", "3:9,0:50", "0:40,7:31", "1:40,0:1"])
@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(fingerprint_torch, "_CPU_CHUNK", chunk)
    tensor, box = random_tensor((40, 50), torch.bfloat16, 3), Box.parse(text)
    piece = tensor[box.slices].contiguous()
    assert as_unsigned(fingerprint_of_box(piece, (40, 50), box)) == [numpy_fingerprint(piece, (40, 50), box)]


def test_pieces_that_share_a_box_keep_their_own_results_in_order() -> None:
    box, other = Box.parse("0:9,2:5"), Box.parse("4:5,0:7")
    dtypes = [torch.float32, torch.bfloat16, torch.int64] * 7
    pieces = [(random_tensor(box.shape, dtype, i), (9, 7), box) for i, dtype in enumerate(dtypes)]
    pieces.insert(4, (random_tensor(other.shape, torch.float16, 99), (9, 7), other))
    pieces.append((random_tensor((), torch.float32, 5), (), Box((), ())))
    assert as_unsigned(fingerprints(iter(pieces))) == [numpy_fingerprint(*piece) for piece in pieces]
    assert fingerprints([]).tolist() == []


@given(st.integers(0, 23), st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_a_single_bit_anywhere_changes_the_fingerprint(element: int, bit: int) -> None:
    tensor, box = random_tensor((4, 6), torch.bfloat16, 11), Box.whole((4, 6))
    flipped = tensor.clone()
    flipped.view(torch.int16).view(-1)[element] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
    assert not torch.equal(flipped.view(torch.int16), tensor.view(torch.int16))
    assert fingerprint_of_box(flipped, (4, 6), box) != fingerprint_of_box(tensor, (4, 6), box)


def test_the_data_and_its_autograd_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    result = fingerprint_of_box(weight, (4, 6), Box.whole((4, 6)))
    assert not result.requires_grad and weight.grad is None and torch.equal(weight.detach(), before)


def test_far_indices_do_not_overflow() -> None:
    shape, at = (1 << 20, 1 << 20), (1 << 20) - 3
    box = Box((at, at), (at + 3, at + 2))
    piece = random_tensor(box.shape, torch.float32, 2)
    assert as_unsigned(fingerprint_of_box(piece, shape, box)) == [numpy_fingerprint(piece, shape, box)]


def test_misfits_are_refused() -> None:
    box = Box.whole((2, 3))
    with pytest.raises(UsageError, match="dtype"):
        fingerprint_of_box(torch.zeros(2, 3, dtype=torch.complex128), (2, 3), box)
    with pytest.raises(UsageError, match="6 contiguous elements"):
        fingerprint_of_box(torch.zeros(5), (2, 3), box)
    with pytest.raises(UsageError, match="contiguous"):
        fingerprint_of_box(torch.zeros(3, 2).t(), (2, 3), box)
    with pytest.raises(ValueError, match="not within shape"):
        fingerprint_of_box(torch.zeros(2, 3), (2, 2), box)


def test_a_plan_reads_what_the_memory_holds_when_it_runs() -> None:
    box, shape = Box.parse("0:9,2:5"), (9, 7)
    data = random_tensor(box.shape, torch.bfloat16, 1)
    plan = FingerprintPlan([(data, shape, box), (data[:0], shape, Box.parse("3:3,0:7"))])
    first = as_unsigned(plan.run())
    assert first == as_unsigned(plan.run()) == [numpy_fingerprint(data, shape, box), 0]
    data.view(torch.int16)[3, 1] ^= 1
    assert as_unsigned(plan.run()) == [numpy_fingerprint(data, shape, box), 0] != first


def test_the_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert module.backend(cpu) == (f"C, {native.instructions()}" if native.AVAILABLE else "torch")
    monkeypatch.setattr(module, "TRITON", True)
    assert module.backend(cuda) == "Triton"
    monkeypatch.setattr(module, "TRITON", False)
    assert module.backend(cuda) == "torch"
