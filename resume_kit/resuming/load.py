"""Load: the live engine is written, in place, only after every rank has all of its own bytes in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.engines.adapter import EngineAdapter
from resume_kit.resuming.staged import StagedState
from resume_kit.resuming.wanted import optimizer_kinds, stored_key


def write(
    adapter: EngineAdapter,
    manifest: Manifest,
    staged: StagedState,
    scalars: Mapping[str, Any],
    rank: int,
    *,
    moments: bool,
) -> None:
    """Write the staged tensors into the live engine in place. The adapter's `publish` comes after it.

    Low-precision weights without stored bytes are cast from their master, as the optimizer's own step does.
    Without `moments` the optimizer starts afresh.
    """
    adapter.prepare_load(optimizer_kinds(manifest) if moments else {}, scalars)
    entries = manifest.by_key()
    with torch.no_grad():
        for piece in adapter.pieces():
            if not piece.restored:
                continue
            source = staged.get(piece.spec.key, piece.box, piece.data.dtype)
            if source is not None:
                piece.data.copy_(source)
            elif piece.cast_of is not None:
                piece.data.copy_(piece.cast_of.data)
        for replica in adapter.replicas():
            if replica.restored:
                key = stored_key(replica.spec.key, entries, rank)
                source = staged.get(key, Box.whole(replica.spec.shape), replica.data.dtype)
                assert source is not None
                replica.data.copy_(source.view(replica.spec.shape))
