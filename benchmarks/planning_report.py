"""The planning benchmark's result as a picture and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_INK, _FAINT = "#1f2933", "#9aa5b1"
_PARTS = {"layouts": "#2680c2", "coverage": "#2f9e63", "plan": "#e07a10"}
_TITLES = {"layouts": "both layouts", "coverage": "exact-once coverage of both", "plan": "reads of every rank"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds over ranks, both logarithmic, with a line of slope one through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["scaling"]
    ranks = [row["ranks"] for row in rows]
    totals = [row["seconds"]["total"] for row in rows]
    medians = [total["median"] for total in totals]
    style: dict[Any, Any] = {"font.size": 10, "axes.edgecolor": _FAINT, "axes.spines.top": False}
    with plt.rc_context(style | {"axes.spines.right": False, "text.color": _INK}):
        figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
        spread = [
            [total["median"] - total["min"] for total in totals],
            [total["max"] - total["median"] for total in totals],
        ]
        axes.errorbar(ranks, medians, yerr=spread, color=_INK, marker="o", capsize=3, label="total, median and range")
        for part, color in _PARTS.items():
            values = [row["seconds"][part]["median"] for row in rows]
            axes.plot(ranks, values, color=color, marker=".", label=_TITLES[part])
        linear = [medians[-1] * count / ranks[-1] for count in ranks]
        axes.plot(ranks, linear, color=_FAINT, linestyle="--", label="linear in ranks")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
        axes.set_xlabel("ranks (data parallel size grows; the model stays)")
        axes.set_ylabel("seconds on one core")
        axes.set_title(f"Planning a change of a 405B-like model, on the right {rows[-1]['from']} → {rows[-1]['to']}")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)


def markdown(result: dict[str, Any]) -> str:
    return "\n".join(_lines(result)) + "\n"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    model, hardware = result["model"], result["hardware"]
    yield "# Planning at scale"
    yield ""
    yield (
        f"{result['date']}, one core of {hardware['processor']} ({hardware['host cores']} cores in the host, load "
        f"average {hardware['load before']:.1f} before the start), Python "
        f"{result['versions']['python']}, NumPy {result['versions']['numpy']}. `{result['command']}`, "
        f"{result['repeats']} repetitions after one that is not counted; median (min–max)."
    )
    yield ""
    yield (
        f"The model is Llama 3 405B with {model['layers']} layers in place of 126, so that pipelines of 8 and 16 "
        f"divide them: {model['parameters'] / 1e9:.0f} billion parameters; master and two moments, 12 bytes each. "
        "Planned are, for all ranks at once: both layouts, exact-once coverage of both (one check for all kinds, which "
        "have the same boxes), and which rank reads how much of which file."
    )
    yield ""
    yield "![Seconds over ranks](planning.png)"
    yield ""
    yield from _table(result["scaling"])
    yield ""
    first, last = result["scaling"][0], result["scaling"][-1]
    grown = last["ranks"] / first["ranks"]
    slower = last["seconds"]["total"]["median"] / first["seconds"]["total"]["median"]
    yield f"{grown:.0f} times the ranks take {slower:.1f} times as long. Other changes:"
    yield ""
    yield from _table(result["headline"])
    yield ""
    yield (
        "ZeRO-3 cuts every weight over all ranks: there are at least as many boxes as weights times ranks, "
        "and every rank reads a part of every weight."
    )
    yield ""
    yield from _table(result["ZeRO-3"])
    yield ""
    yield "## Documents"
    yield ""
    yield from _documents(result["documents"])
    yield ""
    yield f"Peak memory of the whole benchmark: {result['peak memory bytes'] / 1e6:.0f} MB."


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| ranks | change | boxes | total | layouts | coverage | plan | read per rank | files per rank |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        seconds, reads = row["seconds"], row["reads"]["per rank"]
        total = seconds["total"]
        parts = " | ".join(f"{seconds[part]['median'] * 1e3:.0f} ms" for part in ("layouts", "coverage", "plan"))
        yield (
            f"| {row['ranks']:,} | {row['from']} → {row['to']} | {sum(row['boxes']):,} "
            f"| {total['median'] * 1e3:.0f} ms ({total['min'] * 1e3:.0f}–{total['max'] * 1e3:.0f}) | {parts} "
            f"| {reads['bytes']['median'] / 1e9:.2f} GB (max {reads['bytes']['max'] / 1e9:.2f}) "
            f"| {reads['files']['median']:.0f} (max {reads['files']['max']:.0f}) |"
        )


def _documents(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| ranks | manifest | written / read in | an index | all indices | one rank reads |"
    yield "|---:|---:|---:|---:|---:|---|"
    for row in rows:
        own = row["one rank of the target reads"]
        yield (
            f"| {row['ranks']:,} | {row['manifest bytes'] / 1e6:.2f} MB "
            f"| {row['manifest write seconds'] * 1e3:.0f} / {row['manifest read seconds']['median'] * 1e3:.0f} ms "
            f"| {row['index bytes']['median'] / 1e3:.1f} kB, parsed in "
            f"{row['index parse seconds']['median'] * 1e3:.1f} ms "
            f"| {row['all indices bytes, extrapolated'] / 1e6:.0f} MB, parsed in "
            f"{row['all indices parse seconds, extrapolated']:.1f} s "
            f"| manifest and {own['indices']['median']:.0f} indices (max {own['indices']['max']:.0f}), "
            f"{own['bytes of manifest and indices'] / 1e6:.1f} MB |"
        )
    yield ""
    yield (
        "The manifest is the real one of all ranks, with its table of holders; indices are real ones of a sample of "
        "ranks, and the figures for all of them are extrapolated from these. Digests and RNG states are made up, of "
        "their real size. All indices are read by rank 0 at the commit and by `verify`; a rank that resumes reads the "
        "manifest and the indices of those who hold what it needs, whatever the change of topology."
    )
