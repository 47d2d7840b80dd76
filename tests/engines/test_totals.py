"""Sums by tensor and copy, and who is to blame where a copy is not what the owners hold."""

from __future__ import annotations

import pytest
import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import LivePiece
from resume_kit.engines.fingerprint import as_unsigned, fingerprints
from resume_kit.engines.totals import Totals, copies_of, guilty, totals
from tests.conftest import Ranks

W, B = (TensorSpec(TensorKey("param", name), "float32", (4, 2)) for name in ("w", "b"))
CPU = torch.device("cpu")


def piece(spec: TensorSpec, rows: range, *, copy: int | None = 0, shift: float = 0.0) -> LivePiece:
    """Rows of a tensor that holds 0, 1, 2, …; `shift` makes it another one."""
    box = Box((rows.start, 0), (rows.stop, 2))
    return LivePiece(spec, box, torch.arange(8.0)[rows.start * 2 : rows.stop * 2] + shift, copy=copy)


def summed(pieces: list[LivePiece]) -> Totals:
    values = fingerprints((p.data, p.spec.shape, p.box) for p in pieces)
    return totals(pieces, values, [W.key, B.key], copies_of(pieces), CPU)


def odd(found: Totals) -> list[tuple[str, int]]:
    numel = {key: 8 if found.owned[key] else 0 for key in found.keys}
    return [(key.name, copy) for key, copy in found.odd_copies(found.owned, numel)]


def whole(spec: TensorSpec) -> int:
    return as_unsigned(fingerprints([(torch.arange(8.0), spec.shape, Box.whole(spec.shape))]))[0]


def test_pieces_add_up_to_the_whole_copy_by_copy() -> None:
    halves = [piece(W, range(2), copy=c) for c in (0, 2)] + [piece(W, range(2, 4), copy=c) for c in (0, 2)]
    found = summed([*halves, piece(B, range(4)), piece(B, range(4), copy=1)])
    assert found.owned == {W.key: whole(W), B.key: whole(B)}
    assert found.sums[1] == (0, whole(B)) and found.elements[1] == (0, 8)
    assert found.sums[2] == (whole(W), 0) and found.elements[2] == (8, 0)
    assert odd(found) == []


def test_pieces_in_no_copy_and_of_other_tensors_are_left_out() -> None:
    stranger = TensorSpec(TensorKey("param", "stranger"), "float32", (4, 2))
    found = summed([piece(W, range(4)), piece(W, range(4), copy=None), piece(stranger, range(4))])
    assert found.owned == {W.key: whole(W), B.key: 0}
    assert copies_of([piece(W, range(4), copy=None)]) == 1


@pytest.mark.parametrize(
    "copy",
    [
        [piece(W, range(2), copy=1), piece(W, range(2, 4), copy=1, shift=1.0)],  # another value
        [piece(W, range(2), copy=1)],  # a part is missing
        [piece(W, range(4), copy=1), piece(W, range(1), copy=1)],  # a part is there twice
    ],
)
def test_a_copy_that_is_not_the_owners_is_odd(copy: list[LivePiece]) -> None:
    sound = [piece(W, range(4)), piece(W, range(4), copy=2), piece(B, range(4)), piece(B, range(4), copy=1)]
    assert odd(summed([*sound, *copy])) == [("w", 1)]


def test_a_zero_that_hides_in_a_sum_is_seen_by_its_elements() -> None:
    """Rows of zeros have the fingerprint 0: that one is missing shows in the number of elements only."""
    zeros = LivePiece(W, Box.whole(W.shape), torch.zeros(8))
    part = LivePiece(W, Box((0, 0), (2, 2)), torch.zeros(4), copy=1)
    found = summed([zeros, part])
    assert found.sums[0][0] == found.sums[1][0] == 0
    assert found.odd_copies(found.owned, {W.key: 8, B.key: 0}) == [(W.key, 1)]


def over_ranks(rank: int, world_size: int) -> list[list[int]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    pieces = [piece(W, range(rank, rank + 1)), piece(W, range(4), copy=1 + rank, shift=float(rank == 2))]
    values = fingerprints((p.data, p.spec.shape, p.box) for p in pieces)
    found = totals(pieces, values, [W.key], 5, CPU)
    return [[sums[0] for sums in found.sums], [elements[0] for elements in found.elements]]


def test_sums_go_over_all_ranks(ranks: Ranks) -> None:
    found = ranks.run(over_ranks, 4)
    assert all(one == found[0] for one in found)
    sums, elements = found[0]
    assert elements == [8, 8, 8, 8, 8]
    assert [value == whole(W) for value in sums] == [True, True, True, False, True]


def test_the_rank_whose_memory_differs_is_guilty() -> None:
    rows = [
        [("w", "0:4", 0, "aa"), ("w", "0:4", 1, "aa")],
        [("w", "0:4", 2, "bb")],
        [("w", "0:4", 3, "aa")],
    ]
    assert guilty(rows, [("w", 2)]) == [(1, "w", "0:4")]


def test_only_the_boxes_that_differ_are_named() -> None:
    rows: list[list[tuple[str, str, int | None, str]]] = [
        [("w", "0:2", 0, "a1"), ("w", "2:4", 0, "a2")],
        [("w", "0:2", 1, "a1"), ("w", "2:4", 1, "XX"), ("b", "0:4", 1, "YY")],
        [("b", "0:4", 0, "YY")],
    ]
    assert guilty(rows, [("w", 1)]) == [(1, "w", "2:4")]


def test_where_no_sound_copy_is_cut_alike_all_pieces_of_the_odd_one_are_named() -> None:
    rows: list[list[tuple[str, str, int | None, str]]] = [
        [("w", "0:1", 0, "a"), ("w", "1:4", 0, "b")],
        [("w", "0:4", 1, "ab")],
    ]
    assert guilty(rows, [("w", 1)]) == [(1, "w", "0:4")]


def test_nobody_is_guilty_of_a_sound_copy() -> None:
    assert guilty([[("w", "0:4", 0, "aa"), ("w", "0:4", 1, "aa")]], []) == []
