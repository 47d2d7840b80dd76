"""How figures grow with the ranks: two results of the same engines on different numbers of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.suite.results import Results, Row
from benchmarks.suite.tables import gigabytes, seconds, table

_GROUPS = ("ours", "peer", "floor", "rate")
_METRICS = ("blocking", "durable", "load", "load with proof", "seconds")

#: What has a lower efficiency did not scale.
_SCALES = 0.7

Place = tuple[str, str, str, str]


@dataclass(frozen=True)
class Grown:
    """A system's rows on fewer and on more ranks (or the other way round), whatever their parts are called."""

    engine: str
    ranks: tuple[int, int]
    rows: tuple[Row, Row]

    def efficiency(self, metric: str) -> float | None:
        """Ratio of bytes a second by the ratio of ranks: 1 where twice the ranks move twice the bytes in one time."""
        first, second = (row.rate(metric) for row in self.rows)
        return second / first / (self.ranks[1] / self.ranks[0]) if first and second else None


def grown(before: Results, after: Results) -> list[Grown]:
    """Rows that belong together by engine, file system and system, where the ranks are not as many."""
    one, two = _by_place(before), _by_place(after)
    pairs = [(place[0], one[place], two[place]) for place in one if place in two]
    return [Grown(engine, (a, b), (first, second)) for engine, (a, first), (b, second) in pairs if a != b]


def _by_place(results: Results) -> dict[Place, tuple[int, Row]]:
    """Ranks and row of every system by where it belongs; the first, where an engine has several workloads."""
    found: dict[Place, tuple[int, Row]] = {}
    for row in results.rows:
        facts = results.parts.get(row.part, {})
        if row.group in _GROUPS and "ranks" in facts:
            found.setdefault((facts["engine"], row.target, row.group, row.system), (facts["ranks"], row))
    return found


def growth(pairs: Sequence[Grown]) -> Iterator[str]:
    """A Markdown table of seconds, bytes, bytes a second and efficiency; below it what did not scale."""
    for ranks in dict.fromkeys(pair.ranks for pair in pairs):
        yield from _growth(ranks, [pair for pair in pairs if pair.ranks == ranks])


def _growth(ranks: tuple[int, int], pairs: Sequence[Grown]) -> Iterator[str]:
    lines, laggards = [], []
    for pair in pairs:
        first, second = pair.rows
        for metric in _METRICS:
            spreads = [row.spread(metric) for row in pair.rows]
            if None in spreads:
                continue
            efficiency = pair.efficiency(metric)
            cells = [pair.engine, first.target, first.system, metric]
            cells += [seconds(spread.median) for spread in spreads if spread]
            cells += [gigabytes(first), gigabytes(second), *(_rate(row, metric) for row in pair.rows)]
            lines.append([*cells, "" if efficiency is None else f"{efficiency:.2f}"])
            if efficiency is not None and efficiency < _SCALES:
                laggards.append(f"{pair.engine}, {first.target}, {first.system}, {metric} ({efficiency:.2f})")
    columns = [f"{what} on {number}" for what in ("s", "GB", "GB/s") for number in ranks]
    yield from table(["engine", "file system", "system", "what", *columns, "efficiency"], lines)
    yield ""
    yield f"Did not scale, efficiency below {_SCALES}: {'; '.join(laggards) or 'nothing'}."
    yield ""


def _rate(row: Row, metric: str) -> str:
    rate = row.rate(metric)
    return "" if rate is None else f"{rate / 1e9:.2f}"
