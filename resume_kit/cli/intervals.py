"""``resume-kit interval``: how often to save, from what a run has shown or from figures that are given."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from rich.console import RenderableType

from resume_kit.cli.opening import open_run
from resume_kit.cli.output import FINE, Outcome, facts, heading, span_text, table
from resume_kit.errors import Problem, ResumeKitError, UsageError
from resume_kit.recovery.account import Account, failures_in_gpu_hours
from resume_kit.recovery.history import Past, read_story
from resume_kit.recovery.intervals import PRIOR_GPU_HOURS, best_interval, blended_mtbf, expected_loss

#: Seconds from a failure to the first new step, where the run has shown none: a guess, and said to be one.
_RESTART_GUESS = 120.0


@dataclass(frozen=True)
class Figure:
    """A number in seconds, and where it is from."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Row:
    """What an interval loses, of wall time, in a day."""

    name: str
    seconds: float
    steps: int | None
    lost: float
    minutes: float
    gpu_hours: float


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run directory: what it has shown is taken from there")
    parser.add_argument("--cost", type=float, metavar="S", help="seconds that a save takes from training")
    parser.add_argument("--durable", type=float, metavar="S", help="seconds until a save is durable")
    parser.add_argument("--mtbf", type=float, metavar="HOURS", help="hours between failures of the whole job")
    parser.add_argument("--restart", type=float, metavar="S", help="seconds from a failure to the first new step")
    parser.add_argument("--ranks", type=int, metavar="N", help="GPUs of the job; of a run, those of its newest attempt")
    parser.epilog = "without RUN: --cost, and --mtbf or --ranks. What is given goes before what the run has shown"


def execute(arguments: argparse.Namespace) -> Outcome:
    _require_sense(arguments)
    pasts: list[Past] = []
    account: Account | None = None
    if arguments.run is not None:
        story = read_story(open_run(arguments.run))
        pasts, account = story.pasts, Account.of(story)
    ranks = arguments.ranks or next((past.world_size for past in reversed(pasts) if past.world_size), 1)
    cost = _figure(arguments.cost, account.save_blocked if account else None)
    if cost is None:
        what = "no save has been committed, so nobody knows what one costs"
        raise ResumeKitError("no interval follows", [Problem("interval", str(arguments.run), what, "give --cost")])
    durable = _figure(arguments.durable, account.save_durable if account else None) or Figure(cost.seconds, "as --cost")
    restart = _figure(arguments.restart, account.restart if account else None) or Figure(_RESTART_GUESS, "a guess")
    mtbf = _mtbf(arguments.mtbf, pasts, ranks)
    rows = _rows(cost.seconds, durable.seconds, mtbf.seconds, restart.seconds, ranks, account)
    figures = {"cost": cost, "durable": durable, "mtbf": mtbf, "restart": restart}
    document = {
        "run": arguments.run,
        "ranks": ranks,
        **{name: asdict(figure) for name, figure in figures.items()},
        "intervals": [asdict(row) for row in rows],
    }
    said = [
        ("a save takes", f"{span_text(cost.seconds)} from training ({cost.source})"),
        ("durable after", f"{span_text(durable.seconds)} ({durable.source})"),
        ("a failure every", f"{span_text(mtbf.seconds)} on {ranks:,} GPUs ({mtbf.source})"),
        ("then first step after", f"{span_text(restart.seconds)} ({restart.source})"),
    ]
    text: list[RenderableType] = [facts(said), heading("expected loss"), _table(rows, account)]
    return Outcome(FINE, document, text)


def _require_sense(given: argparse.Namespace) -> None:
    if given.run is None and (given.cost is None or (given.mtbf is None and given.ranks is None)):
        raise UsageError("give a RUN, or --cost and one of --mtbf and --ranks")
    for name, smallest in (("cost", 0), ("durable", 0), ("restart", 0), ("mtbf", 1e-9), ("ranks", 1)):
        value = getattr(given, name)
        if value is not None and not smallest <= value < 1e12:
            raise UsageError(f"--{name} is {value}; that is no sensible number")


def _figure(given: float | None, shown: float | None) -> Figure | None:
    if given is not None:
        return Figure(given, "given")
    return None if shown is None else Figure(shown, "measured: the run's median")


def _mtbf(given: float | None, pasts: list[Past], ranks: int) -> Figure:
    if given is not None:
        return Figure(3600 * given, "given")
    failures, hours = failures_in_gpu_hours(pasts)
    prior = f"prior: 1 in {PRIOR_GPU_HOURS:,.0f} GPU-hours"
    if pasts:
        prior += f"; the run's own record: {failures} in {hours:,.1f}"
    return Figure(blended_mtbf(pasts, ranks), prior)


def _rows(cost: float, durable: float, mtbf: float, restart: float, ranks: int, account: Account | None) -> list[Row]:
    """The best interval, but never shorter than a save takes to be durable; half of it, its doubles, and today's."""
    best = max(best_interval(cost, mtbf), durable, 1.0)
    named = [
        ("half", best / 2),
        ("best", best),
        ("double", best * 2),
        ("four times", best * 4),
        ("eight times", best * 8),
    ]
    if account is not None and account.save_interval:
        named.append(("in use", account.save_interval))
    rows = []
    for name, seconds in sorted(named, key=lambda pair: pair[1]):
        lost = expected_loss(seconds, cost, mtbf, restart + durable)
        steps = round(seconds / account.step) if account is not None and account.step else None
        rows.append(Row(name, seconds, steps, lost, lost * 24 * 60, lost * 24 * ranks))
    return rows


def _table(rows: list[Row], account: Account | None) -> RenderableType:
    headings = ["interval", "", "steps", "lost", "min a day", "GPU-hours a day"]
    cells = [
        [span_text(r.seconds), r.name, r.steps or "–", f"{r.lost:.3%}", f"{r.minutes:.1f}", f"{r.gpu_hours:,.1f}"]
        for r in rows
    ]
    if account is None or account.step is None:
        headings.remove("steps")
        cells = [[*line[:2], *line[3:]] for line in cells]
    return table(headings, cells, right=("interval", "steps", "lost", "min a day", "GPU-hours a day"))
