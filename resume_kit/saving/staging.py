"""The host arena: one reused buffer, pinned where there is a GPU, laid out as the exact image of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.index import StoredPiece
from resume_kit.checkpoint.layout import FileLayout
from resume_kit.checkpoint.records import TensorSpec
from resume_kit.engines.adapter import LivePiece
from resume_kit.engines.fingerprint import as_unsigned, fingerprints


@dataclass(frozen=True)
class StagedFile:
    """A file image in host memory and the account of the pieces in it."""

    image: memoryview
    pieces: tuple[StoredPiece, ...]


class Arena:
    """Host memory that grows to the largest image asked for and is then reused."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor [nbytes]; its content is what the last user left."""
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._memory[:nbytes]


def cast_matches(pieces: Sequence[LivePiece]) -> list[bool]:
    """For each piece, whether it is bit for bit the cast of its master; False where it has none."""
    verdicts: list[torch.Tensor] = []
    for piece in pieces:
        if piece.cast_of is None:
            verdicts.append(torch.zeros((), dtype=torch.bool, device=piece.data.device))
        else:
            cast = piece.cast_of.data.to(device=piece.data.device, dtype=piece.data.dtype)
            verdicts.append((bits(cast) == bits(piece.data)).all())
    return [bool(verdict) for verdict in verdicts]


def bits(data: torch.Tensor) -> torch.Tensor:
    """`data` viewed as integers of its own width, so that NaNs compare."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    return data.view(integer)


def stage(arena: Arena, layout: FileLayout, pieces: Sequence[LivePiece], unstored: frozenset[int]) -> StagedFile:
    """Copy `pieces` to their slots of the file image and take their fingerprints on their own device.

    `unstored` are the numbers of pieces that have no slot: only their fingerprint is kept.
    """
    memory = arena.reserve(layout.size)
    memory[: len(layout.header)].copy_(torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))
    offsets: Mapping[tuple[TensorSpec, Box], int] = {(s.spec, s.box): s.offset for s in layout.slots}
    found = fingerprints((piece.data, piece.spec.shape, piece.box) for piece in pieces)
    stored: list[int | None] = []
    for number, piece in enumerate(pieces):
        if number in unstored:
            stored.append(None)
            continue
        offset = offsets[piece.spec, piece.box]
        nbytes = piece.box.numel * piece.spec.itemsize
        memory[offset : offset + nbytes].view(piece.data.dtype).copy_(piece.data, non_blocking=True)
        stored.append(offset)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    records = tuple(
        StoredPiece(
            piece.spec,
            piece.box,
            fingerprint.to_hex(value),
            offset,
            0 if offset is None else piece.box.numel * piece.spec.itemsize,
        )
        for piece, value, offset in zip(pieces, as_unsigned(found), stored, strict=True)
    )
    return StagedFile(memory.numpy().data, records)
