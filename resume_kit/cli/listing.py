"""``resume-kit ls RUN``: every checkpoint and what dead attempts left behind, newest last."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType
from rich.text import Text

from resume_kit.checkpoint import names
from resume_kit.cli.opening import find_problems, manifest_or_none, open_run, size_on_disk, steps_of
from resume_kit.cli.output import (
    BAD,
    FINE,
    Outcome,
    printable,
    problem_documents,
    size_text,
    table,
    time_text,
)
from resume_kit.errors import Problem, UsageError

State = Literal["good", "damaged", "no manifest", "torn", "replaced", "half-deleted"]
_STYLES: dict[State, str] = {"good": "green", "damaged": "bold red", "no manifest": "bold red"}
_MEANING: dict[State, str] = {
    "torn": "a save died before its commit",
    "replaced": "waits for a newer save of its step; put back at the next start if that never came",
    "half-deleted": "a deletion died half-way",
}


@dataclass(frozen=True)
class Listed:
    """One row: a directory in the run, and what is known of it."""

    name: str
    step: int
    set_aside: bool
    state: State
    problems: tuple[Problem, ...]
    created: float | None
    size: int | None
    ranks: int | None
    engine: Mapping[str, Any] | None
    attempt: int | None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.epilog = "exit 1 when the run has checkpoints and none is good; set-aside ones do not count"


def execute(arguments: argparse.Namespace) -> Outcome:
    run = open_run(arguments.run)
    rows = sorted(_all(run), key=lambda row: (not row.set_aside, row.step, row.name))
    line = [row for row in rows if not row.set_aside and names.parse_step(row.name) is not None]
    good = [row.step for row in line if row.state == "good"]
    document = {
        "run": str(run),
        "newest_good": max(good, default=None),
        "checkpoints": [{**asdict(row), "problems": problem_documents(row.problems)} for row in rows],
    }
    text: list[RenderableType] = [_table(rows)] if rows else [f"no checkpoints in {printable(str(run))}"]
    if line and not good:
        text.append(Text("none of the checkpoints is good", style="bold red"))
    return Outcome(BAD if line and not good else FINE, document, text)


#: Sizes of parallel groups by the names that the field has for them, and those that nobody needs to be told.
_SIZES = {
    "tensor_parallel": "TP",
    "pipeline_parallel": "PP",
    "virtual_pipeline": "VPP",
    "data_parallel": "DP",
    "expert_parallel": "EP",
    "expert_tensor_parallel": "ETP",
}
_ORDINARY = ("VPP1", "EP1", "ETP1")


def engine_text(engine: Mapping[str, Any]) -> str:
    """``deepspeed, zero_stage 3`` or ``megatron, TP2 PP2 DP1, distributed_optimizer``: a topology, ranks left out."""
    given = {key: value for key, value in engine.items() if key not in ("engine", "world_size")}
    sizes = [f"{short}{given.pop(key)}" for key, short in _SIZES.items() if key in given]
    shown = " ".join(size for size in sizes if size not in _ORDINARY)
    switches = [key for key, value in given.items() if value is True]
    rest = [f"{key} {value}" for key, value in given.items() if not isinstance(value, bool)]
    return ", ".join(filter(None, [str(engine.get("engine", "?")), shown, *rest, *switches]))


def _all(run: Path) -> Iterator[Listed]:
    for step in steps_of(run):
        yield _checkpoint(run / names.step_directory(step), step)
    for place in (run, *_grounds(run)):
        for name in _entries(place):
            if names.is_leftover(name) or (place != run and names.in_ground(name)):
                yield _leftover(place / name, str((place / name).relative_to(run)))
    for name in _entries(run / names.SET_ASIDE):
        aside = names.parse_step(re.sub(r"\.attempt-\d+\Z", "", name))
        if aside is not None:
            yield _checkpoint(run / names.SET_ASIDE / name, aside, set_aside=True)


def _entries(directory: Path) -> list[str]:
    """Names of the directories in `directory`; none where it does not exist."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{directory} cannot be read: {error.strerror or error}") from error


def _checkpoint(directory: Path, step: int, *, set_aside: bool = False) -> Listed:
    problems = find_problems(directory)
    state: State = "damaged" if problems else "good"
    try:
        os.lstat(directory / names.MANIFEST)
    except FileNotFoundError:
        state = "no manifest"
    except OSError:
        state = "damaged"
    return _listed(directory, step, state, problems, set_aside=set_aside)


def _grounds(run: Path) -> Iterator[Path]:
    """Where attempts, and `prune`, prepare checkpoints and take them apart."""
    yield run / names.PRUNING
    for number in names.attempt_numbers(run):
        yield from names.grounds(run / names.ATTEMPTS / names.attempt_directory(number))


def _leftover(directory: Path, name: str) -> Listed:
    state: State = "torn"
    if names.replaced_step(directory.name) is not None:
        state = "replaced"
    elif names.is_removed(directory.name):
        state = "half-deleted"
    step = re.search(r"step-(\d{9})", directory.name)
    return replace(_listed(directory, int(step[1]) if step else 0, state, []), name=name)


def _listed(directory: Path, step: int, state: State, problems: list[Problem], *, set_aside: bool = False) -> Listed:
    manifest = manifest_or_none(directory)
    return Listed(
        name=f"{names.SET_ASIDE}/{directory.name}" if set_aside else directory.name,
        step=step,
        set_aside=set_aside,
        state=state,
        problems=tuple(problems),
        created=manifest.created if manifest else _modified(directory),
        size=size_on_disk(directory),
        ranks=manifest.world_size if manifest else None,
        engine=manifest.engine if manifest else None,
        attempt=manifest.attempt if manifest else _attempt(directory.name),
    )


def _modified(directory: Path) -> float | None:
    try:
        return directory.stat().st_mtime
    except OSError:
        return None


def _attempt(name: str) -> int | None:
    match = re.search(r"-attempt-(\d+)\Z", name)
    return int(match[1]) if match else None


def _table(rows: list[Listed]) -> RenderableType:
    headings: tuple[str, ...] = ("step", "when", "size", "ranks", "engine", "attempt", "state")
    cells = [_cells(row) for row in rows]
    if any(row.name != names.step_directory(row.step) for row in rows):
        headings = (*headings, "name")
        cells = [[*line, row.name] for line, row in zip(cells, rows, strict=True)]
    return table(headings, cells, right=("step", "size", "ranks", "attempt"))


def _cells(row: Listed) -> list[object]:
    why = _MEANING.get(row.state, "")
    if row.state == "damaged":
        first = row.problems[0]
        more = f" (and {len(row.problems) - 1} more)" if len(row.problems) > 1 else ""
        why = f"{first.where.rsplit('/', 1)[-1]}: {first.what}{more}"
    state = Text(f"{row.state}: {printable(why)}" if why else row.state, style=_STYLES.get(row.state, "yellow"))
    ranks = "?" if row.ranks is None else row.ranks
    engine = "?" if row.engine is None else engine_text(row.engine)
    attempt = "?" if row.attempt is None else row.attempt
    return [row.step, time_text(row.created), size_text(row.size), ranks, engine, attempt, state]
