"""Worlds larger than a test can start: a rank's real files under a predicted layout, and what other ranks read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import names
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.planning.layouts.layout import Layout
from resume_kit.planning.reads import StoredPieces
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.wanted import Want

KINDS = ("master", "exp_avg", "exp_avg_sq")

Arrays = Mapping[TensorSpec, NDArray[np.float32]]


@dataclass(frozen=True)
class Holding:
    """A box of a tensor on a simulated rank."""

    spec: TensorSpec
    box: Box
    owned: bool


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[TensorSpec, NDArray[np.float32]]:
    """Master and moments of every weight, each of its own values."""
    generator = np.random.default_rng(seed)
    return {
        TensorSpec(TensorKey(kind, name), "float32", shape): generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
        for kind in KINDS
    }


def holdings(layout: Layout, rank: int) -> Iterator[Holding]:
    """Every box of every kind that a rank holds, as an engine of that layout would."""
    shapes = dict(zip(layout.table.names, layout.table.shapes, strict=True))
    for held in layout.held(rank):
        for kind in KINDS:
            yield Holding(TensorSpec(TensorKey(kind, held.name), "float32", shapes[held.name]), held.box, held.owned)


def write_world(folder: Path, state: Arrays, layout: Layout, block_bytes: int) -> dict[int, RankIndex]:
    """The data files of all ranks of a layout, with their indices. Blocks are small, so that files have many."""
    folder.mkdir()
    indices = {}
    for rank in range(layout.world_size):
        owned = [(held.spec, held.box) for held in holdings(layout, rank) if held.owned]
        file = plan_file(owned, {"format": "resume_kit", "rank": str(rank)})
        image = bytearray(file.size)
        image[: len(file.header)] = file.header
        pieces = []
        for slot in file.slots:
            data = state[slot.spec][slot.box.slices].ravel()
            image[slot.offset : slot.offset + slot.nbytes] = data.tobytes()
            share = fingerprint.to_hex(fingerprint.fingerprint_of_box(data, slot.spec.shape, slot.box))
            pieces.append(StoredPiece(slot.spec, slot.box, share, slot.offset, slot.nbytes))
        (folder / names.data_file(rank)).write_bytes(image)
        indices[rank] = RankIndex(
            run_id="0123456789ab",
            attempt=1,
            step=1,
            rank=rank,
            world_size=layout.world_size,
            data=digest_image(memoryview(image), block_bytes),
            pieces=tuple(pieces),
            scalars={},
            rng={},
        )
    return indices


def order_of(held: list[Holding], indices: Mapping[int, RankIndex]) -> ReadOrder:
    """What a rank that holds these boxes reads from the files of those indices."""
    stored = StoredPieces(indices.values())
    wants = [Want(one.spec, one.box) for one in held]
    return ReadOrder(tuple((want, tuple(stored.parts(want.spec.key, want.box))) for want in wants), indices)
