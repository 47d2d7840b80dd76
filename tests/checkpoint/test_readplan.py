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


@pytest.fixture(autouse=True)
def page_of_one_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gap is free, unless a test says so."""
    monkeypatch.setattr(readplan, "PAGE", 1)


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


def free(wanted: np.ndarray, block: int, page: int) -> np.ndarray:
    """Which bytes lie in gaps of less than a page, in blocks of which anything is wanted."""
    found = np.zeros_like(wanted)
    for start in range(0, len(wanted), block):
        part = wanted[start : start + block]
        edges = [-1, *np.flatnonzero(part).tolist(), len(part)]
        for before, after in pairwise(edges):
            if len(edges) > 2 and after - before - 1 < page:
                found[start + before + 1 : start + after] = True
    return found


@pytest.mark.parametrize("page", [1, 5, 30, 4096])
@given(found=files())
@settings(max_examples=200, deadline=None)
def test_every_wanted_byte_arrives_and_at_most_a_twentieth_more_is_read_and_gaps_of_less_than_a_page(
    found: Files, page: int
) -> None:
    buffers = [memoryview(bytearray(len(data))) for data in found.expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readplan, "PAGE", page)
        plan = plan_reads(found.sources())
    surplus = mandatory = wanted_bytes = 0
    for number, (image, what) in enumerate(zip(found.images, plan.sources, strict=True)):
        wanted = np.zeros(len(image), np.bool_)
        for transfer in what.transfers:
            for start in transfer.starts():
                wanted[start : start + transfer.length] = True
        read, end = np.zeros_like(wanted), 0
        for window in plan.windows(number):
            assert end <= window.start < window.stop <= len(image)
            assert (window.start, window.stop) == what.digests.span(window.block)
            assert window.stop - window.start <= plan.window_bytes
            end = window.stop
            memory = bytearray(plan.window_bytes)  # zero where nothing is read
            for start, stop in window.reads.tolist():
                assert window.start <= start < stop <= window.stop and not read[start:stop].any()
                memory[start - window.start : stop - window.start] = image[start:stop]
                read[start:stop] = True
            assert all(b[0] - a[1] >= page for a, b in pairwise(window.reads.tolist()))
            assert window.whole == (window.block in plan.whole[number])
            if window.whole:
                assert read[window.start : window.stop].all() and len(window.reads) == 1
            else:
                assert not read[window.start : window.stop].all()
            for transfer in window.transfers:
                transfer.move(memoryview(memory), window.start, buffers[transfer.target])
        assert not (wanted & ~read).any()
        wanted_bytes += int(wanted.sum())
        if int(wanted.sum()) == what.stored > 0:
            mandatory += len(image) - what.stored
            assert plan.whole[number] == set(range(len(what.digests.blocks)))
        else:
            surplus += int((read & ~wanted & ~free(wanted, found.block, page)).sum())
    assert [bytes(buffer) for buffer in buffers] == found.expected
    assert plan.wanted_bytes == wanted_bytes
    assert surplus <= wanted_bytes * 0.05


# -- gaps of less than a page


def test_gaps_of_less_than_a_page_are_read_over_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readplan, "PAGE", 100)
    wanted = [(0, 1), (100, 101), (200, 201), (301, 302)]
    plan = plan_reads([source(2000, 1000, *wanted)])
    assert plan.wanted_bytes == 4 and plan.near == 99
    assert reads(plan) == [(0, 201), (301, 302)]


def test_a_block_that_lacks_only_gaps_of_less_than_a_page_is_read_whole_and_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At both of its ends too; the last block has one gap of a page, which the budget would have to pay."""
    monkeypatch.setattr(readplan, "PAGE", 100)
    wanted = [(99, 100), (199, 400), (430, 501), (599, 700), (800, 901), (999, 1000)]
    plan = plan_reads([source(1000, 500, *wanted)])
    assert plan.whole == (frozenset({0}),)
    assert reads(plan) == [(0, 500), (500, 700), (800, 1000)]
    (first, *_) = plan.windows(0)
    assert first.whole and (first.block, first.start, first.stop) == (0, 0, 500)


@pytest.mark.parametrize(
    ("gap", "size", "whole", "expected"),
    [
        (100, 4_090, {0}, [(0, 4_090)]),
        (100, 4_200, set(), [(0, 4_080)]),
        (101, 4_090, set(), [(0, 1_990), (2_091, 4_081)]),
    ],
)
def test_gaps_of_less_than_a_page_leave_the_budget_to_others(
    gap: int, size: int, whole: set[int], expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 bytes are wanted, in rows of 10 with 10 between. 100 may be read in vain: for the gap in the middle."""
    monkeypatch.setattr(readplan, "PAGE", 20)
    grid = tuple(Transfer(start, 0, 0, 10, ((100, 20, 10),)) for start in (0, 1_990 + gap))
    plan = plan_reads([Source("f", digests(size, size), size + 1, grid)])
    assert plan.whole == (whole,) and reads(plan) == expected


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
