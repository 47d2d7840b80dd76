"""Names inside a run directory. Every name is matched whole before anything is read, renamed or deleted."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
SET_ASIDE = "set-aside"

_STEP_DIGITS = 9
_STEP = re.compile(r"step-([0-9]{9})")
_STAGING = re.compile(r"\.staging-step-([0-9]{9})-attempt-([0-9]+)")
_REPLACED = re.compile(r"\.replaced-step-([0-9]{9})-attempt-([0-9]+)")
_REMOVED = re.compile(
    r"\.removed-(?:step-[0-9]{9}|\.staging-step-[0-9]{9}-attempt-[0-9]+|\.replaced-step-[0-9]{9}-attempt-[0-9]+)"
)


def step_directory(step: int) -> str:
    """Name of the committed checkpoint of `step`: ``step-000000042``."""
    if not 0 <= step < 10**_STEP_DIGITS:
        raise ValueError(f"step {step} does not fit the {_STEP_DIGITS} digits of a checkpoint's name")
    return f"step-{step:0{_STEP_DIGITS}d}"


def staging_directory(step: int, attempt: int) -> str:
    """Name of the directory in which `attempt` prepares the checkpoint of `step`; torn until it is renamed."""
    return f".staging-{step_directory(step)}-attempt-{attempt}"


def replaced_directory(step: int, attempt: int) -> str:
    """Name under which an older checkpoint of the same step waits for the new one to take its place."""
    return f".replaced-{step_directory(step)}-attempt-{attempt}"


def replaced_step(name: str) -> int | None:
    """The step of a checkpoint that was moved aside for its replacement; None for every other name."""
    match = _REPLACED.fullmatch(name)
    return int(match[1]) if match else None


def removed_directory(name: str) -> str:
    """Name that a checkpoint directory gets at once before its files are deleted one by one."""
    return f".removed-{name}"


def parse_step(name: str) -> int | None:
    """The step of a committed checkpoint's directory name; None for every other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_leftover(name: str) -> bool:
    """Whether `name` is what a dead attempt leaves behind: a torn, replaced or half-deleted checkpoint."""
    return any(pattern.fullmatch(name) for pattern in (_STAGING, _REPLACED, _REMOVED))


def data_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def index_file(rank: int) -> str:
    return f"rank-{rank:05d}.index.json"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint directory in `run`, oldest first.

    Such a directory without a manifest was committed and then damaged: a save that dies leaves other names.
    """
    if not run.is_dir():
        return []
    return sorted(step for entry in run.iterdir() if (step := parse_step(entry.name)) is not None and entry.is_dir())


def committed_steps(run: Path) -> list[int]:
    """Steps whose checkpoint directory has its manifest, oldest first."""
    return [step for step in checkpoint_steps(run) if (run / step_directory(step) / MANIFEST).is_file()]
