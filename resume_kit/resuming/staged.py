"""The bytes that a rank owns, from the data files into host memory. Nothing live is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import names
from resume_kit.checkpoint.reading import ReadAccount, allocate, carry_out, check_ranges
from resume_kit.checkpoint.readplan import ReadPlan, Source, plan_reads
from resume_kit.checkpoint.records import TensorKey
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.errors import CheckpointDamaged, Problem
from resume_kit.planning.reads import missing_elements
from resume_kit.resuming.preflight import ReadOrder


class StagedState:
    """The bytes of every wanted box, in host memory, and the account of their reading."""

    def __init__(self, boxes: Mapping[tuple[TensorKey, Box], memoryview], account: ReadAccount) -> None:
        self._boxes = boxes
        self.account = account

    def get(self, key: TensorKey, box: Box, dtype: torch.dtype) -> torch.Tensor | None:
        """The box as a 1-D host tensor of box.numel elements, or None where it follows from a master."""
        memory = self._boxes.get((key, box))
        if memory is None:
            return None
        return torch.frombuffer(memory, dtype=dtype) if len(memory) else torch.empty(0, dtype=dtype)


def stage_reading(directory: Path, order: ReadOrder) -> StagedState:
    """Read what is wanted, hardly more, each byte into its place. Blocks that are read whole are checked.

    Raises `CheckpointDamaged` naming file and bytes.
    """
    boxes: dict[tuple[TensorKey, Box], memoryview] = {}
    transfers: dict[int, list[Transfer]] = {}
    for want, parts in order.wants:
        if (want.spec.key, want.box) in boxes or missing_elements(want.box, parts):
            continue
        for part in parts:
            assert part.piece.offset is not None
            transfer = Transfer.between(
                part.piece.box, part.piece.offset, want.box, want.spec.itemsize, target=len(boxes)
            )
            transfers.setdefault(part.rank, []).append(transfer)
        boxes[want.spec.key, want.box] = allocate(want.box.numel * want.spec.itemsize)
    plan = _plan(order, transfers)
    return StagedState(boxes, carry_out(plan, directory, tuple(boxes.values())))


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
            check_ranges(directory / index.data_file, index.data, ranges.get(index.data_file, ()), cached=False)
        except CheckpointDamaged as damage:
            problems += damage.problems
    if problems:
        raise CheckpointDamaged(f"{directory.name} is damaged", problems)


def _plan(order: ReadOrder, transfers: Mapping[int, list[Transfer]]) -> ReadPlan:
    sources = []
    for rank in sorted(transfers):
        index = order.indices[rank]
        stored = sum(piece.nbytes for piece in index.pieces)
        sources.append(Source(names.data_file(rank), index.data, stored, tuple(transfers[rank])))
    return plan_reads(sources)
