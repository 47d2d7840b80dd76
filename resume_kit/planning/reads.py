"""Who must read what: the stored pieces that hold a wanted box, and their byte ranges in the data files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resume_kit.algebra.boxes import Box, flat_runs
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.records import TensorKey, TensorSpec


@dataclass(frozen=True, slots=True)
class ReadPart:
    """The part `box` (global coordinates) of a stored piece in the file of `rank`."""

    rank: int
    piece: StoredPiece
    box: Box

    def byte_range(self) -> tuple[int, int]:
        """[start, stop) in the data file that holds all elements of the part. The piece must be stored."""
        if self.piece.offset is None:
            raise ValueError(f"{self.piece.key} [{self.piece.box}] has no bytes in a file")
        runs = flat_runs(self.piece.box.shape, self.box.relative_to(self.piece.box))
        last = int(runs.starts(runs.count - 1, runs.count)[0]) + runs.length
        item = self.piece.spec.itemsize
        return self.piece.offset + runs.first * item, self.piece.offset + last * item


class StoredPieces:
    """All pieces of some rank indices, by tensor."""

    def __init__(self, indices: Iterable[RankIndex]) -> None:
        self._pieces: dict[TensorKey, list[tuple[int, StoredPiece]]] = {}
        for index in indices:
            for piece in index.pieces:
                self._pieces.setdefault(piece.key, []).append((index.rank, piece))

    def parts(self, key: TensorKey, box: Box) -> list[ReadPart]:
        """The stored parts that meet `box`; together they may hold less than all of it."""
        found = []
        for rank, piece in self._pieces.get(key, ()):
            common = piece.box.intersect(box)
            if common is not None and piece.stored:
                found.append(ReadPart(rank, piece, common))
        return found


def missing_elements(wanted: Box, parts: Sequence[ReadPart]) -> int:
    """Elements of `wanted` that no part holds. Parts of one checkpoint never overlap."""
    return wanted.numel - sum(part.box.numel for part in parts)


def ranges_by_rank(parts: Iterable[ReadPart]) -> dict[int, list[tuple[int, int]]]:
    """Byte ranges to read, by the rank whose data file holds them."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for part in parts:
        ranges.setdefault(part.rank, []).append(part.byte_range())
    return ranges


def piece_bytes(pieces: Iterable[tuple[TensorSpec, Box]]) -> int:
    """Bytes of the pieces."""
    return sum(spec.itemsize * box.numel for spec, box in pieces)
