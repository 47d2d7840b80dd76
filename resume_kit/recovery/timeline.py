"""A run over time, as a picture: its steps, what was lost, and where the time went. Wants matplotlib; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from resume_kit.errors import Problem, UsageError
from resume_kit.recovery.history import Past, Story

_INK, _FAINT, _PAPER, _LOST = "#1f2933", "#9aa5b1", "#eef1f4", "#d64545"
_ATTEMPTS = ("#2680c2", "#e07a10", "#2f9e63", "#8e44ad", "#0f8f8f", "#7a6a00")
_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
#: Gaps that are told in words, and losses in figures; of a run with more, the largest.
_TOLD = 12
#: Commits that can be told apart.
_TOLD_APART = 100


@dataclass(frozen=True)
class Axis:
    """Wall time, from the first start on, in the unit that reads best."""

    start: float
    end: float
    seconds: int
    unit: str

    @classmethod
    def of(cls, start: float, end: float) -> Axis:
        seconds, unit = next((s, name) for longer, s, name in _UNITS if end - start >= longer)
        return cls(start, end, seconds, unit)

    def at(self, time: float) -> float:
        return (time - self.start) / self.seconds

    def part(self, begin: float, end: float) -> float:
        return (end - begin) / max(self.end - self.start, 1e-9)


def draw(story: Story, path: Path, *, title: str, subtitle: str) -> None:
    """Write the PNG. Raises `UsageError` where matplotlib is missing or `path` is no place for a picture."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        remedy = "pip install 'sharded-resume-kit[plots]'"
        raise UsageError("a picture wants matplotlib", [Problem("picture", "", str(error), remedy)]) from error
    style: dict[Any, Any] = {"font.size": 10, "axes.edgecolor": _FAINT, "text.color": _INK, "axes.labelcolor": _INK}
    style |= {"xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"hatch.color": _LOST, "hatch.linewidth": 0.8, "text.parse_math": False}
    times = [time for past in story.pasts for time in (past.started, past.ended) if time is not None]
    axis = Axis.of(min(times, default=0.0), max(times, default=1.0))
    with plt.rc_context(style):
        figure, (steps, spent) = plt.subplots(
            2, 1, figsize=(11, 6.2), sharex=True, height_ratios=(6, 1), layout="constrained"
        )
        figure.suptitle(title, fontsize=14, weight="bold")
        steps.set_title(subtitle, fontsize=9.5, color="#52606d")
        _steps(steps, story, axis)
        _spent(spent, story.pasts, axis)
        try:
            figure.savefig(path, dpi=150, facecolor="white")
        except (OSError, ValueError) as error:
            raise UsageError("the picture cannot be written", [Problem("picture", str(path), str(error))]) from error
        finally:
            plt.close(figure)


def _colour(past: Past) -> str:
    return _ATTEMPTS[(past.number - 1) % len(_ATTEMPTS)]


def _steps(axes: Any, story: Story, axis: Axis) -> None:
    """Steps over time, an attempt a colour; commits, lost steps hatched, gaps with their reason."""
    top = max((past.reached for past in story.pasts), default=1) or 1
    told = sorted((past.lost_steps for past in story.pasts if past.lost_steps), reverse=True)[:_TOLD]
    for past in story.pasts:
        curve = [*story.curves.get(past.number, ()), *([past.last_step] if past.last_step else ())]
        if not curve:
            continue
        x, y = [axis.at(moment.time) for moment in curve], [moment.step for moment in curve]
        axes.plot(x, y, color=_colour(past), linewidth=2.2, solid_capstyle="round")
        if past.lost_steps:
            stood = past.reached - past.lost_steps
            area = {"where": [step >= stood for step in y], "facecolor": "none", "hatch": "////", "edgecolor": _LOST}
            axes.fill_between(x, y, stood, linewidth=0, **area)
        if past.lost_steps in told:
            told.remove(past.lost_steps)
            place = {"xytext": (-3, 4), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"−{past.lost_steps:,}", (x[-1], y[-1]), color=_LOST, fontsize=8.5, weight="bold", **place)
    _commits(axes, [(axis.at(commit.time), commit.step) for commit in story.commits])
    axes.fill_between([], [], facecolor="none", hatch="////", edgecolor=_LOST, linewidth=0, label="trained, and lost")
    _gaps(axes, story.pasts, axis, top)
    axes.set_ylim(0, (1.4 if len(story.pasts) > 1 else 1.05) * top)
    axes.set_ylabel("optimizer step")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=_PAPER)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", framealpha=0.95, edgecolor="#e4e7eb", fontsize=9)


def _commits(axes: Any, points: list[tuple[float, int]]) -> None:
    """Circles on the curve; where there are too many to tell apart, ticks at the foot."""
    if len(points) <= _TOLD_APART:
        look = {"marker": "o", "markersize": 5.5, "markerfacecolor": "white", "markeredgecolor": _INK}
        axes.plot([x for x, _ in points], [y for _, y in points], linestyle="none", label="commit", zorder=4, **look)
    else:
        place = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "marker": "|", "markersize": 6}
        axes.plot([x for x, _ in points], [0.02] * len(points), color=_INK, alpha=0.4, label="commit", **place)


def _gaps(axes: Any, pasts: list[Past], axis: Axis, top: int) -> None:
    found = [(before, begin, end) for before, begin, end in _idle(pasts)]
    told = sorted(found, key=lambda gap: gap[1] - gap[2])[:_TOLD]
    for before, begin, end in found:
        axes.axvspan(axis.at(begin), axis.at(end), color=_PAPER, linewidth=0, zorder=0)
        if (before, begin, end) in told:
            wide = axis.part(begin, end) > 0.12
            text = _short(before) if wide else _short(before).replace("\n", ", ")
            axes.text(
                axis.at((begin + end) / 2), 1.37 * top, text, rotation=0 if wide else 90, ha="center", va="top",
                fontsize=8.5, color=_LOST if before.is_failure or before.kind == "refused" else _INK,
            )  # fmt: skip


def _idle(pasts: list[Past]) -> Iterator[tuple[Past, float, float]]:
    """Each attempt with the time from its last step to the first of the next attempt."""
    for before, after in pairwise(pasts):
        begin = before.last_step.time if before.last_step else before.started
        end = after.first_step.time if after.first_step else after.started
        if begin is not None and end is not None and end > begin:
            yield before, begin, end


def _short(past: Past) -> str:
    """``hung`` and who, in two short lines."""
    if past.words:
        word = past.words[0]
        return f"{past.kind}\nrank {word.rank}" + (f" on {word.host}" if word.host else "")
    by = past.why.partition(" by ")[2].partition(":")[0]
    return f"{past.kind}\n{by[:24]}".strip() if past.kind == "preempted" else past.kind


def _spent(axes: Any, pasts: list[Past], axis: Axis) -> None:
    """One bar: what each moment went into."""
    for past in pasts:
        if past.started is None or past.ended is None:
            continue
        first = past.first_step.time - (past.step_seconds or 0.0) if past.first_step else past.ended
        _bar(axes, axis, past.started - past.phases.get("start", 0.0), first, facecolor="#c3cdd9")
        if past.last_step is None:
            continue
        if axis.part(first, past.last_step.time) > 0.02:
            middle = axis.at((first + past.last_step.time) / 2)
            axes.text(middle, 0, str(past.number), ha="center", va="center", color="white", weight="bold")
        lost = past.lost_steps / past.trained * (past.last_step.time - first)
        _bar(axes, axis, first, past.last_step.time - lost, facecolor=_colour(past))
        _bar(
            axes,
            axis,
            past.last_step.time - lost,
            past.last_step.time,
            facecolor="white",
            hatch="////",
            edgecolor=_LOST,
        )
        _bar(axes, axis, past.last_step.time, past.ended, facecolor=_LOST, alpha=0.35)
    names = {"#c3cdd9": "starting, loading, proving", _LOST: "no step: saving to stop, hung, dying"}
    for colour, name in names.items():
        axes.barh([0], [0], color=colour, alpha=0.35 if colour == _LOST else 1.0, label=name)
    axes.set_ylim(-0.6, 0.6)
    axes.set_yticks([0], ["attempt"])
    axes.set_xlim(0, max(axis.at(axis.end), 1e-9))
    axes.set_xlabel(f"{axis.unit} since the first start")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.75), ncols=2, frameon=False, fontsize=8.5)


def _bar(axes: Any, axis: Axis, begin: float, end: float, **style: Any) -> None:
    if end > begin:
        axes.barh([0], [axis.at(end) - axis.at(begin)], left=axis.at(begin), height=0.8, linewidth=0, **style)
