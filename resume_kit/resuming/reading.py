"""The bytes that a rank holds, from the data files straight into the live tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import names
from resume_kit.checkpoint.assignment import needs_of
from resume_kit.checkpoint.carrying import ReadAccount, carry_out
from resume_kit.checkpoint.node import Node
from resume_kit.checkpoint.reading import check_ranges
from resume_kit.checkpoint.readplan import Source, plan_reads, survey, window_bytes
from resume_kit.checkpoint.records import TensorKey
from resume_kit.checkpoint.together import read_together
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.errors import CheckpointDamaged, Problem
from resume_kit.planning.reads import missing_elements
from resume_kit.resuming.device_windows import live_destination
from resume_kit.resuming.preflight import ReadOrder

#: Live tensors by the box that they hold, each of box.numel elements in C order, contiguous.
Places = Mapping[tuple[TensorKey, Box], Sequence[torch.Tensor]]


def filled_by(order: ReadOrder) -> set[tuple[TensorKey, Box]]:
    """The wanted boxes whose bytes are in the files, all of them; the others follow from a master."""
    return {(want.spec.key, want.box) for want, parts in order.wants if not missing_elements(want.box, parts)}


def read_into(
    directory: Path, order: ReadOrder, places: Places, *, readers: int | None = None, node: Node | None = None
) -> ReadAccount:
    """Fill the live tensors at `places` that the files hold whole. Hardly more is read than they take.

    What other ranks of the `node` want too is read together with them; all call this. Blocks that are read whole are
    checked before anything of them is written. Raises `CheckpointDamaged` naming files and bytes, when a part of the
    tensors may be written already, and `NeighbourLost` if another rank of the node failed.
    """
    tensors: list[torch.Tensor] = []
    transfers: dict[int, list[Transfer]] = {}
    filled: set[tuple[TensorKey, Box]] = set()
    for want, parts in order.wants:
        box = want.spec.key, want.box
        if box in filled or missing_elements(want.box, parts):
            continue
        filled.add(box)
        for tensor in places.get(box, ()):
            if tensor.nbytes != (saved := want.box.numel * want.spec.itemsize):
                raise ValueError(f"{want.spec.key} [{want.box}] is live with {tensor.nbytes:,} bytes, not {saved:,}")
            for part in parts:
                assert part.piece.offset is not None
                transfers.setdefault(part.rank, []).append(
                    Transfer.between(part.piece.box, part.piece.offset, want.box, want.spec.itemsize, len(tensors))
                )
            tensors.append(tensor)
    sources, destination = _sources(order, transfers), live_destination(tensors)
    if node is None:
        return carry_out(plan_reads(sources), directory, destination, readers=readers)
    touched = [survey(source) for source in sources]
    with read_together(node, needs_of(sources, touched), window_bytes(sources), destination) as together:
        plan = plan_reads(sources, touched, together.shared)
        return carry_out(plan, directory, destination, readers=readers, together=together)


def verify_unread(directory: Path, order: ReadOrder, account: ReadAccount) -> None:
    """The diagnosis after a fingerprint that is not the saved one: are the blocks good that were read only in part?

    They are read anew, from the disk and not from the page cache, each whole and checked. Raises `CheckpointDamaged`
    naming files and byte ranges; where it does not, the disk is good, and memory or the way from it is not.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for file, start, stop in account.unverified:
        ranges.setdefault(file, []).append((start, stop))
    problems: list[Problem] = []
    for index in order.indices.values():
        try:
            check_ranges(directory / index.data_file, index.data, ranges.get(index.data_file, ()), way="disk")
        except CheckpointDamaged as damage:
            problems += damage.problems
    if problems:
        raise CheckpointDamaged(f"{directory.name} is damaged", problems)


def _sources(order: ReadOrder, transfers: Mapping[int, Sequence[Transfer]]) -> list[Source]:
    sources = []
    for rank in sorted(transfers):
        index = order.indices[rank]
        stored = sum(piece.nbytes for piece in index.pieces)
        sources.append(Source(names.data_file(rank), index.data, stored, tuple(transfers[rank])))
    return sources
