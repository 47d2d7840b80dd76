"""Which blocks the ranks of a node read together, and which rank reads each: the same answer on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from resume_kit.checkpoint.readplan import WANTED_PER_SURPLUS, Source, Touched

#: What a rank wants of each file: (block, its bytes, how many of them this rank would read if it read alone).
Needs = Mapping[str, Sequence[tuple[int, int, int]]]

#: Sharing less than this, in bytes, is not worth connections, windows and threads.
LEAST_SHARED = 32 << 20
#: A block is shared where the ranks besides the one that wants most of it want at least one of so many bytes.
OTHERS_SHARE = 8
#: Blocks in a row that one rank reads at the most, so that the ranks' shares come out even.
STRETCH = 16


@dataclass(frozen=True, slots=True)
class Share:
    """A block, bytes [0, nbytes) of it; `reader` brings it for itself and for `takers`."""

    file: str
    block: int
    nbytes: int
    reader: int
    takers: tuple[int, ...]


def needs_of(sources: Iterable[Source], touched: Iterable[Mapping[int, Touched]]) -> Needs:
    """What this rank wants, to be told to the others of its node."""
    needs = {}
    for source, blocks in zip(sources, touched, strict=True):
        sizes = ((block, source.digests.span(block), found) for block, found in blocks.items() if found.wanted)
        needs[source.file] = [(block, hi - lo, hi - lo - found.missing) for block, (lo, hi), found in sizes]
    return needs


def assign(needs: Mapping[int, Needs]) -> tuple[Share, ...]:
    """The blocks to read together, by file and block, from what each rank of a node wants. Empty where it saves little.

    Reading a block whole, once, costs at most 5% more than all ranks' reading of their own parts. Ranks read about as
    much as each other, in stretches of blocks.
    """
    wanted: dict[tuple[str, int, int], dict[int, int]] = {}
    for rank in sorted(needs):
        for file, blocks in needs[rank].items():
            for block, nbytes, would_read in blocks:
                wanted.setdefault((file, block, nbytes), {})[rank] = would_read
    together = {place for place, ranks in wanted.items() if _worth(place[2], ranks.values())}
    if sum(nbytes for *_, nbytes in together) < LEAST_SHARED:
        return ()
    load = dict.fromkeys(needs, 0)
    for place in wanted.keys() - together:
        for rank, would_read in wanted[place].items():
            load[rank] += would_read
    shares: list[Share] = []
    for stretch in _stretches(sorted(together), wanted):
        ranks = wanted[stretch[0]].keys()
        reader = min(ranks, key=lambda rank: (load[rank], rank))
        takers = tuple(rank for rank in ranks if rank != reader)
        for file, block, nbytes in stretch:
            load[reader] += nbytes
            shares.append(Share(file, block, nbytes, reader, takers))
    return tuple(shares)


def _worth(nbytes: int, would_read: Iterable[int]) -> bool:
    *others, most = sorted(would_read)
    enough = nbytes * WANTED_PER_SURPLUS <= (sum(others) + most) * (WANTED_PER_SURPLUS + 1)
    return enough and sum(others) * OTHERS_SHARE >= nbytes


def _stretches(
    blocks: Sequence[tuple[str, int, int]], wanted: Mapping[tuple[str, int, int], Mapping[int, int]]
) -> Iterator[Sequence[tuple[str, int, int]]]:
    """`blocks` in their order, cut where a file, a row of neighbours or the set of ranks ends, and into even parts."""
    numbered = enumerate(blocks)
    for _, row in groupby(numbered, lambda item: (item[1][0], item[1][1] - item[0], tuple(wanted[item[1]]))):
        found = [place for _, place in row]
        length = min(STRETCH, -(-len(found) // len(wanted[found[0]])))
        for start in range(0, len(found), length):
            yield found[start : start + length]
