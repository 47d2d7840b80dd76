"""``resume-kit status RUN``: one screen for a person on call."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from resume_kit.cli.opening import open_run
from resume_kit.cli.output import (
    FINE,
    Outcome,
    age_text,
    counted,
    facts,
    heading,
    printable,
    size_text,
    span_text,
    table,
)
from resume_kit.errors import ResumeKitError
from resume_kit.recovery import timeline
from resume_kit.recovery.account import Account
from resume_kit.recovery.attempts import AttemptRecord
from resume_kit.recovery.history import Past, Story, read_story
from resume_kit.recovery.rules import Decision, decision, is_alive

#: Attempts in the table; of a run with more, the oldest are only counted.
_SHOWN = 12
#: Characters of an attempt's end in the table, so that the screen is 100 wide.
_WHY = 24
_STYLES = {"finished": "green", "running": "green", "restart": "yellow", "stop": "bold red"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="also draw the run over time (needs matplotlib)"
    )
    parser.epilog = "exit 1 when nothing has run there; goodput: steps that stand x their median time, of the wall time"


def execute(arguments: argparse.Namespace) -> Outcome:
    run = open_run(arguments.run)
    alive = is_alive(run)
    story = read_story(run, alive=alive)
    if not story.pasts:
        raise ResumeKitError(f"{printable(str(run))} has no attempts: nothing has run there")
    now = time.time()
    account = Account.of(story, until=now if alive else None)
    verdict = decision(story, alive=alive)
    if arguments.picture:
        title = f"Run {story.run_id or run.name}: {_state(verdict)}, {counted(len(story.pasts), 'attempt')}"
        lost = f"{counted(account.lost_steps, 'step')} lost, {counted(account.failures, 'failure')}"
        good = f"; {account.goodput:.1%} of the time went into steps that stand" if account.goodput is not None else ""
        timeline.draw(story, arguments.picture, title=title, subtitle=lost + good)
    watch_outs = list(_watch_outs(story, account, now, alive=alive))
    document = {
        "run": str(run),
        "run_id": story.run_id,
        "next": asdict(verdict),
        "account": {**asdict(account), "goodput": account.goodput},
        "at_stake_steps": _at_stake(story),
        "newest_checkpoint": story.newest_checkpoint,
        "stale_lines": story.stale,
        "watch_outs": watch_outs,
        "attempts": [_document(past) for past in story.pasts],
    }
    text: list[RenderableType] = [facts(_facts(story, account, verdict, now)), heading("attempts")]
    text.append(_table(story.pasts[-_SHOWN:]))
    if len(story.pasts) > _SHOWN:
        text.append(f"and {len(story.pasts) - _SHOWN} before; --json has them all")
    if watch_outs:
        text += [heading("watch out"), *(Text(f"  ! {printable(line)}", style="yellow") for line in watch_outs)]
    return Outcome(FINE, document, text)


def _facts(story: Story, account: Account, verdict: Decision, now: float) -> Iterator[tuple[str, object]]:
    newest = story.pasts[-1]
    yield "run", f"{story.run_id or 'without an id'} in {story.run}"
    since = newest.started if verdict.word == "running" else newest.ended
    yield "state", Text(f"{_state(verdict)} since {_moment(since)} ({_age(since, now)})", style=_STYLES[verdict.word])
    if verdict.word != "running":
        yield "", printable(verdict.reason.split("\n")[0])
    last = max((past.last_step for past in story.pasts if past.last_step), key=lambda step: step.time, default=None)
    if last is not None:
        pace = f", {span_text(account.step)} a step" if account.step is not None else ""
        yield "last step", f"{last.step:,}, {_age(last.time, now)}{pace}"
    if story.commits:
        commit = story.commits[-1]
        durable = f", durable after {span_text(commit.durable)}" if commit.durable is not None else ""
        yield "last commit", f"step {commit.step:,}, {_age(commit.time, now)}, {size_text(commit.bytes)}{durable}"
    if verdict.word == "running":
        steps = _at_stake(story)
        samples = f", {counted(steps * newest.global_batch_size, 'sample')}" if newest.global_batch_size else ""
        work = f", {span_text(steps * account.step)} of training" if account.step is not None else ""
        yield "at stake", f"{counted(steps, 'step')}{samples}{work} would a crash now cost"
    if account.save_interval is not None:
        yield "saves", f"every {account.save_interval_steps:,} steps, {span_text(account.save_interval)}"
    failed = next((past for past in reversed(story.pasts) if past.is_failure or past.kind == "refused"), None)
    if failed is not None and failed is not newest:
        yield "last failure", f"attempt {failed.number}, {_age(failed.ended, now)}: {failed.why}"
    restart = next((past for past in reversed(story.pasts) if past.to_first_step is not None), None)
    if restart is not None:
        parts = ", ".join(
            f"{phase} {span_text(seconds)}" for phase, seconds in restart.phases.items() if seconds >= 0.5
        )
        yield "last restart", f"{span_text(restart.to_first_step)} until its first step: {parts}"
    lost = counted(account.lost_steps, "step")
    lost += f", {counted(account.lost_samples, 'sample')}" if account.lost_samples else ""
    yield "lost so far", f"{lost}; {counted(account.failures, 'failure')} in {account.gpu_hours:,.1f} GPU-hours"
    if account.goodput is not None:
        what = "went into steps that stand (each at its attempt's median)"
        yield "goodput", f"{account.goodput:.1%} of {span_text(account.wall)} {what}"


def _state(verdict: Decision) -> str:
    return {"restart": "down", "stop": "down for good, a person must look"}.get(verdict.word, verdict.word)


def _at_stake(story: Story) -> int:
    """Steps that were trained after the newest checkpoint, by the newest attempt that trained any."""
    newest = story.pasts[-1]
    return max(0, newest.reached - max(story.newest_checkpoint or 0, 0)) if newest.last_step else 0


def _watch_outs(story: Story, account: Account, now: float, *, alive: bool) -> Iterator[str]:
    newest = story.pasts[-1]
    if alive and newest.last_step:
        silent = now - newest.last_step.time
        if account.step is not None and silent > max(20 * account.step, 60):
            yield f"no step for {span_text(silent)}, and one takes {span_text(account.step)}: does it hang?"
        last = newest.last_commit.time if newest.last_commit else newest.started
        if account.save_interval is not None and last is not None and now - last > 3 * account.save_interval:
            yield f"no commit for {span_text(now - last)}, and there was one every {span_text(account.save_interval)}"
    if alive and newest.folder is not None and (stop := AttemptRecord.of(newest.folder).stop):
        yield f"it was asked to stop: {stop.get('reason') or 'no reason given'}, by {stop.get('by', '?')}"
    told = story.commits[-1].step if story.commits else None
    if told is not None and told != story.newest_checkpoint:
        found = "none" if story.newest_checkpoint is None else f"that of step {story.newest_checkpoint:,}"
        yield f"the journal's newest commit is of step {told:,}, the newest checkpoint on disk {found}"
    if story.skipped:
        yield f"saves left out, since the one before was still being written: {story.skipped:,}"
    if story.stale:
        yield f"lines of the journal that a newer attempt had shut out, and that do not count: {story.stale:,}"


def _table(pasts: list[Past]) -> RenderableType:
    headings = ("n", "started", "host, job", "ranks", "steps", "ended", "lost\nsamples", "1st\nstep")
    rows = [
        (
            past.number,
            _moment(past.started),
            " ".join(filter(None, (past.host, past.job.removeprefix("SLURM ")))),
            "?" if past.world_size is None else past.world_size,
            _steps(past),
            _ended(past),
            f"{past.lost_samples:,}" if past.lost_samples is not None else f"{past.lost_steps:,} steps",
            span_text(past.to_first_step),
        )
        for past in pasts
    ]
    return table(headings, rows, right=("n", "ranks", "lost\nsamples", "1st\nstep"))


def _steps(past: Past) -> str:
    if past.last_step is None:
        return "none"
    return f"{past.resumed_from:,} → {past.last_step.step:,}"


def _ended(past: Past) -> Text:
    why = past.why.replace(f" at step {past.reached}", "", 1)  # the row has it
    style = {"finished": "green", "open": "green", "preempted": ""}.get(past.kind, "red")
    return Text(printable(why if len(why) <= _WHY else f"{why[: _WHY - 1]}…"), style=style)


def _document(past: Past) -> dict[str, Any]:
    return {**asdict(past), "folder": str(past.folder) if past.folder else None}


def _moment(seconds: float | None) -> str:
    try:
        return "?" if seconds is None else datetime.fromtimestamp(seconds).strftime("%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "?"


def _age(seconds: float | None, now: float) -> str:
    return "?" if seconds is None else age_text(now - seconds)
