"""``resume-kit``: parses the command line, runs one command, turns every error into text and an exit code.

Exit 0: fine. 1: damaged, refused or different. 2: wrong usage. 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from resume_kit.cli import (
    diffing,
    inspecting,
    intervals,
    listing,
    next_word,
    planning,
    pruning,
    retrying,
    status,
    stopping,
    verifying,
)
from resume_kit.cli.output import (
    BAD,
    INTERRUPTED,
    USAGE,
    Outcome,
    complain,
    emit,
    printable,
    problem_documents,
    to_json,
    write_out,
)
from resume_kit.errors import ResumeKitError, UsageError


@dataclass(frozen=True)
class Command:
    """One command: a line of help, its arguments, and what it does."""

    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace], Outcome]


COMMANDS = {
    "ls": Command("list the checkpoints of a run", listing.configure, listing.execute),
    "inspect": Command("show what a checkpoint holds", inspecting.configure, inspecting.execute),
    "verify": Command("check that a checkpoint is whole", verifying.configure, verifying.execute),
    "plan": Command("tell whether and how a checkpoint resumes elsewhere", planning.configure, planning.execute),
    "diff": Command("compare two checkpoints", diffing.configure, diffing.execute),
    "prune": Command("delete old checkpoints", pruning.configure, pruning.execute),
    "status": Command("tell how a run is, and how its attempts went", status.configure, status.execute),
    "next": Command("tell a batch script whether to start a run again", next_word.configure, next_word.execute),
    "stop": Command("ask a run to save and end", stopping.configure, stopping.execute),
    "retry": Command("let a run that was given up start again", retrying.configure, retrying.execute),
    "interval": Command("tell how often to save", intervals.configure, intervals.execute),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block."""
        self.exit(USAGE, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never raises for anything that lies on disk."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        write_out("")
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        outcome = COMMANDS[arguments.command].execute(arguments)
        emit(outcome, as_json=arguments.json)
        return outcome.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except ResumeKitError as error:
        complain(str(error))
        if arguments.json:
            document = {"error": error.headline, "problems": problem_documents(error.problems)}
            write_out(to_json(document))
        return USAGE if isinstance(error, UsageError) else BAD
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        return BAD


def _parser() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser = _Parser(
        prog="resume-kit",
        description="Look after a run and its checkpoints: see, check, compare, thin out. Needs no torch, no GPU.",
        epilog="exit codes: 0 fine; 1 damaged, refused or different; 2 wrong usage",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name, help=command.summary, description=command.summary, parents=[common], allow_abbrev=False
        )
        command.configure(own)
    return parser
