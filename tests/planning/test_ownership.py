"""All tensors of a table at once: exact-once coverage and meetings, against the plain way one by one."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box
from resume_kit.planning.coverage import CoverageProblem, find_coverage_problem
from resume_kit.planning.layouts.layout import Layout
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology
from resume_kit.planning.layouts.zero import zero_layout
from resume_kit.planning.ownership import meetings, uncovered
from resume_kit.planning.resharding import ReadCounts, count_reads, stored_table
from resume_kit.planning.table import BoxTable, table_of
from tests.planning.models import Gpt
from tests.planning.test_reads import at, index_of

Row = tuple[str, int, Box, bool]


@st.composite
def tables(draw: st.DrawFn, shapes: dict[str, tuple[int, ...]]) -> list[Row]:
    rows: list[Row] = []
    for name, shape in shapes.items():
        for _ in range(draw(st.integers(0, 4))):
            ends = [sorted(draw(st.tuples(st.integers(0, n + 1), st.integers(0, n + 1)))) for n in shape]
            box = Box(tuple(lo for lo, _ in ends), tuple(hi for _, hi in ends))
            rows.append((name, draw(st.integers(0, 3)), box, draw(st.booleans())))
    return rows


SHAPES = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_uncovered_is_coverage_tensor_by_tensor(data: st.DataObject) -> None:
    shapes = data.draw(SHAPES)
    rows = data.draw(tables(shapes))
    found = uncovered(table_of(shapes, rows))
    for name, shape in shapes.items():
        own = [box for owner, _, box, owned in rows if owner == name and owned and not box.empty]
        expected = find_coverage_problem(shape, own)
        assert (name in found) == (expected is not None)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_meetings_are_all_intersections(data: st.DataObject) -> None:
    shapes = data.draw(SHAPES)
    source, target = (table_of(shapes, data.draw(tables(shapes))) for _ in range(2))
    found = sorted(
        (int(a), int(b), int(n))
        for one, two, elements in meetings(source, target)
        for a, b, n in zip(one, two, elements, strict=True)
    )
    expected = []
    for a, box in enumerate(source.boxes()):
        for b, other in enumerate(target.boxes()):
            if source.tensor[a] == target.tensor[b] and (common := box.intersect(other)) is not None:
                expected.append((a, b, common.numel))
    assert found == sorted(expected)


def test_a_fault_is_named_with_the_ranks_that_claim_it() -> None:
    shapes = {"w": (4,), "v": (2, 2), "good": (3,)}
    half, rest = Box((0,), (2,)), Box((1,), (4,))
    rows = [("w", 5, half, True), ("w", 7, rest, True), ("v", 0, Box((0, 0), (2, 1)), True)]
    rows += [("good", 3, Box((0,), (3,)), True), ("good", 4, Box((0,), (3,)), False)]
    assert uncovered(table_of(shapes, rows)) == {
        "w": CoverageProblem("overlap", Box((1,), (2,)), (5, 7)),
        "v": CoverageProblem("gap", Box((0, 1), (2, 2)), ()),
    }
    outside = [("w", 2, Box((0,), (4,)), True), ("w", 9, Box((4,), (6,)), True)]
    assert uncovered(table_of({"w": (4,)}, outside))["w"] == CoverageProblem("outside", Box((4,), (6,)), (9,))


@pytest.mark.parametrize("axis", [0, 1])
def test_thousands_of_slabs_on_any_axis_are_quick(axis: int) -> None:
    count = 16384
    shape = (count, 64) if axis == 0 else (64, count)

    def slabs(width: int) -> BoxTable:
        rows = []
        for rank in range(count // width):
            lo, hi = [0, 0], list(shape)
            lo[axis], hi[axis] = rank * width, (rank + 1) * width
            rows.append(("w", rank, Box(tuple(lo), tuple(hi)), True))
        return table_of({"w": shape}, rows)

    fine, coarse = slabs(1), slabs(4)
    began = time.perf_counter()
    assert uncovered(fine) == {}
    plan = count_reads(fine, coarse, count // 4, 4)
    assert time.perf_counter() - began < 2
    assert set(plan.parts.tolist()) == {4} and set(plan.files.tolist()) == {4} and not plan.missing.any()


# -- plans


def brute(source: Layout, target: Layout, itemsize: int) -> tuple[list[int], list[int], list[set[int]]]:
    """(bytes, parts, files) of every target rank, box by box."""
    owned = [(h.name, h.box, rank) for rank in range(source.world_size) for h in source.held(rank) if h.owned]
    nbytes, parts, files = [], [], []
    for rank in range(target.world_size):
        met = [
            (common.numel, holder)
            for held in target.held(rank)
            for name, box, holder in owned
            if name == held.name and (common := box.intersect(held.box)) is not None
        ]
        nbytes.append(sum(n for n, _ in met) * itemsize)
        parts.append(len(met))
        files.append({holder for _, holder in met})
    return nbytes, parts, files


TOPOLOGIES = [
    MegatronTopology(world_size=4, tensor_parallel=2, pipeline_parallel=2),
    MegatronTopology(world_size=6, pipeline_parallel=2),
    MegatronTopology(world_size=3, distributed_optimizer=False),
    MegatronTopology(world_size=4, tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=1),
]


@pytest.mark.parametrize("target", TOPOLOGIES)
@pytest.mark.parametrize("source", TOPOLOGIES)
def test_a_plan_is_what_box_by_box_gives(source: MegatronTopology, target: MegatronTopology) -> None:
    geometry = Gpt(experts=2, tied=True).geometry
    before, after = megatron_layout(geometry, source), megatron_layout(geometry, target)
    plan = count_reads(before.table, after.table, after.world_size, 12)
    nbytes, parts, files = brute(before, after, 12)
    assert plan.read.tolist() == nbytes and plan.parts.tolist() == parts
    assert [set(plan.files_of(rank)) for rank in range(after.world_size)] == files
    assert plan.files.tolist() == [len(some) for some in files]
    assert not plan.missing.any()


def test_what_no_file_holds_is_missing_and_other_tensors_do_not_matter() -> None:
    shapes = {"a": (8,), "b": (6, 2)}
    before = zero_layout(shapes, [["a", "b"]], stage=3, world_size=2)
    after = zero_layout({**shapes, "new": (3,)}, [["new", "a"]], stage=1, world_size=1)
    half = before.table.where(before.table.rank == 0)
    assert count_reads(before.table, after.table, 1, 4).missing.tolist() == [12]
    plan = count_reads(half, after.table, 1, 4)
    assert (plan.read.tolist(), plan.missing.tolist(), plan.files_of(0)) == ([16], [28], [0])


def test_plans_of_several_kinds_add_up_and_a_file_counts_once() -> None:
    one = ReadCounts(*(np.array(x) for x in ([4, 0], [4, 0], [1, 0], [0], [3])))
    two = ReadCounts(*(np.array(x) for x in ([2, 2], [2, 6], [1, 2], [0, 1], [3, 5])))
    both = one + two
    assert (both.read.tolist(), both.missing.tolist(), both.parts.tolist()) == ([6, 2], [0, 4], [2, 2])
    assert both.files.tolist() == [1, 1] and both.files_of(1) == [5]


def test_a_table_of_real_indices_has_what_is_stored() -> None:
    from tests.planning.test_reads import KEY, TensorSpec

    spec = TensorSpec(KEY, "float32", (10,))
    indices = [index_of(0, at(0, 3, 4096, spec)), index_of(1, at(3, 6, None, spec), at(6, 10, 4096, spec))]
    table = stored_table(indices, "master", {"w": (10,)})
    assert [str(box) for box in table.boxes()] == ["0:3", "6:10"] and table.rank.tolist() == [0, 1]
    assert len(stored_table(indices, "exp_avg", {"w": (10,)})) == 0
