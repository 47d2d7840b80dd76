"""Which ranks' files hold a tensor, as short texts: ``0-7,16`` for ranks 0 to 7 and 16.

With them in the manifest a rank of thousands reads only the indices of the ranks that hold what it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from resume_kit.checkpoint.index import RankIndex

_RUN = re.compile(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?")


def format_ranks(ranks: Iterable[int]) -> str:
    """A set of ranks as text: runs in ascending order, as few as can be. The empty text for no ranks."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranks(text: str, *, below: int | None = None) -> list[int]:
    """The inverse of `format_ranks`. ValueError for anything that it would not have written, or ranks not `below`."""
    ranks: list[int] = []
    for part in text.split(",") if text else []:
        run = _RUN.fullmatch(part)
        if run is None:
            raise ValueError(f"not a set of ranks: {text!r} (one is written like '0-7,16')")
        first, last = int(run[1]), int(run[2] or run[1])
        if below is not None and last >= below:
            raise ValueError(f"rank {last} in {text[:40]!r}, of {below} ranks")
        if (run[2] and first >= last) or (ranks and first <= ranks[-1] + 1):
            raise ValueError(f"ranks out of order in {text!r}: {part!r}")
        ranks += range(first, last + 1)
    return ranks


def holders_of(indices: Iterable[RankIndex]) -> dict[str, str]:
    """For each tensor name the ranks whose files hold a piece of it, of whatever kind.

    Pieces without bytes count too: a low-precision weight is where its master is, and its fingerprint is wanted.
    """
    holders: dict[str, set[int]] = {}
    for index in indices:
        for name in {piece.key.name for piece in index.pieces}:
            holders.setdefault(name, set()).add(index.rank)
    return {name: format_ranks(ranks) for name, ranks in sorted(holders.items())}
