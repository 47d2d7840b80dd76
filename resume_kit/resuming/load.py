"""Load: checked bytes into host memory first; the live engine is written only after every rank has all of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resume_kit.algebra.boxes import Box, flat_strides
from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.reading import FileBytes, read_ranges
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines.adapter import EngineAdapter
from resume_kit.planning.reads import ReadPart
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.wanted import Want, optimizer_kinds, stored_key


class StagedState:
    """Checked bytes of every wanted box, in host memory."""

    def __init__(self, boxes: Mapping[tuple[TensorKey, Box], memoryview]) -> None:
        self._boxes = boxes

    def get(self, key: TensorKey, box: Box, dtype: torch.dtype) -> torch.Tensor | None:
        """The box as a 1-D host tensor of box.numel elements, or None where it follows from a master."""
        memory = self._boxes.get((key, box))
        if memory is None:
            return None
        return torch.frombuffer(memory, dtype=dtype) if len(memory) else torch.empty(0, dtype=dtype)


def stage_reading(directory: Path, order: ReadOrder) -> StagedState:
    """Read and check every part; touches nothing live. Raises `CheckpointDamaged` naming file and bytes."""
    read = {
        rank: read_ranges(directory / names.data_file(rank), order.indices[rank].data, ranges)
        for rank, ranges in order.ranges().items()
    }
    boxes = {}
    for want, parts in order.wants:
        if parts or want.box.empty:
            boxes[want.spec.key, want.box] = _fill(want, parts, read)
    return StagedState(boxes)


def _fill(want: Want, parts: tuple[ReadPart, ...], read: Mapping[int, FileBytes]) -> memoryview:
    """The bytes of a wanted box: the stored piece itself where it is the same box, else put together from parts."""
    if len(parts) == 1 and parts[0].piece.box == want.box:
        return _bytes_of(parts[0], read)
    unsigned = np.dtype(f"u{want.spec.itemsize}")
    filled = np.empty(want.box.shape, dtype=unsigned)
    for part in parts:
        start, stop = part.byte_range()
        held = np.frombuffer(read[part.rank].view(start, stop - start), dtype=unsigned)
        strides = [held.itemsize * stride for stride in flat_strides(part.piece.box.shape)]
        filled[part.box.relative_to(want.box).slices] = np.lib.stride_tricks.as_strided(held, part.box.shape, strides)
    return filled.reshape(-1).view(np.uint8).data


def _bytes_of(part: ReadPart, read: Mapping[int, FileBytes]) -> memoryview:
    assert part.piece.offset is not None
    return read[part.rank].view(part.piece.offset, part.piece.nbytes)


def write(adapter: EngineAdapter, manifest: Manifest, staged: StagedState, rank: int) -> None:
    """Write the staged tensors into the live engine in place. The adapter's `publish` comes after it.

    Low-precision weights without stored bytes are cast from their master, as the optimizer's own step does.
    """
    state: dict[str, Any] = canonical.decode(manifest.state)
    adapter.prepare_load(optimizer_kinds(manifest), state["scalars"])
    entries = manifest.by_key()
    with torch.no_grad():
        for piece in adapter.pieces():
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
