"""``resume-kit verify CKPT|RUN``: is a checkpoint whole?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from resume_kit.checkpoint import names
from resume_kit.cli.opening import find_problems, open_checkpoints
from resume_kit.cli.output import BAD, FINE, Outcome, printable, problem_block, problem_documents
from resume_kit.errors import Problem
from resume_kit.integrity.verify import Progress as OnBytes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CKPT|RUN", help="a checkpoint; of a run, its newest")
    parser.add_argument("--deep", action="store_true", help="read every byte of the data files as well")
    parser.add_argument("--all", action="store_true", help="check every checkpoint of a run")
    parser.add_argument("--progress", action="store_true", help="show progress also where stderr is no terminal")
    parser.epilog = "exit 1 when any checked checkpoint is damaged"


def execute(arguments: argparse.Namespace) -> Outcome:
    directories = open_checkpoints(arguments.path, every=arguments.all)
    findings: list[tuple[Path, list[Problem]]] = []
    with _bars(shown=arguments.progress or (sys.stderr is not None and sys.stderr.isatty())) as bars:
        for directory in directories:
            on_bytes = _bar(bars, directory.name) if arguments.deep else None
            findings.append((directory, find_problems(directory, deep=arguments.deep, progress=on_bytes)))
    damaged = any(problems for _, problems in findings)
    document = {
        "ok": not damaged,
        "deep": arguments.deep,
        "checkpoints": [
            {
                "path": str(directory),
                "step": names.parse_step(directory.name),
                "ok": not problems,
                "problems": problem_documents(problems),
            }
            for directory, problems in findings
        ],
    }
    text = [part for directory, problems in findings for part in _verdict(directory, problems, arguments.deep)]
    return Outcome(BAD if damaged else FINE, document, text)


def _verdict(directory: Path, problems: list[Problem], deep: bool) -> Iterator[Text]:
    name = printable(str(directory))
    if not problems:
        checked = "every byte is as it was saved" if deep else "manifest, indices, sizes, ownership; no data read"
        yield Text(f"✓ {name} is good ({checked})", style="green")
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    yield Text(f"✗ {name} is damaged: {count}", style="bold red")
    yield problem_block(problems)


@contextmanager
def _bars(*, shown: bool) -> Iterator[Progress | None]:
    if not shown:
        yield None
        return
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False)) as bars:
        yield bars


def _bar(bars: Progress | None, name: str) -> OnBytes | None:
    if bars is None:
        return None
    task = bars.add_task(f"verify {printable(name)}", total=None)

    def advance(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)

    return advance
