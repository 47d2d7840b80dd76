"""The plan of a reading: every wanted byte arrives, hardly another is read, and what is whole is checked."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint import readplan
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.readplan import ReadPlan, Source, plan_reads
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.errors import CheckpointDamaged


def digests(size: int, block: int) -> FileDigest:
    return FileDigest(size, block, ("",) * -(-size // block))


def source(size: int, block: int, *wanted: tuple[int, int], stored: int | None = None, file: str = "f") -> Source:
    """Each range of the file wanted in a buffer of its own; as if more were stored, unless said."""
    transfers = tuple(Transfer(start, number, 0, stop - start) for number, (start, stop) in enumerate(wanted))
    return Source(file, digests(size, block), size + 1 if stored is None else stored, transfers)


def reads(plan: ReadPlan, number: int = 0) -> list[tuple[int, int]]:
    return [(start, stop) for window in plan.windows(number) for start, stop in window.reads.tolist()]


# -- any stored boxes, any wanted boxes


@st.composite
def split_boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Every element in one box: flat ranges, as ZeRO owns them, or boxes cut at random."""
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, math.prod(shape)), max_size=3)))
        edges = pairwise([0, *cuts, math.prod(shape)])
        return [box for start, stop in edges for box in boxes_of_flat_range(shape, start, stop)]
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axes = [axis for axis, extent in enumerate(box.shape) if extent > 1]
        if axes:
            axis = draw(st.sampled_from(axes))
            boxes += box.split(axis, draw(st.integers(box.lo[axis] + 1, box.hi[axis] - 1)))
        else:
            boxes.append(box)
    return boxes


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    lo = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(lo, tuple(draw(st.integers(x + 1, n)) for x, n in zip(lo, shape, strict=True)))


class Files:
    """Data files that hold the pieces of some tensors, and what is wanted of them."""

    def __init__(self, block: int, headers: list[int]) -> None:
        self.block = block
        self.images = [bytearray(b"\xff" * size) for size in headers]
        self.stored = [0] * len(headers)
        self.transfers: list[list[Transfer]] = [[] for _ in headers]
        self.expected: list[bytes] = []

    def add(self, raw: np.ndarray, pieces: list[tuple[int, Box]], wanted: list[Box]) -> None:
        targets = range(len(self.expected), len(self.expected) + len(wanted))
        self.expected += [raw[box.slices].tobytes() for box in wanted]
        for number, piece in pieces:
            offset, data = len(self.images[number]), raw[piece.slices].tobytes()
            self.images[number] += data
            self.stored[number] += len(data)
            for target, box in zip(targets, wanted, strict=True):
                if piece.intersect(box) is not None:
                    transfer = Transfer.between(piece, offset, box, raw.shape[-1], target)
                    self.transfers[number].append(transfer)

    def sources(self) -> list[Source]:
        return [
            Source(f"file {number}", digests(len(image), self.block), stored, tuple(transfers))
            for number, (image, stored, transfers) in enumerate(
                zip(self.images, self.stored, self.transfers, strict=True)
            )
        ]


@st.composite
def files(draw: st.DrawFn) -> Files:
    block = draw(st.sampled_from([7, 16, 32, 64, 1024]))
    found = Files(block, draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    for seed in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        itemsize = draw(st.sampled_from([1, 2, 4, 8]))
        raw = np.random.default_rng(seed).integers(0, 256, (*shape, itemsize), np.uint8)
        pieces = [(draw(st.integers(0, len(found.images) - 1)), box) for box in draw(split_boxes(shape))]
        some = st.one_of(st.lists(boxes_in(shape), max_size=3), split_boxes(shape), st.just([Box.whole(shape)]))
        found.add(raw, pieces, draw(some))
    return found


@pytest.mark.parametrize("window_bytes", [10, 24, readplan.WINDOW_BYTES])
@given(found=files())
@settings(max_examples=200, deadline=None)
def test_every_wanted_byte_arrives_and_at_most_a_twentieth_more_is_read(found: Files, window_bytes: int) -> None:
    buffers = [memoryview(bytearray(len(data))) for data in found.expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readplan, "WINDOW_BYTES", window_bytes)
        plan = plan_reads(found.sources())
        read_bytes = mandatory = wanted_bytes = 0
        for number, (image, what) in enumerate(zip(found.images, plan.sources, strict=True)):
            wanted = np.zeros(len(image), np.bool_)
            for transfer in what.transfers:
                for start in transfer.starts():
                    wanted[start : start + transfer.length] = True
            wanted_bytes += int(wanted.sum())
            end = 0
            for window in plan.windows(number):
                assert end <= window.start < window.stop <= len(image)
                assert window.stop - window.start <= plan.window_bytes
                end = window.stop
                memory = bytearray(plan.window_bytes)  # zero where nothing is read
                for start, stop in window.reads.tolist():
                    assert window.start <= start < stop <= window.stop
                    memory[start - window.start : stop - window.start] = image[start:stop]
                    read_bytes += stop - start
                assert all(a[1] < b[0] for a, b in pairwise(window.reads.tolist()))
                if window.block is not None:
                    assert window.reads.tolist() == [list(what.digests.span(window.block))]
                for transfer in window.transfers:
                    transfer.move(memoryview(memory), window.start, buffers[transfer.target])
            if int(wanted.sum()) == what.stored > 0:
                mandatory += len(image) - what.stored
                assert plan.whole[number] == set(range(len(what.digests.blocks)))
    assert [bytes(buffer) for buffer in buffers] == found.expected
    assert plan.wanted_bytes == wanted_bytes
    assert wanted_bytes <= read_bytes <= wanted_bytes * 1.05 + mandatory


# -- where the budget goes


def test_the_blocks_that_lack_least_are_completed_first() -> None:
    """1,000 of 1,100 bytes are wanted, so 50 more may be read: for the 10 and the 30 missing, not the 60."""
    plan = plan_reads([source(1100, 275, (0, 275), (305, 550), (560, 825), (825, 1040))])
    assert plan.wanted_bytes == 1000 and plan.whole == (frozenset({0, 1, 2}),)
    assert reads(plan) == [(0, 275), (275, 550), (550, 825), (825, 1040)]


def test_the_budget_is_one_for_all_files() -> None:
    small, large = source(100, 100, (0, 60), file="small"), source(1000, 100, (0, 1000), file="large")
    assert plan_reads([small]).whole == (frozenset(),)
    plan = plan_reads([small, large])
    assert plan.whole == (frozenset({0}), frozenset(range(10)))


def test_small_gaps_are_read_over_and_large_ones_are_not() -> None:
    wanted = [(0, 200), (204, 400), (408, 500), (600, 700)]
    plan = plan_reads([source(1000, 1000, *wanted)])
    assert plan.near == 8 and plan.whole == (frozenset(),)
    assert reads(plan) == [(0, 500), (600, 700)]


def test_gaps_of_one_size_are_all_read_over_or_none() -> None:
    wanted = [(10 * start, 10 * start + 8) for start in range(50)]
    assert plan_reads([source(1000, 1000, *wanted)]).near == 0
    assert len(reads(plan_reads([source(1000, 1000, *wanted)]))) == 50


def test_gaps_that_take_longer_to_read_than_a_call_are_left_whatever_the_budget() -> None:
    size = 32 << 20
    far = readplan.NEAR + 1
    wanted = [(0, 1 << 20), ((1 << 20) + far, (1 << 20) + far + 100)]
    plan = plan_reads([source(10 * size, size, *wanted, (size, 10 * size))])
    assert reads(plan)[:2] == wanted and plan.near == 0
    wanted[1] = (wanted[1][0] - 1, wanted[1][1])
    plan = plan_reads([source(10 * size, size, *wanted, (size, 10 * size))])
    assert reads(plan)[0] == (0, wanted[1][1]) and plan.near == readplan.NEAR


@pytest.mark.parametrize("header", [1, 64, 100, 900])
def test_a_file_whose_pieces_are_all_wanted_is_read_to_the_last_byte(header: int) -> None:
    size = header + 128
    plan = plan_reads([source(size, 64, (header, header + 50), (header + 50, size), stored=128)])
    assert plan.whole == (frozenset(range(-(-size // 64))),)
    assert reads(plan)[0][0] == 0 and reads(plan)[-1][1] == size
    plan = plan_reads([source(size, 64, (header, header + 50), (header + 60, size), stored=128)])
    assert plan.whole != (frozenset(range(-(-size // 64))),)


def test_the_same_bytes_wanted_twice_are_read_once() -> None:
    plan = plan_reads([source(1000, 1000, (100, 300), (200, 400), (100, 300))])
    assert plan.wanted_bytes == 300 and reads(plan) == [(100, 400)]
    assert [len(window.transfers) for window in plan.windows(0)] == [3]


def test_a_block_between_the_runs_is_not_touched() -> None:
    strided = Source("f", digests(1000, 50), 1001, (Transfer(10, 0, 0, 4, ((3, 400, 4),)),))
    assert reads(plan_reads([strided])) == [(10, 14), (410, 414), (810, 814)]


def test_nothing_wanted_is_nothing_read() -> None:
    assert plan_reads([]).window_bytes == 0
    plan = plan_reads([source(100, 10)])
    assert plan.wanted_bytes == 0 and list(plan.windows(0)) == []


def test_a_piece_beyond_the_end_of_its_file_is_damage() -> None:
    with pytest.raises(CheckpointDamaged, match=r"rank-00001\.safetensors.*\n.*its index places pieces beyond its end"):
        plan_reads([source(100, 10, (90, 101), file=str(Path("rank-00001.safetensors")))])
