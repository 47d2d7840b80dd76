"""The two loss curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.demo.judging import Attempt, Findings, Kill
from resume_kit.run.journal import number

_INK, _FAINT, _REFERENCE, _KILL = "#1f2933", "#9aa5b1", "#c3cdd9", "#d64545"
_ATTEMPTS = ("#2680c2", "#e07a10", "#2f9e63", "#8e44ad", "#0f8f8f", "#7a6a00")


def draw(findings: Findings, reference: Attempt, path: Path, *, subtitle: str) -> None:
    """Write the PNG: both curves with kills, checkpoints and resumes; below, their difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"font.size": 10, "axes.edgecolor": _FAINT, "text.color": _INK, "axes.labelcolor": _INK}
    style |= {"xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (curves, difference) = plt.subplots(
            2, 1, figsize=(11, 7.2), sharex=True, height_ratios=(3.4, 1), layout="constrained"
        )
        figure.suptitle(
            "A run killed twice and resumed, on top of one that was never interrupted",
            fontsize=14,
            weight="bold",
        )
        curves.set_title(subtitle, fontsize=9.5, color="#52606d")
        _curves(curves, findings, reference)
        _difference(difference, findings)
        difference.set_xlim(0, findings.steps + 1)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)


def _curves(axes: Any, findings: Findings, reference: Attempt) -> None:
    losses = {step: number(record["loss"]) for step, record in reference.steps.items()}
    axes.plot(
        losses.keys(),
        losses.values(),
        color=_REFERENCE,
        linewidth=7,
        solid_capstyle="round",
        label="reference, uninterrupted",
    )
    colours = {attempt.number: _ATTEMPTS[i % len(_ATTEMPTS)] for i, attempt in enumerate(findings.attempts)}
    for place, attempt in enumerate(findings.attempts, start=1):
        own = {step: number(record["loss"]) for step, record in attempt.steps.items()}
        from_where = "from the start" if attempt.resumed_from is None else f"resumed from step {attempt.resumed_from}"
        axes.plot(
            own.keys(),
            own.values(),
            color=colours[attempt.number],
            linewidth=1.5,
            marker="o",
            # steps trained twice show the earlier attempt as a ring
            markersize=3.2 + 2.4 * (len(findings.attempts) - place),
            label=f"killed run, attempt {attempt.number}: {from_where}",
        )
    low, high = min(losses.values()), max(losses.values())
    span = (high - low) or 1.0
    floor = low - 0.25 * span
    axes.set_ylim(floor, high + 0.12 * span)
    ticks = sorted({step for attempt in findings.attempts for step in attempt.commits})
    axes.plot(
        ticks,
        [floor + 0.05 * span] * len(ticks),
        linestyle="none",
        marker="^",
        markersize=8,
        color=_INK,
        label="checkpoint committed",
        clip_on=False,
    )
    for place, kill in enumerate(findings.kills):
        where = _place(kill)
        axes.axvline(where, color=_KILL, linewidth=1.2, linestyle=(0, (4, 3)))
        hit = f"within step {kill.last_step + 1}" if kill.torn_step is None else f"in the save of step {kill.torn_step}"
        text = f"SIGKILL {place + 1}\n{hit}"
        axes.annotate(
            text,
            (where, high + 0.10 * span),
            xytext=(5, 0),
            textcoords="offset points",
            va="top",
            color=_KILL,
            fontsize=9,
            weight="bold",
        )
        if kill.torn_step is not None:
            axes.plot(
                [kill.torn_step],
                [floor + 0.11 * span],
                marker="x",
                markersize=9,
                markeredgewidth=2.4,
                color=_KILL,
                linestyle="none",
                label="save cut off by a kill",
                zorder=5,
            )
        following = next((a for a in findings.attempts if a.number == kill.attempt + 1 and a.resumed_from), None)
        if following is not None:
            height = floor + 0.18 * span
            axes.annotate(
                "",
                xy=(following.resumed_from, height),
                xytext=(where, height),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": colours[following.number],
                    "linewidth": 2,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
            axes.annotate(
                "resume",
                (((following.resumed_from or 0) + where) / 2, height),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=colours[following.number],
                fontsize=9,
            )
    axes.set_ylabel("loss (mean over ranks)")
    axes.grid(axis="y", color="#eef1f4")
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper right",
        frameon=True,
        framealpha=0.95,
        edgecolor="#e4e7eb",
        fontsize=9,
        bbox_to_anchor=(1.0, 0.93),
    )


def _place(kill: Kill) -> float:
    """Where a kill is drawn: within a step, or just after the step whose save it hit."""
    return kill.last_step + (0.5 if kill.torn_step is None else 0.25)


def _difference(axes: Any, findings: Findings) -> None:
    gaps = [abs(number(pair.resumed["loss"]) - number(pair.reference["loss"])) for pair in findings.pairs]
    worst = max(gaps, default=0.0)
    equal = bool(gaps) and all("loss" not in pair.differing for pair in findings.pairs)
    colour = _ATTEMPTS[2] if equal else _KILL
    axes.plot([pair.step for pair in findings.pairs], gaps, linestyle="none", marker="o", markersize=4, color=colour)
    for kill in findings.kills:
        axes.axvline(
            _place(kill),
            color=_KILL,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
        )
    if equal:
        axes.set_ylim(-0.5, 1.5)
        axes.set_yticks([0])
        said = f"exactly 0 in all {len(gaps)} step records: the same 64 bits, also in the steps trained twice"
    else:
        axes.set_ylim(-0.1 * (worst or 1.0), 1.5 * (worst or 1.0))
        said = f"NOT equal: up to {worst:.3g}" if gaps else "nothing could be compared"
    axes.text(
        0.5,
        0.80,
        said,
        transform=axes.transAxes,
        ha="center",
        va="center",
        color=colour,
        fontsize=11,
        weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 3},
    )
    axes.set_ylabel("|difference|\nof the losses")
    axes.set_xlabel("optimizer step")
