"""``resume-kit next RUN``: one word for a batch script, the reason for a person."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from resume_kit.cli.opening import open_run
from resume_kit.cli.output import FINE, Outcome
from resume_kit.errors import UsageError
from resume_kit.recovery.rules import decide


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    add_give_up_after(parser)
    parser.add_argument(
        "--since",
        type=float,
        metavar="UNIX",
        help="when this job began (date +%%s): a job that made no attempt of its own is not to be started again",
    )
    parser.epilog = (
        "prints restart, finished, stop (a person must look) or running (another attempt is alive), the reason on"
        " stderr; exit 0 whichever it is"
    )


def add_give_up_after(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--give-up-after", type=int, default=3, metavar="K", help="failures at the same step that are enough (3)"
    )


def execute(arguments: argparse.Namespace) -> Outcome:
    if arguments.give_up_after < 1:
        raise UsageError(f"--give-up-after is {arguments.give_up_after}; it must be at least 1")
    run = open_run(arguments.run)
    decision = decide(run, give_up_after=arguments.give_up_after, since=arguments.since)
    return Outcome(FINE, {"run": str(run), **asdict(decision)}, [decision.word], note=decision.reason)
