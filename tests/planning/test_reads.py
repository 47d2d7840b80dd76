"""Resharding algebra: any box, from any split, out of real files, bit for bit."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint import files, names
from resume_kit.checkpoint.blocks import BLOCK_BYTES, FileDigest, digest_image
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.records import DTYPES, TensorKey, TensorSpec
from resume_kit.errors import CheckpointDamaged
from resume_kit.planning.reads import (
    ReadPart,
    StoredPieces,
    missing_elements,
    piece_bytes,
    ranges_by_rank,
)
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.wanted import Want
from tests.checkpoints import flip
from tests.reading import read

KEY = TensorKey("master", "w")
SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)
PLAIN = ["float64", "float32", "bfloat16", "float16", "int8", "complex64", "bool", "float8_e4m3fn"]

Owned = list[list[Box]]

#: Block sizes: those of a real file, which hold a small piece whole, and blocks that a piece spans.
BLOCKS = [BLOCK_BYTES, 32]


# -- saving, as a rank does it, with small blocks


def save(
    directory: Path, tensors: dict[TensorSpec, np.ndarray], owned: dict[TensorSpec, Owned], block: int = BLOCK_BYTES
) -> list[RankIndex]:
    """Write every rank's pieces to real files; `tensors` hold the raw bytes of each element in their last axis."""
    world_size = len(next(iter(owned.values())))
    indices = []
    for rank in range(world_size):
        pieces = [(spec, box) for spec, per_rank in owned.items() for box in per_rank[rank]]
        layout = plan_file(pieces, {"rank": str(rank)})
        image = bytearray(layout.size)
        image[: len(layout.header)] = layout.header
        stored = []
        for slot in layout.slots:
            raw = tensors[slot.spec][slot.box.slices].tobytes()
            assert len(raw) == slot.nbytes
            image[slot.offset : slot.offset + slot.nbytes] = raw
            stored.append(StoredPiece(slot.spec, slot.box, "0" * 16, slot.offset, slot.nbytes))
        files.write_image(directory / names.data_file(rank), memoryview(image))
        digests = digest_image(memoryview(image), block)
        indices.append(RankIndex("run", 1, 7, rank, world_size, digests, tuple(stored), {}, {}))
    return indices


def order_of(indices: list[RankIndex], wants: list[Want]) -> ReadOrder:
    stored = StoredPieces(indices)
    parts = [(want, tuple(stored.parts(want.spec.key, want.box))) for want in wants]
    assert all(missing_elements(want.box, found) == 0 for want, found in parts)
    return ReadOrder(tuple(parts), {index.rank: index for index in indices})


def random_bytes(spec: TensorSpec, seed: int) -> np.ndarray:
    """Any bits at all, NaN payloads included: [*shape, itemsize]."""
    return np.random.default_rng(seed).integers(0, 256, (*spec.shape, spec.itemsize), np.uint8)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(lo for lo, _ in ends), tuple(hi for _, hi in ends))


@st.composite
def splits(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> Owned:
    """Every element with one rank: flat ranges as ZeRO owns them, or boxes cut at random and dealt out."""
    owned: Owned = [[] for _ in range(ranks)]
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, math.prod(shape)), min_size=ranks - 1, max_size=ranks - 1)))
        for rank, (start, stop) in enumerate(zip([0, *cuts], [*cuts, math.prod(shape)], strict=True)):
            owned[rank] += boxes_of_flat_range(shape, start, stop)
        return owned
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axes = [axis for axis, extent in enumerate(box.shape) if extent > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = draw(st.sampled_from(axes))
        boxes += box.split(axis, draw(st.integers(box.lo[axis] + 1, box.hi[axis] - 1)))
    for box in draw(st.permutations(boxes)):
        owned[draw(st.integers(0, ranks - 1))].append(box)
    return owned


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[TensorSpec, Owned], list[Want]]:
    ranks = draw(st.integers(1, 4))
    owned, wants = {}, []
    for number in range(draw(st.integers(1, 3))):
        spec = TensorSpec(TensorKey("master", f"w{number}"), draw(st.sampled_from(PLAIN)), draw(SHAPES))
        owned[spec] = draw(splits(spec.shape, ranks))
        found = draw(st.lists(boxes_in(spec.shape), min_size=1, max_size=3))
        if draw(st.booleans()):  # one rank of another split
            found += draw(splits(spec.shape, draw(st.integers(1, 3))))[0]
        wants += [Want(spec, box) for box in found]
    return owned, wants


@pytest.mark.parametrize("block", BLOCKS)
@given(case=cases(), seed=st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_any_box_from_any_split_is_the_array_bit_for_bit(
    case: tuple[dict[TensorSpec, Owned], list[Want]], seed: int, block: int
) -> None:
    owned, wants = case
    tensors = {spec: random_bytes(spec, seed + i) for i, spec in enumerate(owned)}
    with tempfile.TemporaryDirectory() as folder:
        indices = save(Path(folder), tensors, owned, block)
        staged = read(Path(folder), order_of(indices, wants))
    for want in wants:
        got = staged.get(want.spec.key, want.box)
        assert got is not None and got.shape == (want.box.numel,)
        assert bits(got) == tensors[want.spec][want.box.slices].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_resharded_from_rows_to_columns(dtype: str, tmp_path: Path) -> None:
    spec = TensorSpec(KEY, dtype, (6, 5))
    raw = random_bytes(spec, 3)
    rows = [[Box((0, 0), (2, 5))], [Box((2, 0), (3, 5))], [Box((3, 0), (6, 5))]]
    columns = [Box((0, 0), (6, 2)), Box((0, 2), (6, 5))]
    staged = read(tmp_path, order_of(save(tmp_path, {spec: raw}, {spec: rows}), [Want(spec, c) for c in columns]))
    for box in columns:
        got = staged.get(KEY, box)
        assert got is not None and bits(got) == raw[box.slices].tobytes()


def test_what_was_not_wanted_or_not_stored_is_not_there(tmp_path: Path) -> None:
    spec = TensorSpec(KEY, "bfloat16", (4,))
    half = [Box((0,), (2,)), Box((2,), (4,))]
    indices = save(tmp_path, {spec: random_bytes(spec, 1)}, {spec: [half]})
    staged = read(tmp_path, order_of(indices, [Want(spec, half[0])]))
    assert staged.get(KEY, half[0]) is not None
    assert staged.get(KEY, half[1]) is None
    cast = replace(indices[0], pieces=tuple(replace(p, offset=None, nbytes=0) for p in indices[0].pieces))
    want = Want(spec, half[0], required=False)
    order = ReadOrder(((want, tuple(StoredPieces([cast]).parts(KEY, half[0]))),), {0: cast})
    assert read(tmp_path, order).get(KEY, half[0]) is None


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_a_box_without_elements_is_there_and_empty(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A buffer of no elements is a replica that must be restored like any other."""
    spec = TensorSpec(KEY, "float32", shape)
    indices = save(tmp_path, {spec: random_bytes(spec, 1)}, {spec: [[Box.whole(shape)]]})
    got = read(tmp_path, order_of(indices, [Want(spec, Box.whole(shape))])).get(KEY, Box.whole(shape))
    assert got is not None and got.numel() == 0 and got.dtype == torch.float32


def test_damage_in_a_part_that_is_read_is_named_and_elsewhere_is_not_seen(tmp_path: Path) -> None:
    spec = TensorSpec(KEY, "float64", (64,))
    halves = [[Box((0,), (32,))], [Box((32,), (64,))]]
    indices = save(tmp_path, {spec: random_bytes(spec, 1)}, {spec: halves}, 32)
    piece = indices[1].pieces[0]
    assert piece.offset is not None
    flip(tmp_path / names.data_file(1), piece.offset + piece.nbytes - 1, 0)
    first, last = (order_of(indices, [Want(spec, box)]) for box in (Box((8,), (32,)), Box((8,), (64,))))
    assert read(tmp_path, first).get(KEY, Box((8,), (32,))) is not None
    with pytest.raises(CheckpointDamaged, match=r"rank-00001\.safetensors: the content of bytes"):
        read(tmp_path, last)


# -- parts and ranges


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_byte_range_is_the_tightest_that_holds_the_part(data: st.DataObject) -> None:
    spec = TensorSpec(KEY, data.draw(st.sampled_from(sorted(DTYPES))), data.draw(SHAPES))
    own = data.draw(boxes_in(spec.shape).filter(lambda box: not box.empty))
    wanted = own.intersect(data.draw(boxes_in(spec.shape)))
    if wanted is None:
        return
    piece = StoredPiece(spec, own, "0" * 16, 4096, own.numel * spec.itemsize)
    at = np.arange(own.numel).reshape(own.shape)[wanted.relative_to(own).slices]
    expected = (4096 + int(at.min()) * spec.itemsize, 4096 + (int(at.max()) + 1) * spec.itemsize)
    assert ReadPart(0, piece, wanted).byte_range() == expected


def test_a_part_without_bytes_has_no_range() -> None:
    piece = StoredPiece(TensorSpec(KEY, "float32", (4,)), Box((0,), (4,)), "0" * 16, None, 0)
    with pytest.raises(ValueError, match=r"master/w \[0:4\] has no bytes in a file"):
        ReadPart(0, piece, Box((0,), (2,))).byte_range()


def index_of(rank: int, *pieces: StoredPiece) -> RankIndex:
    return RankIndex("run", 1, 7, rank, 2, FileDigest(0, 32, ()), pieces, {}, {})


def at(start: int, stop: int, offset: int | None, spec: TensorSpec) -> StoredPiece:
    return StoredPiece(spec, Box((start,), (stop,)), "0" * 16, offset, 0 if offset is None else (stop - start) * 4)


def test_parts_are_those_that_meet_the_box_and_what_lacks_is_counted() -> None:
    spec = TensorSpec(KEY, "float32", (10,))
    other = TensorSpec(TensorKey("exp_avg", "w"), "float32", (10,))
    stored = StoredPieces([
        index_of(0, at(0, 3, 4096, spec), at(0, 10, 4200, other)),
        index_of(1, at(3, 6, 4096, spec), at(6, 8, None, spec), at(8, 10, 4108, spec)),
    ])  # fmt: skip
    wanted = Box((2,), (9,))
    parts = stored.parts(KEY, wanted)
    assert [(part.rank, str(part.box), part.byte_range()) for part in parts] == [
        (0, "2:3", (4104, 4108)),
        (1, "3:6", (4096, 4108)),
        (1, "8:9", (4108, 4112)),
    ]
    assert missing_elements(wanted, parts) == 2  # 6 and 7 have no bytes
    assert missing_elements(Box((3,), (6,)), stored.parts(KEY, Box((3,), (6,)))) == 0
    assert ranges_by_rank(parts) == {0: [(4104, 4108)], 1: [(4096, 4108), (4108, 4112)]}
    assert stored.parts(TensorKey("master", "unknown"), wanted) == []
    assert stored.parts(KEY, Box((4,), (4,))) == []


def test_bytes_of_pieces_are_counted_by_their_dtype() -> None:
    wide, narrow = TensorSpec(KEY, "float64", (10,)), TensorSpec(KEY, "bool", (10,))
    assert piece_bytes([(wide, Box((0,), (3,))), (narrow, Box((0,), (3,))), (wide, Box((3,), (3,)))]) == 27
