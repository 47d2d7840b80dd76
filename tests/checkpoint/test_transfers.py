"""The way of bytes from piece to box: what NumPy's indexing says, whole, cut anywhere, run by run."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.transfers import Transfer

OFFSET = 13


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    lo = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(lo, tuple(draw(st.integers(x + 1, n)) for x, n in zip(lo, shape, strict=True)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box, int]:
    """(shape, a stored piece, a wanted box that meets it, bytes per element)."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    piece, box = draw(boxes_in(shape)), draw(boxes_in(shape))
    if piece.intersect(box) is None:
        box = piece
    return shape, piece, box, draw(st.sampled_from([1, 2, 4, 8]))


def file_and_expectation(shape: tuple[int, ...], piece: Box, box: Box, itemsize: int) -> tuple[memoryview, bytes]:
    """A file that holds the piece at OFFSET, and the bytes of the box, zero where the piece has none."""
    raw = np.random.default_rng(1).integers(1, 256, (*shape, itemsize), np.uint8)
    expected = np.zeros((*box.shape, itemsize), np.uint8)
    common = piece.intersect(box)
    assert common is not None
    expected[common.relative_to(box).slices] = raw[common.slices]
    image = bytes(OFFSET) + raw[piece.slices].tobytes() + bytes(5)
    return memoryview(image), expected.tobytes()


@given(pairs())
def test_the_common_elements_arrive_and_nothing_else_changes(case: tuple[tuple[int, ...], Box, Box, int]) -> None:
    _, piece, box, itemsize = case
    image, expected = file_and_expectation(*case)
    transfer = Transfer.between(piece, OFFSET, box, itemsize, 0)
    common = piece.intersect(box)
    assert common is not None and transfer.nbytes == common.numel * itemsize
    buffer = bytearray(len(expected))
    transfer.move(image, 0, memoryview(buffer))
    assert buffer == expected


@given(pairs(), st.data())
def test_parts_cut_anywhere_are_the_whole(case: tuple[tuple[int, ...], Box, Box, int], data: st.DataObject) -> None:
    """Runs are cut inside an element too, as a block of any size may do."""
    _, piece, box, itemsize = case
    image, expected = file_and_expectation(*case)
    transfer = Transfer.between(piece, OFFSET, box, itemsize, 0)
    ends = sorted({0, len(image), *data.draw(st.lists(st.integers(0, len(image)), max_size=5))})
    buffer = bytearray(len(expected))
    moved = 0
    for start, stop in pairwise(ends):
        for part in transfer.clip(start, stop):
            assert start <= part.offset < part.stop <= stop
            moved += part.nbytes
            part.move(image[start:stop], start, memoryview(buffer))
    assert buffer == expected and moved == transfer.nbytes


@given(pairs())
def test_runs_start_in_file_order_and_do_not_meet(case: tuple[tuple[int, ...], Box, Box, int]) -> None:
    _, piece, box, itemsize = case
    transfer = Transfer.between(piece, OFFSET, box, itemsize, 0)
    starts = transfer.starts()
    assert starts.size * transfer.length == transfer.nbytes
    assert starts[0] == transfer.offset and starts[-1] + transfer.length == transfer.stop
    assert np.all(np.diff(starts) >= transfer.length)


def test_runs_are_as_long_as_both_sides_allow() -> None:
    def grid(piece: str, wanted: str) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        found = Transfer.between(Box.parse(piece), 0, Box.parse(wanted), 4, 0)
        return found.length, found.grid

    assert grid("0:8,0:6", "0:8,0:6") == (8 * 6 * 4, ())
    assert grid("0:8,0:6", "2:4,0:6") == (2 * 6 * 4, ())
    assert grid("0:8,0:6", "0:8,2:4") == (2 * 4, ((8, 24, 8),))
    assert grid("0:8,0:3", "0:8,0:6") == (3 * 4, ((8, 12, 24),))
    assert grid("0:4,0:8,0:6", "0:4,0:8,2:4") == (2 * 4, ((32, 24, 8),))
    assert grid("0:4,0:8,0:6", "0:4,2:4,2:4") == (2 * 4, ((4, 192, 16), (2, 24, 8)))
    assert grid("", "") == (4, ())


def test_nothing_in_common_is_no_transfer() -> None:
    with pytest.raises(ValueError, match="nothing of 2:4 is in the piece 0:2"):
        Transfer.between(Box((0,), (2,)), 0, Box((2,), (4,)), 4, 0)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (30, 40), (14, 16), (12, 12)])
def test_a_cut_between_the_runs_holds_nothing(start: int, stop: int) -> None:
    assert Transfer(10, 0, 0, 4, ((3, 8, 4),)).clip(start, stop) == ()
