from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra import fingerprint as module
from resume_kit.algebra import native
from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.algebra.fingerprint import combine, fingerprint_of_box, from_hex, to_hex, weights
from resume_kit.errors import UsageError

DTYPES = ["?", "i1", "u1", "i2", "f2", "u4", "f4", "i8", "f8", "c8"]
SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@pytest.fixture(params=["C", "NumPy"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here runs by the C extension and without it."""
    if request.param == "C" and not native.AVAILABLE:
        pytest.skip("the C extension was not built (no compiler?)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "AVAILABLE", request.param == "C")
        yield


def random_array(shape: tuple[int, ...], dtype: str, rng: random.Random) -> np.ndarray:
    if dtype == "?":
        return np.array([rng.random() < 0.5 for _ in range(math.prod(shape))], bool).reshape(shape)
    return np.frombuffer(rng.randbytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def random_boxes(shape: tuple[int, ...], rng: random.Random) -> list[Box]:
    """A grid on even seeds, flat ranges otherwise."""
    if rng.random() < 0.5:
        cuts = sorted(rng.randrange(math.prod(shape) + 1) for _ in range(3))
        edges = [0, *cuts, math.prod(shape)]
        return [b for i in range(4) for b in boxes_of_flat_range(shape, edges[i], edges[i + 1])]
    boxes = [Box.whole(shape)]
    for axis, extent in enumerate(shape):
        if extent > 1 and rng.random() < 0.7:
            at = rng.randrange(1, extent)
            boxes = [part for box in boxes for part in box.split(axis, at)]
    return boxes


def plain_fingerprint(array: np.ndarray) -> int:
    """The formula, word by word, in Python integers."""
    mask = 2**64 - 1
    total = 0
    size = array.dtype.itemsize
    raw = array.tobytes()
    for i in range(array.size):
        z = ((i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 32)) * 0xD6E8FEB86659FD93) & mask
        total += ((z ^ (z >> 32)) | 1) * int.from_bytes(raw[i * size : (i + 1) * size], "little")
    return total & mask


def whole_fingerprint(array: np.ndarray) -> int:
    return fingerprint_of_box(array, array.shape, Box.whole(array.shape))


@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_fingerprint_is_its_formula(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    array = random_array(shape, dtype, random.Random(seed))
    assert whole_fingerprint(array) == plain_fingerprint(array)


@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_no_split_changes_the_fingerprint(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    array = random_array(shape, dtype, rng)
    parts = [fingerprint_of_box(array[box.slices], shape, box) for box in random_boxes(shape, rng)]
    assert combine(parts) == whole_fingerprint(array)


@given(SHAPES, st.sampled_from(DTYPES[1:]), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_a_single_bit_anywhere_changes_the_fingerprint(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    array = random_array(shape, dtype, rng)
    raw = bytearray(array.tobytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    assert whole_fingerprint(np.frombuffer(bytes(raw), dtype).reshape(shape)) != whole_fingerprint(array)


@given(st.integers(2, 200), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_swapped_elements_change_the_fingerprint(count: int, seed: int) -> None:
    rng = random.Random(seed)
    array = np.array([rng.randrange(1, 2**32) for _ in range(count)], np.uint32)
    a, b = rng.sample(range(count), 2)
    swapped = array.copy()
    swapped[[a, b]] = array[[b, a]]
    assert (whole_fingerprint(swapped) != whole_fingerprint(array)) == (array[a] != array[b])


@pytest.mark.parametrize("text", ["0:40,0:50", "3:9,0:50", "0:40,7:31", "1:40,0:1"])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    array = np.random.default_rng(0).random((40, 50), np.float32)
    box = Box.parse(text)
    expected = fingerprint_of_box(array[box.slices], array.shape, box)
    for chunk in (1, 7, 50, 64):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        monkeypatch.setattr(native, "_PART", chunk)
        assert fingerprint_of_box(array[box.slices], array.shape, box) == expected


def test_strides_and_empty_boxes_are_taken() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert whole_fingerprint(array.T) == whole_fingerprint(array.T.copy())
    assert fingerprint_of_box(array[:0], (3, 4), Box.parse("1:1,0:4")) == 0


def test_far_indices_do_not_overflow() -> None:
    shape, at = (1 << 40,), (1 << 40) - 3
    data = np.array([1, 0, 0], np.uint8)
    assert fingerprint_of_box(data, shape, Box((at,), (at + 3,))) == int(weights(at, 1)[0])


@pytest.mark.parametrize("dtype", ["c16", "O", "S4", "U1", "V3"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(UsageError, match="dtype"):
        fingerprint_of_box(np.zeros(2, dtype), (2,), Box.whole((2,)))


def test_data_that_does_not_fit_its_box_is_refused() -> None:
    with pytest.raises(UsageError, match="has 4 elements, its data has 3"):
        fingerprint_of_box(np.zeros(3), (4,), Box.whole((4,)))


@given(st.integers(0, 2**64 - 1))
def test_hex_round_trips(value: int) -> None:
    assert from_hex(to_hex(value)) == value and len(to_hex(value)) == 16


@pytest.mark.parametrize("text", ["", "0" * 15, "0" * 17, "A" * 16, "0" * 16 + "\n", "0x" + "0" * 14])
def test_other_text_is_no_fingerprint(text: str) -> None:
    with pytest.raises(ValueError, match="not a fingerprint"):
        from_hex(text)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_other_integers_are_no_fingerprint(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        to_hex(value)
