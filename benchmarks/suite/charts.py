"""Results as pictures: what a save blocks and takes, and a load, against the floors; and a step's time with saves."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite.results import Results, Row
from benchmarks.suite.tables import RAW_READ, RAW_WRITE, SAVES, seconds

_COLOURS = {"ours": "#1f6f8b", "peer": "#b0b7bf"}
_TITLES = {"blocking": "the save blocks", "durable": "until durable", "load": "load"}
_FLOORS = {"durable": RAW_WRITE, "load": RAW_READ}
_WIDE = 30.0  # between the largest and the least bar, from where on a chart is logarithmic


def draw(folder: Path, results: Results) -> list[Path]:
    """Write the PNG files of all parts; returns their paths, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no charts; make them elsewhere with `python -m benchmarks report`")
        return []
    made = []
    for part in results.parts:
        for target in dict.fromkeys(row.target for row in results.rows if row.part == part):
            rows = [row for row in results.rows if (row.part, row.target) == (part, target)]
            name = f"{part}-{target}".replace(" ", "-")
            systems = [row for row in rows if row.group in _COLOURS and row.samples]
            if systems:
                made.append(_systems(folder / f"{name}.png", f"{part} on {target}", systems, rows))
            training = [row for row in rows if row.group == "training" and row.samples]
            if len(training) > 1:
                made.append(_training(folder / f"{name}-steps.png", f"{part} on {target}", training))
    return made


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(4.2 * panels + 1.5, height), sharey=True, layout="constrained")
    return figure, list(axes) if panels > 1 else [axes]


def _systems(path: Path, title: str, systems: Sequence[Row], rows: Sequence[Row]) -> Path:
    figure, axes = _figure(len(SAVES), 0.42 * len(systems) + 1.2)
    places = range(len(systems))
    for axis, metric in zip(axes, SAVES, strict=True):
        spreads = [row.spread(metric) for row in systems]
        medians = [spread.median if spread else 0.0 for spread in spreads]
        errors = [
            [s.median - s.least if s else 0.0 for s in spreads],
            [s.most - s.median if s else 0.0 for s in spreads],
        ]
        axis.barh(places, medians, color=[_COLOURS[row.group] for row in systems], xerr=errors, ecolor="#555555")
        for place, spread in zip(places, spreads, strict=True):
            if spread:
                axis.annotate(f" {seconds(spread.median)}", (spread.most, place), va="center", fontsize=8)
        known = [spread for spread in spreads if spread]
        most = max((spread.most for spread in known), default=1.0)
        if known and most / min(spread.median for spread in known) > _WIDE:
            axis.set_xscale("log")
            axis.set_xlim(min(spread.least for spread in known) / 2, most * 4)
        else:
            axis.set_xlim(0, most * 1.25)
        axis.set_title(_TITLES[metric], fontsize=9)
        floor = next((row.spread(metric) for row in rows if row.system == _FLOORS.get(metric)), None)
        if floor:
            axis.axvline(floor.median, color="#c0392b", linewidth=1, linestyle="--")
            axis.set_title(f"{_TITLES[metric]} (dashed: {_FLOORS[metric]})", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("seconds, slowest rank")
    axes[0].set_yticks(list(places), [row.system for row in systems], fontsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return _saved(figure, path)


def _training(path: Path, title: str, rows: Sequence[Row]) -> Path:
    figure, (axis,) = _figure(1, 0.5 * len(rows) + 1.4)
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        spread = row.spread("mean step")
        assert spread is not None
        error = [[spread.median - spread.least], [spread.most - spread.median]]
        axis.barh(place, spread.median, xerr=error, color=_COLOURS["ours" if place else "peer"], ecolor="#555555")
        axis.annotate(f" {seconds(spread.median)} s", (spread.most, place), va="center", fontsize=8)
    axis.set_yticks(list(places), [row.system for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    axis.set_xlabel("mean seconds of a step, over a phase")
    figure.suptitle(f"training, {title}", fontsize=11)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
