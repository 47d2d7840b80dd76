"""Exact-once coverage and meetings of boxes, for all tensors of a table at once.

The sweep is that of `coverage`, with (tensor, position on an axis) as one sort key; the axis is chosen for each
tensor by itself, so that slabs on any axis are compared with their neighbors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from resume_kit.planning.coverage import CoverageProblem, find_coverage_problem
from resume_kit.planning.table import BoxTable, Flags, Ints, numel_of, padded_shapes, run_numbers

_PAIRS = 1 << 21  # pairs of boxes compared at a time


def uncovered(table: BoxTable) -> dict[str, CoverageProblem]:
    """The tensors whose owned boxes do not cover them exactly once, each with one fault by name.

    The owners that a fault names are ranks.
    """
    owned = table.where(table.owned)
    shapes = padded_shapes(table.shapes)
    outside = (owned.hi > _widened(shapes, owned.hi.shape[1])[owned.tensor]).any(axis=1) | (owned.lo < 0).any(axis=1)
    faulty = set(owned.tensor[outside].tolist())
    totals = np.zeros(len(table.names), np.int64)
    np.add.at(totals, owned.tensor, owned.numel)
    expected = np.array([numel_of(shape) for shape in table.shapes], np.int64)
    faulty |= set(np.flatnonzero(totals != expected).tolist())
    within = [_sweep_within(owned, axis) for axis in range(owned.lo.shape[1])]
    for one, _, _ in _join(owned, owned, within):
        faulty |= set(owned.tensor[one].tolist())
    problems = {}
    for tensor in sorted(faulty):
        rows = owned.where(owned.tensor == tensor)
        problem = find_coverage_problem(table.shapes[tensor], rows.boxes())
        if problem is not None:
            owners = tuple(sorted({int(rows.rank[owner]) for owner in problem.owners}))
            problems[table.names[tensor]] = CoverageProblem(problem.kind, problem.box, owners)
    return problems


def _widened(shapes: Ints, width: int) -> Ints:
    return np.pad(shapes, ((0, 0), (0, width - shapes.shape[1])), constant_values=1)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """Candidates of every target row among the source rows: `order[first:first+count]`, sorted on one axis."""

    order: Ints
    first: Ints
    count: Ints


def meetings(source: BoxTable, target: BoxTable) -> Iterator[tuple[Ints, Ints, Ints]]:
    """(source rows, target rows, elements in both) of all pairs of boxes of one tensor that meet, in portions.

    Both tables have the same tensors.
    """
    yield from _join(source, target, [_sweep(source, target, axis) for axis in range(target.lo.shape[1])])


def _sweep(source: BoxTable, target: BoxTable, axis: int) -> _Sweep:
    """On one axis: sources that begin before the target ends, from the first that reaches beyond its beginning."""
    span = 1 + max(int(table.hi[:, axis].max(initial=0)) for table in (source, target))
    begin = source.tensor * span + source.lo[:, axis]
    order = np.argsort(begin, kind="stable")
    reach = np.maximum.accumulate((source.tensor * span + source.hi[:, axis])[order])
    first = np.searchsorted(reach, target.tensor * span + target.lo[:, axis], side="right")
    last = np.searchsorted(begin[order], target.tensor * span + target.hi[:, axis], side="left")
    return _Sweep(order, first, np.maximum(last - first, 0))


def _sweep_within(table: BoxTable, axis: int) -> _Sweep:
    """On one axis: the rows behind each row in sorted order that begin before it ends."""
    span = 1 + int(table.hi[:, axis].max(initial=0))
    begin = table.tensor * span + table.lo[:, axis]
    order = np.argsort(begin, kind="stable")
    first = np.empty_like(order)
    first[order] = np.arange(1, len(table) + 1)
    last = np.searchsorted(begin[order], table.tensor * span + table.hi[:, axis])
    return _Sweep(order, first, np.maximum(last - first, 0))


def _join(source: BoxTable, target: BoxTable, sweeps: list[_Sweep]) -> Iterator[tuple[Ints, Ints, Ints]]:
    chosen = _best_axis(sweeps, target.tensor, len(target.names))
    for axis, sweep in enumerate(sweeps):
        rows = np.flatnonzero(chosen[target.tensor] == axis)
        for part in _portions(sweep.count[rows]):
            some = rows[part]
            counts = sweep.count[some]
            two = np.repeat(some, counts)
            one = sweep.order[np.repeat(sweep.first[some], counts) + run_numbers(counts)]
            found = _meeting(source, one, target, two)
            if found[0].size:
                yield found


def _best_axis(sweeps: list[_Sweep], tensor: Ints, tensors: int) -> Ints:
    """For each tensor the axis that leaves the fewest candidates."""
    totals = np.zeros((len(sweeps), tensors), np.int64)
    for axis, sweep in enumerate(sweeps):
        np.add.at(totals[axis], tensor, sweep.count)
    best: Ints = totals.argmin(axis=0)
    return best


def _portions(counts: Ints) -> Iterator[slice]:
    """Rows in portions of about `_PAIRS` candidates."""
    totals = np.cumsum(counts)
    row = 0
    while row < len(counts):
        before = int(totals[row - 1]) if row else 0
        after = max(row + 1, int(np.searchsorted(totals, before + _PAIRS, side="right")))
        yield slice(row, after)
        row = after


def _meeting(source: BoxTable, one: Ints, target: BoxTable, two: Ints) -> tuple[Ints, Ints, Ints]:
    """The pairs that do meet, with their common elements."""
    volumes = np.ones(len(one), np.int64)
    for axis in range(target.lo.shape[1]):
        lo = np.maximum(source.lo[one, axis], target.lo[two, axis])
        extent = np.minimum(source.hi[one, axis], target.hi[two, axis]) - lo
        inside: Flags = extent > 0
        one, two, volumes = one[inside], two[inside], (volumes * extent)[inside]
    return one, two, volumes
