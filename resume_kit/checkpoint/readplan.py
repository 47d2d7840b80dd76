"""What to read of the data files and where it goes: whole blocks where that costs little, else only what is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class ReadPlan:
    """`whole` holds, for each source, the blocks that are read whole; `near` is the largest gap that is read over.

    Surplus is at most 5% of `wanted_bytes`. On top come gaps of less than a page, which a disk reads in any case, and
    the headers of files of which all pieces are wanted: these are read to the last byte, so that every block of theirs
    is checked.
    """

    sources: tuple[Source, ...]
    whole: tuple[frozenset[int], ...]
    near: int
    wanted_bytes: int

    @property
    def window_bytes(self) -> int:
        """No window is larger."""
        return max((min(source.digests.block_bytes, source.digests.size) for source in self.sources), default=0)

    def windows(self, number: int) -> Iterator[Window]:
        """What to read of source `number`, in file order."""
        source, whole = self.sources[number], self.whole[number]
        touched = dict(_touched(source))
        for block in sorted(touched.keys() | whole):
            start, stop = source.digests.span(block)
            transfers = _clipped(touched.get(block, ()), start, stop)
            if block in whole:
                yield Window(block, start, stop, True, np.array([[start, stop]]), transfers)
            elif transfers:
                yield Window(block, start, stop, False, _segments(transfers, self.near), transfers)


@dataclass(frozen=True, slots=True, order=True)
class _Incomplete:
    """A block of which `missing` bytes would be read in vain, and the gaps that could be read over: size and number."""

    missing: int
    source: int
    block: int
    gaps: tuple[tuple[int, int], ...]


def plan_reads(sources: Sequence[Source]) -> ReadPlan:
    """Complete the blocks that lack least, then read over the smallest gaps, as far as the surplus budget goes.

    Gaps of less than a page do not count. Raises `CheckpointDamaged` where pieces reach beyond the end of their file.
    """
    whole: list[set[int]] = [set() for _ in sources]
    incomplete: list[_Incomplete] = []
    wanted_bytes = 0
    for number, source in enumerate(sources):
        if any(transfer.stop > source.digests.size for transfer in source.transfers):
            raise canonical.damaged(Path(source.file), "its index places pieces beyond its end")
        wanted_of_file, lacking = 0, []
        for block, reaching in _touched(source):
            wanted, missing, gaps = _survey(reaching, *source.digests.span(block))
            wanted_of_file += wanted
            if wanted and not missing:
                whole[number].add(block)
            elif wanted:
                lacking.append(_Incomplete(missing, number, block, gaps))
        wanted_bytes += wanted_of_file
        if wanted_of_file == source.stored > 0:
            whole[number].update(range(len(source.digests.blocks)))
        else:
            incomplete += lacking
    budget = wanted_bytes // WANTED_PER_SURPLUS
    left: list[tuple[int, int]] = []
    for found in sorted(incomplete):
        if found.missing <= budget:
            budget -= found.missing
            whole[found.source].add(found.block)
        else:
            left += found.gaps
    near = _affordable(left, budget)
    return ReadPlan(tuple(sources), tuple(frozenset(blocks) for blocks in whole), near, wanted_bytes)


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
