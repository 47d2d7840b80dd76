"""All ranks' indices as one whole: every fault of ownership, scalars and required state is seen and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.manifest import TensorEntry
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.integrity.assembly import Assembly, assemble, require_state

W = TensorSpec(TensorKey("master", "w"), "float32", (4, 3))
DATA = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
TOP, BOTTOM = Box((0, 0), (2, 3)), Box((2, 0), (4, 3))


def piece(spec: TensorSpec, box: Box, *, stored: bool = True, share: str | None = None) -> StoredPiece:
    if share is None:
        inside = box.ndim == len(spec.shape) and Box.whole(spec.shape).contains(box)
        share = fingerprint.to_hex(fingerprint.fingerprint_of_box(DATA[box.slices], spec.shape, box) if inside else 1)
    return StoredPiece(spec, box, share, 4096 if stored else None, box.numel * spec.itemsize if stored else 0)


def index(rank: int, *pieces: StoredPiece, scalars: dict[str, Any] | None = None) -> RankIndex:
    return RankIndex("run", 1, 7, rank, 2, FileDigest(0, 1, ()), pieces, scalars or {}, {})


def owned(*boxes: list[Box]) -> Assembly:
    return assemble([index(rank, *(piece(W, box) for box in own)) for rank, own in enumerate(boxes)], ())


def only_problem(assembly: Assembly) -> str:
    (problem,) = assembly.problems
    return str(problem)


# -- ownership


@pytest.mark.parametrize(
    "boxes",
    [
        ([TOP], [BOTTOM]),
        ([BOTTOM], [TOP]),
        ([TOP, BOTTOM], []),
        (list(boxes_of_flat_range((4, 3), 0, 5)), list(boxes_of_flat_range((4, 3), 5, 12))),
        ([Box((0, 0), (4, 1))], [Box((0, 1), (4, 3))]),
        ([TOP, Box((1, 1), (1, 2))], [BOTTOM]),
    ],
)
def test_every_exact_partition_is_whole_and_sums_to_the_same_fingerprint(boxes: tuple[list[Box], ...]) -> None:
    assembly = owned(*boxes)
    assert assembly.problems == ()
    whole = fingerprint.to_hex(fingerprint.fingerprint_of_box(DATA, (4, 3), Box.whole((4, 3))))
    assert assembly.tensors == (TensorEntry(W, whole, stored=True, owner=None),)


def test_a_gap_is_named() -> None:
    text = only_problem(owned([TOP], [Box((3, 0), (4, 3))]))
    assert "[ownership] master/w: elements [2:3,0:3] are owned by no rank" in text
    assert "each element must have exactly one owner" in text


def test_a_tensor_that_lacks_its_end_is_a_gap() -> None:
    assert "elements [2:4,0:3] are owned by no rank" in only_problem(owned([TOP], []))


def test_an_overlap_names_the_ranks() -> None:
    assert "elements [1:2,0:3] are claimed by ranks 0, 1" in only_problem(owned([TOP], [Box((1, 0), (4, 3))]))


def test_a_whole_tensor_that_two_own_is_an_overlap() -> None:
    everything = Box.whole((4, 3))
    assert "are claimed by ranks 0, 1" in only_problem(owned([everything], [everything]))


@pytest.mark.parametrize("box", [Box((2, 0), (5, 3)), Box((2, 0), (4, 4)), Box((2,), (4,))])
def test_a_claim_outside_names_the_rank(box: Box) -> None:
    text = only_problem(owned([TOP], [box]))
    assert f"rank 1 claims [{box}], outside of shape [4, 3]" in text


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (TensorSpec(W.key, "bfloat16", (4, 3)), "master/w bfloat16[4, 3]"),
        (TensorSpec(W.key, "float32", (3, 4)), "master/w float32[3, 4]"),
    ],
)
def test_ranks_that_know_another_tensor_by_that_name_are_told(other: TensorSpec, expected: str) -> None:
    odd = piece(other, Box((2, 0), (3, 3)), share="0" * 16)
    assembly = assemble([index(0, piece(W, TOP)), index(1, odd)], ())
    text = only_problem(assembly)
    assert f"rank 0 has it as master/w float32[4, 3], rank 1 as {expected}" in text
    assert "every rank must build the same model" in text


def test_problems_of_several_tensors_are_all_told() -> None:
    other = TensorSpec(TensorKey("exp_avg", "w"), "float32", (4, 3))
    assembly = assemble([index(0, piece(W, TOP), piece(other, Box.whole((4, 3)))), index(1, piece(other, TOP))], ())
    assert [problem.where for problem in assembly.problems] == ["exp_avg/w", "master/w"]
    assert [entry.spec.key.kind for entry in assembly.tensors] == ["exp_avg", "master"]


def test_one_piece_without_bytes_makes_the_tensor_not_stored() -> None:
    assembly = assemble([index(0, piece(W, TOP)), index(1, piece(W, BOTTOM, stored=False))], ())
    assert assembly.problems == () and [entry.stored for entry in assembly.tensors] == [False]


def test_a_replica_has_its_owner_and_a_sharded_tensor_none() -> None:
    buffer = TensorSpec(TensorKey("buffer", "b"), "float32", (4, 3))
    indices = [index(0, piece(W, TOP)), index(1, piece(W, BOTTOM), piece(buffer, Box.whole((4, 3))))]
    entries = assemble(indices, {buffer.key}).tensors
    assert [(entry.spec.key.kind, entry.owner) for entry in entries] == [("buffer", 1), ("master", None)]


def test_an_empty_tensor_is_whole_without_an_element() -> None:
    empty = TensorSpec(TensorKey("buffer", "e"), "float32", (0, 3))
    assembly = assemble([index(0, piece(empty, Box.whole((0, 3)), share="0" * 16))], {empty.key})
    assert assembly.problems == () and assembly.tensors[0].fingerprint == "0" * 16


# -- scalars


def adam(step: float) -> dict[str, Any]:
    return {"step": {"device": "cpu", "dtype": "float32", "value": step}}


def with_scalars(*scalars: dict[str, Any]) -> Assembly:
    return assemble([index(rank, scalars=each) for rank, each in enumerate(scalars)], ())


def test_scalars_that_agree_are_merged() -> None:
    assembly = with_scalars({"a": adam(3.0), "b": adam(3.0)}, {"b": adam(3.0), "c": adam(3.0)})
    assert assembly.problems == ()
    assert assembly.scalars == {"a": adam(3.0), "b": adam(3.0), "c": adam(3.0)}


def test_ranks_that_disagree_on_a_scalar_are_named() -> None:
    text = only_problem(with_scalars({"a": adam(3.0)}, {"a": adam(3.0)}, {"a": adam(4.0)}))
    assert "[optimizer scalars] a: rank 0 has step=3.0, rank 2 step=4.0" in text


def test_tensors_that_disagree_on_a_scalar_are_named() -> None:
    text = only_problem(with_scalars({"a": adam(3.0)}, {"b": adam(2.0)}))
    assert "a has step=3.0, b step=2.0" in text and "tensors of one optimizer disagree on the step" in text


def test_a_tensor_without_scalars_among_those_that_have_them_is_named() -> None:
    assert "b nothing" in only_problem(with_scalars({"a": adam(3.0), "b": {}}))


# -- required state


def entry(kind: str, name: str, print_: str = "00000000000000ab") -> TensorEntry:
    return TensorEntry(TensorSpec(TensorKey(kind, name), "float32", (2,)), print_, stored=True)


def model(*, without: set[tuple[str, str]] = frozenset(), zero: str = "") -> list[TensorEntry]:  # type: ignore[assignment]
    kinds = ("param", "master", "exp_avg", "exp_avg_sq")
    tensors = [(kind, name) for name in ("a", "b") for kind in kinds]
    tensors += [("param", "frozen"), ("buffer", "running")]
    return [entry(kind, name, "0" * 16 if kind == zero else "0" * 15 + "1") for kind, name in tensors if (
        kind, name) not in without]  # fmt: skip


ADAM = {"betas": (0.9, 0.95), "members": ["a", "b"]}


def told(tensors: list[TensorEntry], updates: int = 3, *groups: dict[str, Any]) -> list[str]:
    return [str(p) for p in require_state(tensors, ["a", "b", "frozen"], groups or [ADAM], updates)]


@pytest.mark.parametrize("updates", [0, 1, 100])
def test_a_complete_model_lacks_nothing(updates: int) -> None:
    assert told(model(), updates) == []


def test_a_new_model_needs_no_moments_and_may_have_zero_ones() -> None:
    bare = {(kind, name) for kind in ("exp_avg", "exp_avg_sq") for name in ("a", "b")}
    assert told(model(without=bare), updates=0) == []
    assert told(model(zero="exp_avg"), updates=0) == []


@pytest.mark.parametrize("name", ["a", "frozen"])
def test_a_missing_weight_is_named(name: str) -> None:
    assert told(model(without={("param", name)})) == [f"[required state] param/{name}: no rank owns any of it"]


def test_a_missing_master_is_named() -> None:
    assert told(model(without={("master", "b")})) == ["[required state] master/b: no rank owns any of it"]


BARE = {(kind, name) for kind in ("exp_avg", "exp_avg_sq") for name in ("a", "b")}


@pytest.mark.parametrize("setting", [{"betas": (0.9, 0.95)}, {"momentum": 0.9}])
def test_no_moments_after_updates_are_told(setting: dict[str, Any]) -> None:
    (text,) = told(model(without=BARE), 5, {**setting, "members": ["a", "b"]})
    assert "group 0: no optimizer tensors after 5 updates" in text


@pytest.mark.parametrize("setting", [{}, {"momentum": 0}, {"momentum": 0.0}])
def test_an_optimizer_without_moments_needs_none(setting: dict[str, Any]) -> None:
    assert told(model(without=BARE), 5, {**setting, "members": ["a", "b"]}) == []


def test_moments_of_some_weights_only_are_told() -> None:
    (text,) = told(model(without={("exp_avg_sq", "a")}))
    assert "exp_avg_sq/a: 1 of 2 weights of group 0 have no exp_avg_sq" in text


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_moments_that_are_all_zero_after_updates_are_told(kind: str) -> None:
    (text,) = told(model(zero=kind), updates=2)
    assert f"group 0, {kind}: every element of every {kind} is zero after 2 updates" in text


def test_each_group_is_held_to_its_own_state() -> None:
    groups: list[dict[str, Any]] = [{"members": ["a"]}, {"betas": (0.9, 0.95), "members": ["b"]}, {"members": []}]
    assert told(model(without={("exp_avg", "a"), ("exp_avg_sq", "a")}), 3, *groups) == []
    (text,) = told(model(without={("exp_avg", "b"), ("exp_avg_sq", "b")}), 3, *groups)
    assert "group 1: no optimizer tensors after 3 updates" in text


def test_one_zero_moment_among_others_is_fine() -> None:
    tensors = [*model(without={("exp_avg", "a")}), entry("exp_avg", "a", "0" * 16)]
    assert told(tensors) == []


def test_all_that_is_missing_is_told_at_once() -> None:
    texts = told(model(without={("param", "a"), ("master", "b"), ("exp_avg", "a")}, zero="exp_avg_sq"))
    assert len(texts) == 4
