"""``resume-kit prune RUN``: delete old checkpoints by the rule that training uses."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from rich.console import RenderableType

from resume_kit.checkpoint import names
from resume_kit.cli.opening import open_run, size_on_disk, steps_of
from resume_kit.cli.output import FINE, Outcome, printable, size_text
from resume_kit.errors import Problem, ResumeKitError, RunTaken
from resume_kit.recovery import grounds
from resume_kit.recovery.attempts import BEAT_SECONDS, newest_attempt
from resume_kit.recovery.rules import is_alive
from resume_kit.run.retention import Retention, prune


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--keep-last", type=int, required=True, metavar="N", help="keep the newest N checkpoints (at least 2)"
    )
    parser.add_argument("--keep-every", type=int, metavar="M", help="and those whose step is a multiple of M")
    parser.add_argument("--force", action="store_true", help="also while the run is being trained")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.epilog = "the newest good checkpoint always stays, and so does all that is not named like one"


def execute(arguments: argparse.Namespace) -> Outcome:
    retention = Retention(keep_last=arguments.keep_last, keep_every=arguments.keep_every)
    run = open_run(arguments.run)
    sizes = {step: size_on_disk(run / names.step_directory(step)) for step in steps_of(run)}
    newest = max(names.attempt_numbers(run), default=0)
    if not (arguments.dry_run or arguments.force):
        _require_idle(run)
    try:
        gone = _prune(run, retention, newest, dry_run=arguments.dry_run)
    except OSError as error:
        raise _stopped(run, sizes, error) from error
    kept = [step for step in sizes if step not in gone]
    freed = sum(sizes.get(step) or 0 for step in gone)
    document = {
        "run": str(run),
        "dry_run": arguments.dry_run,
        "deleted": gone,
        "kept": kept,
        "bytes": freed,
    }
    verb = "would delete" if arguments.dry_run else "deleted"
    text: list[RenderableType] = [
        f"{verb} {names.step_directory(step)} ({size_text(sizes.get(step))})" for step in gone
    ]
    total = f"{verb} {len(gone)} of {len(sizes)} checkpoints, {size_text(freed)}" if gone else "nothing to delete"
    text.append(f"{total}; kept: {', '.join(map(str, kept)) or 'none'}")
    return Outcome(FINE, document, text)


def _require_idle(run: Path) -> None:
    """Raise `RunTaken` while a training run deletes here by its own rule."""
    if not is_alive(run, 2.5 * BEAT_SECONDS):
        return
    newest = newest_attempt(run)
    assert newest is not None
    raise _taken(run, f"attempt {newest.number} is training ({newest.identity})")


def _taken(run: Path, who: str) -> RunTaken:
    what = f"{who}; it prunes by its own keep_last and keep_every"
    remedy = f"wait until it ends, stop it (resume-kit stop {printable(str(run))}), or add --force"
    return RunTaken("nothing was deleted", [Problem("prune", printable(str(run)), what, remedy)])


def _prune(run: Path, retention: Retention, newest: int, *, dry_run: bool) -> list[int]:
    """In a ground of its own, which an attempt that starts takes away: from then on nothing is deleted here.

    One newer than `newest`, which was looked at, may have begun before there was a ground: raises `RunTaken`.
    """
    if dry_run:
        return prune(run, retention, run, dry_run=True)
    ground = run / names.PRUNING
    ground.mkdir(exist_ok=True)
    if (begun := max(names.attempt_numbers(run), default=0)) > newest:
        with suppress(OSError):
            ground.rmdir()
        raise _taken(run, f"attempt {begun} has begun meanwhile")
    grounds.clear(ground)
    gone = prune(run, retention, ground)
    with suppress(OSError):  # another prune is under way, or something could not be deleted: the next start does it
        ground.rmdir()
    return gone


def _stopped(run: Path, sizes: dict[int, int | None], error: OSError) -> ResumeKitError:
    gone = [step for step in sizes if not (run / names.step_directory(step)).exists()]
    why = error.strerror or str(error)
    if not (run / names.PRUNING).is_dir():
        why = "an attempt of the run has begun meanwhile, and prunes by its own rule"
    what = f"{why}; deleted before that: {', '.join(map(str, gone)) or 'nothing'}"
    where = printable(str(error.filename or run))
    return ResumeKitError("prune stopped half-way", [Problem("prune", where, what, "check permissions, prune again")])
