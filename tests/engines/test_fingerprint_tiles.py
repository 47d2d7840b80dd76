"""The tables of the Triton kernels, read as the kernels read them: every element once, with its own state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, Runs, flat_runs
from resume_kit.algebra.fingerprint import STEP
from resume_kit.engines import fingerprint_tiles as module
from resume_kit.engines.fingerprint_tiles import tables, takes

INVERSE = pow(STEP, -1, 2**64)


def elements(spans: np.ndarray, grids: np.ndarray, size: int) -> list[tuple[int, int, int]]:
    """(row of the result, address, flat index) of every element that the tables name."""
    found = []
    for vector, z, lo, hi, row in spans.tolist():
        for at in range(lo, hi):
            found.append((row, vector * 16 + at * size, ((z + at * STEP) * INVERSE - 1) % 2**64))
    for vector, z, lo, hi, row, before, gap, magic in grids.tolist():
        for at in range(lo, hi):
            ahead = at + before
            z_here = z + ahead * STEP + ((2 * ahead + 1) * magic >> 32) * gap
            found.append((row, vector * 16 + at * size, (z_here * INVERSE - 1) % 2**64))
    for _, _, lo, hi, *_ in [*spans.tolist(), *grids.tolist()]:
        assert 0 <= lo < hi <= module.TILE and lo * size < module.VECTOR
    return sorted(found)


def expected(pieces: list[tuple[int, int, Runs]], size: int) -> list[tuple[int, int, int]]:
    found = []
    for row, address, runs in pieces:
        indices = (runs.offsets[:, None] + np.arange(runs.length)).reshape(-1).tolist()
        found += [(row, address + k * size, index) for k, index in enumerate(indices)]
    return sorted(found)


BOXES = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7), st.integers(0, 7)), min_size=0, max_size=5)


@given(st.lists(st.tuples(st.integers(0, 40), BOXES), max_size=5), st.sampled_from([1, 2, 4, 8]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_tables_name_every_element_once(some: list, size: int, small: bool) -> None:
    pieces = []
    for row, (offset, axes) in enumerate(some):
        shape = tuple(extent for extent, _, _ in axes)
        lo = tuple(min(a, b, extent) for extent, a, b in axes)
        hi = tuple(min(max(a, b), extent) for extent, a, b in axes)
        pieces.append((row, 4096 * (row + 1) + offset * size, flat_runs(shape, Box(lo, hi))))
    with pytest.MonkeyPatch.context() as patch:
        if small:  # so that tiles end within pieces, and runs are long
            patch.setattr(module, "TILE", 64)
            patch.setattr(module, "LONG", 4)
        assert elements(*tables(pieces, size), size) == expected(pieces, size)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000, module.LONG - 1])
def test_runs_are_counted_by_one_multiplication(length: int) -> None:
    ahead = np.arange(module.TILE + module.LONG)
    _, grids = tables([(0, 1 << 20, Runs(0, length, 2, ((1, 2, 2 * length),)))], 1)
    assert np.array_equal((2 * ahead + 1) * grids[0, 7] >> 32, ahead // length)


def test_huge_pieces_take_a_row_a_tile() -> None:
    runs = Runs(7, (1 << 33) + 5, 1, ())
    spans, grids = tables([(3, 1 << 40, runs)], 4)
    assert not len(grids) and (spans[:, 3] - spans[:, 2]).sum() == runs.length
    assert len(spans) <= runs.length // module.TILE + 2
    assert np.unique(spans[:, 0]).size == len(spans)


def test_countless_little_grids_and_odd_addresses_are_left_to_torch() -> None:
    assert takes(64, 4, Runs(0, 3, 1 << 20, ((1, 1 << 20, 9),)))
    assert not takes(64, 4, Runs(0, 3, 1 << 21, ((1, 2, 9), (2, 1 << 20, 40))))
    assert not takes(65, 4, Runs(0, 3, 1, ()))
