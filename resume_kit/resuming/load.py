"""Load: the live tensors are written in place, while their bytes are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.carrying import ReadAccount
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.node import Node
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines.adapter import EngineAdapter
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.reading import filled_by, read_into
from resume_kit.resuming.wanted import optimizer_kinds, stored_key


def load(
    adapter: EngineAdapter,
    directory: Path,
    manifest: Manifest,
    order: ReadOrder,
    scalars: Mapping[str, Any],
    rank: int,
    *,
    moments: bool,
    node: Node | None = None,
) -> ReadAccount:
    """Read all that this rank restores into the live engine. The adapter's `publish` comes after it.

    With a `node` all its ranks call this.

    Low-precision weights without stored bytes are cast from their master, as the optimizer's own step does.
    Without `moments` the optimizer starts afresh, and the saved ones are not read. Raises `CheckpointDamaged` naming
    files and bytes; the engine is then written in part, and only another, finished load makes it whole.
    """
    adapter.prepare_load(optimizer_kinds(manifest) if moments else {}, scalars)
    entries = manifest.by_key()
    filled = filled_by(order)
    places: dict[tuple[TensorKey, Box], list[torch.Tensor]] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for piece in adapter.pieces():
        box = piece.spec.key, piece.box
        if piece.restored and box in filled:
            places.setdefault(box, []).append(piece.data)
        elif piece.restored and piece.cast_of is not None:
            copies.append((piece.data, piece.cast_of.data))
    for replica in adapter.replicas():
        if replica.restored:
            box = stored_key(replica.spec.key, entries, rank), Box.whole(replica.spec.shape)
            assert box in filled
            memory = replica.data.contiguous()
            places.setdefault(box, []).append(memory)
            if not replica.data.is_contiguous():
                copies.append((replica.data, memory))
    account = read_into(directory, order, places, node=node)
    with torch.no_grad():
        for target, source in copies:
            target.copy_(source)
    return account
