"""``resume-kit next RUN``: one word for a batch script, the reason for a person."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path

from resume_kit.cli.opening import open_run
from resume_kit.cli.output import FINE, Outcome
from resume_kit.environment import slurm_job
from resume_kit.errors import ResumeKitError, UsageError
from resume_kit.recovery.rules import Decision, decide

#: Seconds within which a file system that hiccups should answer.
PATIENCE = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--give-up-after",
        type=int,
        metavar="K",
        help="failures at the same step that are enough (as the run was configured, else 3)",
    )
    parser.epilog = (
        "prints restart, finished, stop (a person must look) or running (another attempt is alive), the reason on"
        " stderr; exit 0 whichever it is. In a SLURM job it asks whether this start of the job opened the run"
    )


def execute(arguments: argparse.Namespace) -> Outcome:
    if arguments.give_up_after is not None and arguments.give_up_after < 1:
        raise UsageError(f"--give-up-after is {arguments.give_up_after}; it must be at least 1")
    decision = _patiently(arguments.run, arguments.give_up_after)
    return Outcome(FINE, {"run": arguments.run, **asdict(decision)}, [decision.word], note=decision.reason)


def _patiently(text: str, give_up_after: int | None) -> Decision:
    """The word also for a run that is not there, and for one that cannot be read, after `PATIENCE` seconds."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            path = Path(text)
            run = open_run(text) if os.path.lexists(path) else path
            return decide(run, give_up_after=give_up_after, job=slurm_job())
        except (ResumeKitError, OSError) as error:
            if isinstance(error, UsageError) and not isinstance(error.__cause__, OSError):
                raise  # no run directory, whenever one looks
            if time.monotonic() >= until:
                return Decision("stop", f"the run cannot be read: {error}")
        time.sleep(0.5)
