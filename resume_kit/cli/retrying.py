"""``resume-kit retry RUN``: what failed so far counts no more."""

from __future__ import annotations

import argparse

from resume_kit.cli.opening import open_run
from resume_kit.cli.output import FINE, Outcome
from resume_kit.recovery.rules import pardon


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.epilog = "starts nothing: it only lets the next start go on. Mend first what the run failed of"


def execute(arguments: argparse.Namespace) -> Outcome:
    run = open_run(arguments.run)
    newest = pardon(run)
    return Outcome(
        FINE, {"run": str(run), "pardoned_up_to": newest}, [f"failures up to attempt {newest} no longer count"]
    )
