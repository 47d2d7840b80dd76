"""``resume-kit prune RUN``: delete old checkpoints by the rule that training uses."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import RenderableType

from resume_kit.checkpoint import names
from resume_kit.cli.opening import open_run, size_on_disk, steps_of
from resume_kit.cli.output import FINE, Outcome, printable, size_text
from resume_kit.errors import Problem, ResumeKitError
from resume_kit.run.retention import Retention, prune


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--keep-last", type=int, required=True, metavar="N", help="keep the newest N checkpoints (at least 2)"
    )
    parser.add_argument("--keep-every", type=int, metavar="M", help="and those whose step is a multiple of M")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.epilog = "the newest good checkpoint always stays, and so does all that is not named like one"


def execute(arguments: argparse.Namespace) -> Outcome:
    retention = Retention(keep_last=arguments.keep_last, keep_every=arguments.keep_every)
    run = open_run(arguments.run)
    sizes = {step: size_on_disk(run / names.step_directory(step)) for step in steps_of(run)}
    try:
        gone = prune(run, retention, dry_run=arguments.dry_run)
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


def _stopped(run: Path, sizes: dict[int, int | None], error: OSError) -> ResumeKitError:
    gone = [step for step in sizes if not (run / names.step_directory(step)).exists()]
    what = f"{error.strerror or error}; deleted before that: {', '.join(map(str, gone)) or 'nothing'}"
    where = printable(str(error.filename or run))
    return ResumeKitError("prune stopped half-way", [Problem("prune", where, what, "check permissions, prune again")])
