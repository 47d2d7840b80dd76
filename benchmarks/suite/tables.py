"""Names and formats that the report, the charts and the comparison share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.suite.results import Row

#: Rows of the floors that saves and loads are held against.
RAW_WRITE, RAW_READ = "raw write and fsync", "raw read"

#: Row of the kit's gate by itself.
GATE = "gate at a save, forward and backward"

#: What is measured of every system.
SAVES = ("blocking", "durable", "load")


def seconds(value: float | None) -> str:
    """Three figures, enough to compare by; empty for None."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def gigabytes(row: Row) -> str:
    return f"{row.nbytes / 1e9:.2f}" if row.nbytes else ""


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for line in lines:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in line)} |"
