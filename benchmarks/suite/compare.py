"""Two results side by side: rows of the same part, file system and system, and their ratio."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.suite.growth import grown, growth
from benchmarks.suite.results import Results
from benchmarks.suite.tables import seconds, table

#: Metrics worth a line; single steps and phases are in the JSON.
_SHOWN = ("blocking", "durable", "load", "load with proof", "seconds", "mean step", "preflight", "prove", "gate")


def comparison(before: Results, after: Results) -> Iterator[str]:
    """A Markdown table of medians, another of those on other numbers of ranks; then what only one of the two has."""
    one, two = ({row.key: row for row in results.rows} for results in (before, after))
    yield f"{before.preset} of {before.date} and {after.preset} of {after.date}"
    yield ""
    pairs = grown(before, after)
    told = {row.key for pair in pairs for row in pair.rows}
    lines = []
    for key, row in one.items():
        if key not in two or key in told:
            continue
        for metric in _SHOWN:
            first, second = row.spread(metric), two[key].spread(metric)
            if first and second:
                ratio = f"{second.median / first.median:.2f}" if first.median else ""
                cells = [row.part, row.target, row.system, metric, seconds(first.median), seconds(second.median)]
                lines.append([*cells, ratio])
    if lines:
        yield from table(["part", "file system", "system", "what", "before", "after", "after ÷ before"], lines)
        yield ""
    yield from growth(pairs)
    for name, missing in (("before", one.keys() - two.keys()), ("after", two.keys() - one.keys())):
        for part, target, _, system in sorted(missing - told):
            yield f"only {name}: {part}, {target}, {system}"
