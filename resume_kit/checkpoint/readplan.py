"""What to read of the data files and where it goes: whole blocks where that costs little, else only what is wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.pages import PAGE
from resume_kit.checkpoint.transfers import Transfer

#: One byte may be read in vain for so many wanted: 5%.
WANTED_PER_SURPLUS = 20
#: Runs farther apart than this are never read as one, whatever the budget.
NEAR = 128 << 10


@dataclass(frozen=True, slots=True)
class Source:
    """What is wanted of one data file. `stored` is the size of all pieces in it: of all but its header."""

    file: str
    digests: FileDigest
    stored: int
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A block, bytes [start, stop) of a file: `reads` come into memory, and `transfers` take from there what is wanted.

    A block that is read `whole` is to be checked before any transfer.
    """

    block: int
    start: int
    stop: int
    whole: bool
    reads: NDArray[np.int64]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Touched:
    """A block that transfers reach into, and what reading all of it would bring in vain.

    wanted, missing: bytes; gaps of less than a page are in neither. gaps: those that could be read over, as (size,
    number).
    """

    transfers: tuple[Transfer, ...]
    wanted: int
    missing: int
    gaps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """`whole` holds, for each source, the blocks that are read whole; `near` is the largest gap that is read over.
    `shared` are the blocks that the ranks of this node read together, whole; what this rank wants of them counts in
    `wanted_bytes`.

    Surplus is at most 5% of what is wanted. On top come gaps of less than a page, which a disk reads in any case, and
    the headers of files of which all pieces are wanted: these are read to the last byte, so that every block of theirs
    is checked.
    """

    sources: tuple[Source, ...]
    touched: tuple[Mapping[int, Touched], ...]
    whole: tuple[frozenset[int], ...]
    shared: tuple[frozenset[int], ...]
    near: int
    wanted_bytes: int

    @property
    def window_bytes(self) -> int:
        """No window is larger."""
        return window_bytes(self.sources)

    def windows(self, number: int) -> Iterator[Window]:
        """What this rank alone reads of source `number`, in file order."""
        source, touched, whole = self.sources[number], self.touched[number], self.whole[number]
        for block in sorted((touched.keys() | whole) - self.shared[number]):
            if block in whole:
                yield self.window(number, block)
                continue
            start, stop = source.digests.span(block)
            transfers = _clipped(touched[block].transfers, start, stop)
            if transfers:
                yield Window(block, start, stop, False, _segments(transfers, self.near), transfers)

    def window(self, number: int, block: int) -> Window:
        """All of a block, and what this rank wants of it."""
        start, stop = self.sources[number].digests.span(block)
        found = self.touched[number].get(block)
        transfers = _clipped(found.transfers, start, stop) if found else ()
        return Window(block, start, stop, True, np.array([[start, stop]]), transfers)


def window_bytes(sources: Sequence[Source]) -> int:
    """The size of the largest block of `sources`; 0 without any."""
    return max((min(source.digests.block_bytes, source.digests.size) for source in sources), default=0)


def survey(source: Source) -> dict[int, Touched]:
    """Each block that is reached into, in file order.

    Raises `CheckpointDamaged` where pieces reach beyond the end of the file.
    """
    if any(transfer.stop > source.digests.size for transfer in source.transfers):
        raise canonical.damaged(Path(source.file), "its index places pieces beyond its end")
    return {
        block: Touched(tuple(reaching), *_survey(reaching, *source.digests.span(block)))
        for block, reaching in _touched(source)
    }


def plan_reads(
    sources: Sequence[Source],
    touched: Sequence[Mapping[int, Touched]] | None = None,
    shared: Mapping[str, Collection[int]] | None = None,
) -> ReadPlan:
    """Complete the blocks that lack least, then read over the smallest gaps, as far as the surplus budget goes.

    Gaps of less than a page do not count. `touched` is the `survey` of each source, if it has been made; `shared` are
    blocks by file that are left to the node. Raises `CheckpointDamaged` where pieces reach beyond the end of their
    file.
    """
    touched = [survey(source) for source in sources] if touched is None else touched
    left_out = [frozenset((shared or {}).get(source.file, ())) for source in sources]
    whole: list[set[int]] = []
    incomplete: list[tuple[int, int, int]] = []
    wanted_bytes = own_bytes = 0
    for number, (source, blocks) in enumerate(zip(sources, touched, strict=True)):
        wanted_of_file = sum(found.wanted for found in blocks.values())
        wanted_bytes += wanted_of_file
        alone = {block: found for block, found in blocks.items() if found.wanted and block not in left_out[number]}
        own_bytes += sum(found.wanted for found in alone.values())
        if wanted_of_file == source.stored > 0:
            whole.append({*range(len(source.digests.blocks))} - left_out[number])
        else:
            whole.append({block for block, found in alone.items() if not found.missing})
            incomplete += [(found.missing, number, block) for block, found in alone.items() if found.missing]
    budget = own_bytes // WANTED_PER_SURPLUS
    left: list[tuple[int, int]] = []
    for missing, number, block in sorted(incomplete):
        if missing <= budget:
            budget -= missing
            whole[number].add(block)
        else:
            left += touched[number][block].gaps
    near = _affordable(left, budget)
    return ReadPlan(tuple(sources), tuple(touched), tuple(map(frozenset, whole)), tuple(left_out), near, wanted_bytes)


def _touched(source: Source) -> Iterator[tuple[int, list[Transfer]]]:
    """Each block that transfers reach into, in file order, with them; they may take nothing from it."""
    waiting = sorted(source.transfers, key=lambda transfer: transfer.offset, reverse=True)
    reaching: list[Transfer] = []
    block = 0
    while waiting or reaching:
        if not reaching:
            block = max(block, waiting[-1].offset // source.digests.block_bytes)
        stop = source.digests.span(block)[1]
        while waiting and waiting[-1].offset < stop:
            reaching.append(waiting.pop())
        yield block, reaching
        reaching = [transfer for transfer in reaching if transfer.stop > stop]
        block += 1


def _clipped(transfers: Sequence[Transfer], start: int, stop: int) -> tuple[Transfer, ...]:
    return tuple(part for transfer in transfers for part in transfer.clip(start, stop))


def _segments(transfers: Sequence[Transfer], near: int) -> NDArray[np.int64]:
    """[start, stop) of the runs of `transfers` in file order, as one where at most `near` bytes lie between."""
    starts = [transfer.starts() for transfer in transfers]
    lengths = np.repeat([transfer.length for transfer in transfers], [found.size for found in starts])
    begin = np.concatenate(starts)
    order = np.argsort(begin, kind="stable")
    begin = begin[order]
    end = np.maximum.accumulate(begin + lengths[order])
    first = np.append(True, begin[1:] - end[:-1] > near)
    return np.stack([begin[first], end[np.append(first[1:], True)]], axis=1)


def _survey(transfers: Sequence[Transfer], start: int, stop: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """(wanted bytes of a block, the others but for gaps of less than a page, gaps that could be read over).

    These gaps, between runs, are given as (size, number).
    """
    if any(t.offset <= start and t.stop >= stop for t in transfers if not t.grid):
        return stop - start, 0, ()
    parts = _clipped(transfers, start, stop)
    if not parts:
        return 0, stop - start, ()
    runs = _segments(parts, 0)
    gaps = np.append(runs[:, 0], stop) - np.append(
        start, runs[:, 1]
    )  # the first and the last reach to the block's ends
    between = gaps[1:-1]
    sizes, counts = np.unique(between[(between >= PAGE) & (between <= NEAR)], return_counts=True)
    wanted, missing = (runs[:, 1] - runs[:, 0]).sum(), gaps[gaps >= PAGE].sum()
    return int(wanted), int(missing), tuple(zip(sizes.tolist(), counts.tolist(), strict=True))


def _affordable(gaps: Sequence[tuple[int, int]], budget: int) -> int:
    """The largest gap such that all gaps up to it, from a page on, together take no more than `budget` bytes."""
    near = PAGE - 1
    totals: dict[int, int] = {}
    for size, count in gaps:
        totals[size] = totals.get(size, 0) + size * count
    for size in sorted(totals):
        budget -= totals[size]
        if budget < 0:
            break
        near = size
    return near
