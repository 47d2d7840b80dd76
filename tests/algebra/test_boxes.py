from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, boxes_of_flat_range, flat_runs

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_within(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(lo for lo, _ in ends), tuple(hi for _, hi in ends))


@st.composite
def shape_and_boxes(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    return shape, [draw(boxes_within(shape)) for _ in range(count)]


def flat_indices(shape: tuple[int, ...], box: Box) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)[box.slices].reshape(-1)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_flat_range_is_few_boxes_in_order_each_one_run(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    boxes = boxes_of_flat_range(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert not any(box.empty for box in boxes)
    assert all(flat_runs(shape, box).count == 1 for box in boxes)
    covered = [index for box in boxes for index in flat_indices(shape, box).tolist()]
    assert covered == list(range(start, stop))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
def test_a_tensor_without_elements_has_no_boxes(shape: tuple[int, ...]) -> None:
    assert boxes_of_flat_range(shape, 0, 0) == ()
    assert flat_runs(shape, Box.whole(shape)).count == 0


def test_a_0d_tensor_is_one_box_without_axes() -> None:
    scalar = Box((), ())
    assert boxes_of_flat_range((), 0, 1) == (scalar,) and boxes_of_flat_range((), 0, 0) == ()
    assert scalar.numel == 1 and not scalar.empty and str(scalar) == "" and scalar.intersect(scalar) == scalar
    assert flat_runs((), scalar).offsets.tolist() == [0]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_a_flat_range_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not within shape"):
        boxes_of_flat_range((2, 3), start, stop)


def test_the_worst_flat_range_of_three_axes_is_five_boxes() -> None:
    assert [str(box) for box in boxes_of_flat_range((4, 4, 4), 1, 63)] == [
        "0:1,0:1,1:4", "0:1,1:4,0:4", "1:3,0:4,0:4", "3:4,0:3,0:4", "3:4,3:4,0:3",
    ]  # fmt: skip


@given(shape_and_boxes(1))
@settings(max_examples=200, deadline=None)
def test_runs_list_the_elements_in_order(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (box,) = case
    runs = flat_runs(shape, box)
    assert runs.count == len(runs.offsets) and runs.count * runs.length == box.numel
    listed = (runs.offsets[:, None] + np.arange(runs.length)).reshape(-1)
    assert listed.tolist() == flat_indices(shape, box).tolist()
    if runs.count > 1:
        assert (np.diff(runs.offsets) > runs.length).all(), "neighbouring runs were not merged"


def test_leading_full_axes_collapse_into_one_grid_axis() -> None:
    runs = flat_runs((6, 5, 8, 2), Box.parse("0:6,0:5,2:5,0:2"))
    assert (runs.first, runs.length, runs.count, runs.grid) == (4, 6, 30, ((1, 30, 16),))


@given(shape_and_boxes(3))
@settings(max_examples=200, deadline=None)
def test_intersection_is_that_of_sets(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (a, b, c) = case
    both = a.intersect(b)
    expected = set(flat_indices(shape, a).tolist()) & set(flat_indices(shape, b).tolist())
    assert (set(flat_indices(shape, both).tolist()) if both else set()) == expected
    assert both == b.intersect(a)
    assert a.intersect(a) == (None if a.empty else a)
    if both is not None:
        assert a.contains(both) and b.contains(both)
        assert both.relative_to(a).shape == both.shape
        whole = np.arange(math.prod(shape)).reshape(shape)
        assert (whole[a.slices][both.relative_to(a).slices] == whole[both.slices]).all()
        right = b.intersect(c)
        assert both.intersect(c) == (right.intersect(a) if right else None)
    if not b.empty:
        assert a.contains(b) == (both == b)


@given(shape_and_boxes(1))
def test_the_text_form_round_trips(case: tuple[tuple[int, ...], list[Box]]) -> None:
    assert Box.parse(str(case[1][0])) == case[1][0]


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "0:",
        ":1",
        "0:1,",
        ",0:1",
        "00:1",
        "0:01",
        " 0:1",
        "0:1\n",
        "0:1, 2:3",
        "+0:1",
        "-1:1",
        "0:١",
        "1:0",
    ],
)
def test_only_canonical_text_is_a_box(text: str) -> None:
    with pytest.raises(ValueError, match="box"):
        Box.parse(text)


def test_split_parts_make_up_the_box() -> None:
    below, above = Box.parse("2:8,1:3").split(0, 5)
    assert (str(below), str(above)) == ("2:5,1:3", "5:8,1:3")


@pytest.mark.parametrize(("axis", "at"), [(0, 2), (0, 8), (2, 1), (-1, 2)])
def test_a_split_off_the_inside_is_refused(axis: int, at: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        Box.parse("2:8,1:3").split(axis, at)


@pytest.mark.parametrize(("lo", "hi"), [((0,), (1, 2)), ((-1,), (2,)), ((3,), (2,))])
def test_bounds_that_make_no_box_are_refused(lo: tuple[int, ...], hi: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="box"):
        Box(lo, hi)


def test_unlike_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks"):
        Box((0,), (1,)).intersect(Box((), ()))
    with pytest.raises(ValueError, match="not within"):
        Box((0,), (4,)).relative_to(Box((1,), (5,)))
    with pytest.raises(ValueError, match="not within shape"):
        flat_runs((3,), Box((0,), (4,)))
