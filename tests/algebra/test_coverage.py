from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.planning.coverage import CoverageProblem, find_coverage_problem


def random_partition(shape: tuple[int, ...], cuts: int, rng: random.Random) -> list[Box]:
    """Recursive cuts: neither sorted nor a grid."""
    boxes = [Box.whole(shape)]
    for _ in range(cuts):
        box = boxes.pop(rng.randrange(len(boxes)))
        axes = [axis for axis, extent in enumerate(box.shape) if extent > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = rng.choice(axes)
        boxes += box.split(axis, rng.randrange(box.lo[axis] + 1, box.hi[axis]))
    rng.shuffle(boxes)
    return boxes


def flat_partition(shape: tuple[int, ...], ranks: int, rng: random.Random) -> list[Box]:
    numel = math.prod(shape)
    cuts = sorted(rng.randrange(numel + 1) for _ in range(ranks - 1))
    ranges = itertools.pairwise([0, *cuts, numel])
    boxes = [box for start, stop in ranges for box in boxes_of_flat_range(shape, start, stop)]
    rng.shuffle(boxes)
    return boxes


def claims(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    count = np.zeros(shape, np.int64)
    for box in boxes:
        count[box.slices] += 1
    return count


def check_problem(shape: tuple[int, ...], boxes: list[Box]) -> None:
    """The answer agrees with a dense count, and what it names is true."""
    problem = find_coverage_problem(shape, boxes)
    count = claims(shape, boxes)
    if problem is None:
        assert (count == 1).all()
        return
    assert not problem.box.empty and Box.whole(shape).contains(problem.box)
    if problem.kind == "gap":
        assert (count[problem.box.slices] == 0).all() and problem.owners == ()
    else:
        assert problem.kind == "overlap" and len(problem.owners) >= 2
        assert (count[problem.box.slices] >= 2).all()
        assert all(boxes[owner].contains(problem.box) for owner in problem.owners)


SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


@given(SHAPES, st.integers(0, 12), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_partition_covers_exactly_once(shape: tuple[int, ...], parts: int, flat: bool, seed: int) -> None:
    make = flat_partition if flat else random_partition
    assert find_coverage_problem(shape, make(shape, parts + 1, random.Random(seed))) is None


@given(SHAPES, st.integers(0, 12), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_partition_disturbed_is_found_out(shape: tuple[int, ...], parts: int, flat: bool, seed: int) -> None:
    rng = random.Random(seed)
    boxes = (flat_partition if flat else random_partition)(shape, parts + 1, rng)
    victim = rng.randrange(len(boxes))
    box = boxes[victim]

    dropped = boxes[:victim] + boxes[victim + 1 :]
    problem = find_coverage_problem(shape, dropped)
    assert problem is not None and problem.kind == "gap" and box.contains(problem.box)

    problem = find_coverage_problem(shape, [*boxes, box])
    assert problem == CoverageProblem("overlap", box, (victim, len(boxes)))

    for axis in range(len(shape)):
        for grow_lo, grow_hi in ((0, 1), (-1, 0), (1, 1), (-1, -1)):
            lo, hi = list(box.lo), list(box.hi)
            lo[axis] += grow_lo
            hi[axis] += grow_hi
            if lo[axis] < 0:
                continue
            changed = [*boxes[:victim], Box(tuple(lo), tuple(hi)), *boxes[victim + 1 :]]
            problem = find_coverage_problem(shape, changed)
            assert problem is not None
            if hi[axis] > shape[axis]:
                assert problem == CoverageProblem("outside", changed[victim], (victim,))
            else:
                check_problem(shape, changed)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_boxes_agree_with_a_dense_count(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    ends = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    make = st.tuples(*ends).map(lambda pairs: Box(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)))
    check_problem(shape, data.draw(st.lists(make, max_size=6)))


def test_no_boxes_at_all_leave_the_whole_as_a_gap() -> None:
    assert find_coverage_problem((2, 3), []) == CoverageProblem("gap", Box.whole((2, 3)), ())
    assert find_coverage_problem((), []) == CoverageProblem("gap", Box((), ()), ())
    assert find_coverage_problem((0, 3), []) is None


def test_the_wrong_rank_is_outside_and_everyone_who_overlaps_is_named() -> None:
    assert find_coverage_problem((4,), [Box.whole((4, 1))]) == CoverageProblem("outside", Box.whole((4, 1)), (0,))
    problem = find_coverage_problem((4,), [Box((0,), (4,)), Box((4,), (4,)), Box((0,), (4,)), Box((0,), (4,))])
    assert problem == CoverageProblem("overlap", Box((0,), (4,)), (0, 2, 3))
    assert str(problem) == "elements [0:4] are owned more than once, by boxes 0, 2, 3"


def _tiles(shape: tuple[int, ...], tiles: tuple[int, ...]) -> list[Box]:
    steps = [n // k for n, k in zip(shape, tiles, strict=True)]
    corners = itertools.product(*(range(0, n, step) for n, step in zip(shape, steps, strict=True)))
    return [Box(lo, tuple(a + s for a, s in zip(lo, steps, strict=True))) for lo in corners]


def _flat(shape: tuple[int, ...], count: int) -> list[Box]:
    edges = [math.prod(shape) * i // count for i in range(count + 1)]
    return [box for a, b in itertools.pairwise(edges) for box in boxes_of_flat_range(shape, a, b)]


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        pytest.param((16384, 64), _tiles((16384, 64), (16384, 1)), id="16384 rows"),
        pytest.param((64, 16384), _tiles((64, 16384), (1, 16384)), id="16384 columns"),
        pytest.param((1024, 1024), _tiles((1024, 1024), (128, 128)), id="128 x 128 tiles"),
        pytest.param((32, 32, 32), _tiles((32, 32, 32), (32, 32, 16)), id="32 x 32 x 16 tiles"),
        pytest.param((4001, 517), _flat((4001, 517), 6000), id="flat ranges"),
        pytest.param((64, 64, 64), random_partition((64, 64, 64), 2000, random.Random(1)), id="2000 random cuts"),
    ],
)
def test_large_coverage_is_quick(shape: tuple[int, ...], boxes: list[Box]) -> None:
    began = time.perf_counter()
    assert find_coverage_problem(shape, boxes) is None
    whole_took = time.perf_counter() - began
    lost = boxes.pop(len(boxes) // 3)
    began = time.perf_counter()
    problem = find_coverage_problem(shape, boxes)
    gap_took = time.perf_counter() - began
    print(f"{len(boxes)} boxes: {whole_took * 1e3:.0f} ms, with a gap {gap_took * 1e3:.0f} ms")
    assert problem is not None and problem.kind == "gap" and lost.contains(problem.box)
    assert whole_took < 2 and gap_took < 2
