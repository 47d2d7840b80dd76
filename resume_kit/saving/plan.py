"""What one rank saves and proves, and where each piece lies in its file: made once per layout, used by every save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.layout import FileLayout, plan_file
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines.adapter import LivePiece, ModelDescription, Replica
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.totals import Places, copies_of
from resume_kit.planning.holders import format_ranks, parse_ranks


@dataclass(frozen=True)
class Copied:
    """The tensors of which some rank holds a further copy, and the number of copies: alike on all ranks."""

    keys: tuple[TensorKey, ...]
    copies: int


@dataclass(frozen=True, eq=False)
class Holdings:
    """Everything that this rank holds, in one list: its pieces, then its share of what all ranks hold whole.

    `replicas` are compared among the ranks; `shares` are those of them that this rank saves.
    """

    pieces: tuple[LivePiece, ...]
    shares: tuple[LivePiece, ...]
    replicas: tuple[Replica, ...]

    @property
    def every(self) -> tuple[LivePiece, ...]:
        return (*self.pieces, *self.shares)


@dataclass(frozen=True, eq=False)
class SavePlan:
    """Numbers into `Holdings.every`. It holds no tensor, so that an engine may let go of its own.

    saved: pieces of the rank's index, in order; `offsets` says where each lies in the file, None where it follows
        from its master. measured: pieces whose fingerprint is taken. cast: pieces that must equal their master's cast.
    places: where the fingerprints of `measured` are summed for the comparison of copies. frozen: there are weights
    without a master, which no fence guards: a forward may change them (a teacher's moving average). snapshots: bytes
    [start, stop) of the file that come from memory which a capture writes.
    """

    layout: FileLayout
    saved: tuple[int, ...]
    offsets: tuple[int | None, ...]
    measured: tuple[int, ...]
    cast: tuple[int, ...]
    copied: Copied
    places: Places
    frozen: bool
    snapshots: tuple[tuple[int, int], ...]

    def sources(self, every: Sequence[LivePiece]) -> list[tuple[int, torch.Tensor]]:
        """(byte offset, bytes) of what goes into the file behind its header, in file order.

        Neighbours in the file that are neighbours in memory, as the parts of a flat buffer are, come as one.
        """
        placed = [(o, n) for n, o in zip(self.saved, self.offsets, strict=True) if o is not None]
        found: list[tuple[int, torch.Tensor]] = []
        for offset, number in sorted(placed):
            data = every[number].data.detach().view(torch.uint8)
            if found and (joined := _joined(found[-1][1], data)) is not None:
                found[-1] = (found[-1][0], joined)
            elif data.numel():
                found.append((offset, data))
        return found


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """Both as one, where `second` follows `first` in the same memory; None where it does not."""
    if first.data_ptr() + first.numel() != second.data_ptr():
        return None
    storage = first.untyped_storage()
    if storage.data_ptr() != second.untyped_storage().data_ptr():
        return None
    return torch.as_strided(first, (first.numel() + second.numel(),), (1,))


def signature(holdings: Holdings) -> list[Any]:
    """What a plan depends on, to be compared with what it was made for."""
    return [(p.spec, p.box, p.copy, p.cast_of is None, p.data.data_ptr()) for p in holdings.every]


def plan_save(holdings: Holdings, copied: Copied, metadata: dict[str, str], device: torch.device) -> SavePlan:
    """Lay out the file of what `holdings` own. No communication."""
    every = holdings.every
    saved = [n for n, piece in enumerate(every) if piece.owned]
    stored = sorted((n for n in saved if every[n].cast_of is None), key=lambda n: every[n].spec.key.kind)
    layout = plan_file([(every[n].spec, every[n].box) for n in stored], metadata)
    offsets = {(slot.spec, slot.box): slot.offset for slot in layout.slots}
    keys = set(copied.keys)
    measured = [n for n, p in enumerate(every) if p.owned or (p.copy is not None and p.spec.key in keys)]
    return SavePlan(
        layout=layout,
        saved=tuple(saved),
        offsets=tuple(offsets[every[n].spec, every[n].box] if every[n].cast_of is None else None for n in saved),
        measured=tuple(measured),
        cast=tuple(n for n, piece in enumerate(every) if piece.cast_of is not None),
        copied=copied,
        frozen=any(every[n].spec.key.kind == "param" for n in stored),
        places=Places.of([every[n] for n in measured], copied.keys, copied.copies, device),
        snapshots=tuple((s.offset, s.offset + s.nbytes) for s in layout.slots if s.spec.key.kind == "buffer"),
    )


def agree_on_copies(pieces: Iterable[LivePiece], description: ModelDescription, coordinator: Coordinator) -> Copied:
    """Which tensors have copies on any rank. A round; needed again only when some rank's pieces change."""
    pieces = list(pieces)
    tensors = sorted({spec.key.name for spec in (*description.weights, *description.buffers)})
    number = {name: i for i, name in enumerate(tensors)}
    mine: dict[str, set[int]] = {}
    for piece in pieces:
        if piece.copy and piece.spec.key.name in number:  # a tensor that came later is refused when all agree
            mine.setdefault(piece.spec.key.kind, set()).add(number[piece.spec.key.name])
    every = coordinator.gather(
        "save: copies", lambda: ({kind: format_ranks(found) for kind, found in mine.items()}, copies_of(pieces))
    )
    copied = {(kind, i) for rows, _ in every for kind, text in rows.items() for i in parse_ranks(text)}
    keys = tuple(TensorKey(kind, tensors[i]) for kind, i in sorted(copied))
    return Copied(keys, max(count for _, count in every))


def own_name(replica: Replica, rank: int) -> Replica:
    """A tensor that differs between ranks, under this rank's own name."""
    key = TensorKey(replica.spec.key.kind, f"{replica.spec.key.name}@rank{rank}")
    return replace(replica, spec=replace(replica.spec, key=key))


def shares_of(
    replicas: Sequence[Replica], differing: Set[TensorKey], rank: int, world_size: int
) -> tuple[LivePiece, ...]:
    """The whole tensors that this rank saves: its own versions, and its share of those that all hold alike.

    Each goes to the rank with the least so far, so that all write about the same.
    """
    load = [0] * world_size
    mine = []
    for replica in replicas:
        if not replica.restored:
            continue
        if replica.spec.key in differing:
            mine.append(own_name(replica, rank))
            continue
        owner = load.index(min(load))
        load[owner] += replica.spec.numel * replica.spec.itemsize
        if owner == rank:
            mine.append(replica)
    return tuple(LivePiece(r.spec, Box.whole(r.spec.shape), r.data.detach().reshape(-1)) for r in mine)
