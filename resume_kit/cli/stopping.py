"""``resume-kit stop RUN``: ask the attempt that runs to save at its next step boundary, and to end."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from resume_kit.cli.opening import open_run
from resume_kit.cli.output import BAD, FINE, Outcome
from resume_kit.errors import Problem, ResumeKitError, UsageError
from resume_kit.recovery.attempts import STOP, AttemptRecord, newest_attempt
from resume_kit.recovery.identity import Identity
from resume_kit.recovery.rules import is_alive

LOOK_SECONDS = 6.0
_POLL_SECONDS = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why; the journal keeps it")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="wait until the attempt has ended")
    parser.epilog = "exit 1 when no attempt runs, or when it has not ended after --wait"


def execute(arguments: argparse.Namespace) -> Outcome:
    if not arguments.wait >= 0:
        raise UsageError(f"--wait is {arguments.wait}; give seconds")
    run = open_run(arguments.run)
    newest = newest_attempt(run)
    if newest is None or not is_alive(run, LOOK_SECONDS):
        what = "it has no attempts" if newest is None else _last_heard(newest)
        raise ResumeKitError("nothing to stop: no attempt runs", [Problem("stop", str(run), what)])
    by = Identity.of_this_process()
    request = {"reason": arguments.reason, "time": time.time(), "by": f"{by.host}, process {by.pid}"}
    _write(newest.folder / STOP, json.dumps(request).encode() + b"\n")
    document = {"run": str(run), "attempt": newest.number, "request": request, "ended": None}
    asked = f"attempt {newest.number} was asked to save and end; it does at its next step boundary"
    if not arguments.wait:
        return Outcome(FINE, document, [asked])
    ended = _wait(newest, arguments.wait)
    if ended is None:
        text = f"{asked}; it has not ended within {arguments.wait:g} s"
        return Outcome(BAD, document, [text])
    done = f"attempt {newest.number}: {ended.get('reason')} at step {ended.get('step')}"
    return Outcome(FINE, {**document, "ended": ended}, [done])


def _last_heard(newest: AttemptRecord) -> str:
    if newest.ended is None:
        return f"attempt {newest.number} shows no sign of life"
    return f"attempt {newest.number} has ended ({newest.ended.get('reason')})"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: the attempt may look at any moment."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def _wait(newest: AttemptRecord, seconds: float) -> dict[str, object] | None:
    """How the attempt ended, once it has; None where it has not within `seconds`."""
    until = time.monotonic() + seconds
    while True:
        ended = AttemptRecord.of(newest.folder).ended
        if ended is not None or time.monotonic() >= until:
            return dict(ended) if ended is not None else None
        time.sleep(_POLL_SECONDS)
