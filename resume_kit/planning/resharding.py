"""What every rank of a target reads from the files of a source: bytes, files and parts, for all ranks at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.records import TensorKey
from resume_kit.planning.ownership import meetings
from resume_kit.planning.table import BoxTable, Ints, table_of


@dataclass(frozen=True, eq=False)
class ReadCounts:
    """Per target rank: bytes read and bytes wanted, parts of stored pieces, and (rank, file) pairs of the reads.

    A part is a box that one stored piece and one held box have in common; a strided one counts only its own
    elements. `missing` are wanted bytes that no file holds.
    """

    read: Ints
    wanted: Ints
    parts: Ints
    readers: Ints
    sources: Ints

    @property
    def missing(self) -> Ints:
        return self.wanted - self.read

    @property
    def files(self) -> Ints:
        """Number of data files that each rank reads from."""
        return np.bincount(self.readers, minlength=len(self.read))

    def files_of(self, rank: int) -> list[int]:
        """The ranks whose data files `rank` reads from."""
        return [int(source) for source in self.sources[self.readers == rank]]

    def __add__(self, other: ReadCounts) -> ReadCounts:
        """Both reads by the same ranks; a file that both use counts once."""
        pairs = _distinct(np.concatenate([self.readers, other.readers]), np.concatenate([self.sources, other.sources]))
        return ReadCounts(
            self.read + other.read, self.wanted + other.wanted, self.parts + other.parts, pairs[0], pairs[1]
        )


def count_reads(source: BoxTable, target: BoxTable, world_size: int, bytes_per_element: int) -> ReadCounts:
    """The reads that fill all boxes of `target` (owned ones and copies alike) from the owned boxes of `source`.

    Several kinds of tensor that share their boxes are one plan with the sum of their element sizes. Tensors are
    matched by name; a target's tensor that the source does not have is missing.
    """
    source = _renamed(source.where(source.owned), target)
    wanted = np.zeros(world_size, np.int64)
    np.add.at(wanted, target.rank, target.numel * bytes_per_element)
    read, parts = np.zeros_like(wanted), np.zeros_like(wanted)
    readers, sources = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for one, two, elements in meetings(source, target):
        ranks = target.rank[two]
        np.add.at(read, ranks, elements * bytes_per_element)
        np.add.at(parts, ranks, 1)
        some = _distinct(ranks, source.rank[one])
        readers.append(some[0])
        sources.append(some[1])
    pairs = _distinct(np.concatenate(readers), np.concatenate(sources))
    return ReadCounts(read, wanted, parts, pairs[0], pairs[1])


def stored_table(indices: Iterable[RankIndex], kind: str, shapes: dict[str, tuple[int, ...]]) -> BoxTable:
    """The boxes of one kind of tensor that have bytes in the files, as the ranks' indices tell."""
    rows = (
        (piece.key.name, index.rank, piece.box, True)
        for index in indices
        for piece in index.pieces
        if piece.stored and piece.key == TensorKey(kind, piece.key.name) and piece.key.name in shapes
    )
    return table_of(shapes, rows)


def _renamed(source: BoxTable, target: BoxTable) -> BoxTable:
    """The rows of `source` whose tensors `target` has too, with its numbers for them."""
    number = {name: i for i, name in enumerate(target.names)}
    translation = np.array([number.get(name, -1) for name in source.names], np.int64)
    tensor = translation[source.tensor] if len(source) else source.tensor
    width = max(source.lo.shape[1], target.lo.shape[1])
    kept = tensor >= 0
    pad = ((0, 0), (0, width - source.lo.shape[1]))
    return BoxTable(
        target.names,
        target.shapes,
        tensor[kept],
        source.rank[kept],
        np.pad(source.lo, pad)[kept],
        np.pad(source.hi, pad, constant_values=1)[kept],
        source.owned[kept],
    )


def _distinct(readers: Ints, sources: Ints) -> tuple[Ints, Ints]:
    span = int(sources.max(initial=0)) + 1
    keys = np.unique(readers * span + sources)
    return keys // span, keys % span
