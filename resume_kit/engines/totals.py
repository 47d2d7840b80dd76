"""Fingerprints of whole tensors, copy by copy, over all ranks: one all-reduce of 16 bytes a copy of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from resume_kit.algebra.fingerprint import MASK
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines.adapter import OWNED, LivePiece

#: What is wrong with a copy of which every piece is sound: pieces are missing, or there twice.
UNCOVERED = "does not cover the tensor exactly once: some rank lists too few or too many pieces of it"


@dataclass(frozen=True)
class Totals:
    """`sums[copy][i]` and `elements[copy][i]` of tensor `keys[i]`; a copy without elements does not exist."""

    keys: tuple[TensorKey, ...]
    sums: tuple[tuple[int, ...], ...]
    elements: tuple[tuple[int, ...], ...]

    @property
    def owned(self) -> dict[TensorKey, int]:
        """Fingerprint of what the owners hold together, by tensor."""
        return dict(zip(self.keys, self.sums[OWNED], strict=True))

    def odd_copies(self, expected: dict[TensorKey, int], numel: dict[TensorKey, int]) -> list[tuple[TensorKey, int]]:
        """(tensor, copy) of every copy, the owners' aside, that is not as expected or does not cover the tensor."""
        return [
            (key, copy)
            for copy in range(1, len(self.sums))
            for number, key in enumerate(self.keys)
            if self.elements[copy][number]
            and (self.elements[copy][number] != numel[key] or self.sums[copy][number] != expected[key])
        ]


def copies_of(pieces: Sequence[LivePiece]) -> int:
    """Number of copies, the owners' included, that this rank's pieces tell of."""
    return 1 + max((piece.copy or OWNED for piece in pieces), default=OWNED)


def totals(
    pieces: Sequence[LivePiece], values: torch.Tensor, keys: Sequence[TensorKey], copies: int, device: torch.device
) -> Totals:
    """Sum `values`, the fingerprints of `pieces` (int64 [n]), by tensor and copy over all ranks. Collective.

    `keys` and `copies` must be the same on every rank; pieces of other tensors, or in no copy, are left out.
    """
    found = Places.of(pieces, keys, copies, device).sums(values)
    if dist.is_initialized():
        dist.all_reduce(found)
    return totals_of(found.tolist(), keys, copies)


@dataclass(frozen=True)
class Places:
    """Where each piece that counts is summed: `chosen` its number, `place` its row, `sizes` its elements, int64 [m].

    The same for every save of a layout, so it is made once.
    """

    chosen: torch.Tensor
    place: torch.Tensor
    sizes: torch.Tensor
    rows: int

    @classmethod
    def of(cls, pieces: Sequence[LivePiece], keys: Sequence[TensorKey], copies: int, device: torch.device) -> Places:
        number = {key: i for i, key in enumerate(keys)}
        counted = [i for i, p in enumerate(pieces) if p.copy is not None and p.spec.key in number]
        place = [(pieces[i].copy or OWNED) * len(keys) + number[pieces[i].spec.key] for i in counted]
        sizes = [pieces[i].box.numel for i in counted]
        chosen, places, numels = (torch.tensor(c, dtype=torch.int64, device=device) for c in (counted, place, sizes))
        return cls(chosen, places, numels, copies * len(keys))

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's sums of fingerprints and of elements, int64 [2, rows]. No communication, no wait."""
        device = self.place.device
        found = torch.zeros(2, self.rows, dtype=torch.int64, device=device)
        if self.chosen.numel():
            found[0].index_add_(0, self.place, values[self.chosen.to(values.device)].to(device))
            found[1].index_add_(0, self.place, self.sizes)
        return found


def totals_of(found: Sequence[Sequence[int]], keys: Sequence[TensorKey], copies: int) -> Totals:
    """`Places.sums`, added up over all ranks, as totals."""
    sums, elements = (
        tuple(tuple(value & MASK for value in row[c * len(keys) : (c + 1) * len(keys)]) for c in range(copies))
        for row in found
    )
    return Totals(tuple(keys), sums, elements)


def guilty(
    rows: Sequence[Sequence[tuple[str, str, int | None, str]]], odd: Sequence[tuple[str, int]]
) -> list[tuple[int, str, str]]:
    """(rank, tensor, box) of the pieces that make copies odd.

    `rows`: of every rank the (tensor, box, copy, fingerprint) of its pieces of the odd tensors. A piece of an odd copy
    is innocent where a sound copy has the same box with the same fingerprint.
    """
    bad = set(odd)
    sound = {(key, box, value) for row in rows for key, box, copy, value in row if (key, copy) not in bad}
    return [
        (rank, key, box)
        for rank, row in enumerate(rows)
        for key, box, copy, value in row
        if (key, copy) in bad and (key, box, value) not in sound
    ]
