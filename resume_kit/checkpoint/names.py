"""Names inside a run directory. Every name is matched whole before anything is read, renamed or deleted."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
SET_ASIDE = "set-aside"
ATTEMPTS = "attempts"
#: In an attempt's folder: all that it prepares or takes apart.
GROUND = "ground"
#: The same for `resume-kit prune`, in the run directory.
PRUNING = "pruning"

_STEP_DIGITS = 9
_STEP = re.compile(r"step-([0-9]{9})")
_ATTEMPT = re.compile(r"[0-9]{6,}")
_FENCED = re.compile(r"fenced-by-([0-9]{6,})")
#: In a ground: an older save of the same step, and one on its way to `set-aside/`.
_REPLACED = re.compile(r"replaced-step-([0-9]{9})")
_SETTING_ASIDE = re.compile(r"setting-aside-(step-[0-9]{9}\.attempt-[0-9]+)")
#: In the run directory, left by versions that had no grounds.
_OLD_STAGING = re.compile(r"\.staging-step-([0-9]{9})-attempt-([0-9]+)")
_OLD_REPLACED = re.compile(r"\.replaced-step-([0-9]{9})-attempt-([0-9]+)")
_OLD_REMOVED = re.compile(
    r"\.removed-(?:step-[0-9]{9}|\.staging-step-[0-9]{9}-attempt-[0-9]+|\.replaced-step-[0-9]{9}-attempt-[0-9]+)"
)
#: In a ground: a deletion of any of these, in progress or cut off.
_REMOVED = re.compile(
    "removed-(?:"
    + "|".join(p.pattern for p in (_STEP, _REPLACED, _OLD_STAGING, _OLD_REPLACED, _OLD_REMOVED))
    + r")(?:\.[0-9]+)*"
)


def step_directory(step: int) -> str:
    """Name of the committed checkpoint of `step`: ``step-000000042``."""
    if not 0 <= step < 10**_STEP_DIGITS:
        raise ValueError(f"step {step} does not fit the {_STEP_DIGITS} digits of a checkpoint's name")
    return f"step-{step:0{_STEP_DIGITS}d}"


def parse_step(name: str) -> int | None:
    """The step of a committed checkpoint's directory name; None for every other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def attempt_directory(number: int) -> str:
    """Name of an attempt's folder in `attempts/`: ``000007``."""
    return f"{number:06d}"


def attempt_numbers(run: Path) -> list[int]:
    """Attempts that have a folder in `run`, oldest first."""
    try:
        return sorted(int(entry.name) for entry in (run / ATTEMPTS).iterdir() if _ATTEMPT.fullmatch(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def ground(run: Path, attempt: int) -> Path:
    """Where `attempt` prepares checkpoints and takes them apart, as long as no newer attempt has come."""
    return run / ATTEMPTS / attempt_directory(attempt) / GROUND


def fenced_ground(by: int) -> str:
    """Name that attempt `by` gives to the ground of an older one: first a directory, a file once it is dissolved."""
    return f"fenced-by-{attempt_directory(by)}"


def parse_fenced(name: str) -> int | None:
    """The attempt that took a ground away; None for every other name."""
    match = _FENCED.fullmatch(name)
    return int(match[1]) if match else None


def grounds(folder: Path) -> list[Path]:
    """The ground in an attempt's folder, under whatever name; none once it is dissolved. Links are left out."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    ours = (entry for entry in entries if entry.name == GROUND or parse_fenced(entry.name) is not None)
    return [entry for entry in ours if entry.is_dir() and not entry.is_symlink()]


def replaced_directory(name: str) -> str:
    """Name in a ground of a checkpoint that waits for another of its step to take its place."""
    return f"replaced-{name}"


def replaced_step(name: str) -> int | None:
    """The step of a checkpoint that was moved aside for its replacement; None for every other name."""
    match = _REPLACED.fullmatch(name) or _OLD_REPLACED.fullmatch(name)
    return int(match[1]) if match else None


def setting_aside_directory(place: str) -> str:
    """Name in a ground of a checkpoint on its way to `place` in `set-aside/`."""
    return f"setting-aside-{place}"


def set_aside_place(name: str) -> str | None:
    """Where in `set-aside/` a checkpoint in a ground belongs; None for every other name."""
    match = _SETTING_ASIDE.fullmatch(name)
    return match[1] if match else None


def removed_directory(name: str) -> str:
    """Name in a ground that a checkpoint directory gets before its files are deleted one by one."""
    return f"removed-{name}"


def is_removed(name: str) -> bool:
    """Whether `name` is that of a deletion in progress, or cut off by a crash."""
    return bool(_REMOVED.fullmatch(name) or _OLD_REMOVED.fullmatch(name))


def in_ground(name: str) -> bool:
    """Whether `name` is one of those that an attempt makes in its ground."""
    return any(pattern.fullmatch(name) for pattern in (_STEP, _REPLACED, _SETTING_ASIDE, _REMOVED))


def is_leftover(name: str) -> bool:
    """Whether `name` is what versions without grounds left in a run directory: torn, replaced or half-deleted."""
    return any(pattern.fullmatch(name) for pattern in (_OLD_STAGING, _OLD_REPLACED, _OLD_REMOVED))


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
