"""From a path on the command line to a run, a checkpoint, its manifest, and all that is wrong with it.

Whatever lies at a path, the outcome is a value or a `ResumeKitError`: also for documents that are signed and
well formed, but whose fields are of other types than the format says.
"""

from __future__ import annotations

import os
from pathlib import Path

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.cli.output import printable
from resume_kit.errors import Problem, ResumeKitError, UsageError
from resume_kit.integrity.verify import Progress, deep_problems, quick_problems


def open_run(text: str) -> Path:
    """The run directory at `text`. `UsageError` for anything else, a checkpoint directory included."""
    path = _directory(text)
    if _is_checkpoint(path):
        raise UsageError(f"{_shown(path)} is a checkpoint, not a run directory")
    return path


def open_checkpoints(text: str, *, every: bool = False) -> list[Path]:
    """The checkpoint directory at `text`; of a run, the newest, or `every` one, oldest first."""
    path = _directory(text)
    if _is_checkpoint(path):
        if every:
            raise UsageError(f"--all wants a run directory; {_shown(path)} is one checkpoint")
        return [path]
    steps = steps_of(path)
    if not steps:
        raise UsageError(f"{_shown(path)} holds no checkpoint: no {names.MANIFEST}, no step-<9 digits> directory")
    return [path / names.step_directory(step) for step in (steps if every else steps[-1:])]


def open_checkpoint(text: str) -> Path:
    """The checkpoint directory at `text`; of a run, the newest."""
    return open_checkpoints(text)[0]


def steps_of(run: Path) -> list[int]:
    """Steps with a checkpoint directory, oldest first. `UsageError` when the run cannot be listed."""
    try:
        return names.checkpoint_steps(run)
    except OSError as error:
        raise _unreadable(run, error) from error


def open_manifest(directory: Path) -> Manifest:
    """The manifest. `CheckpointDamaged` when it is not what was committed, `ResumeRefused` when it is too new."""
    return read_manifest(directory)


def find_problems(directory: Path, *, deep: bool = False, progress: Progress | None = None) -> list[Problem]:
    """All that is wrong with a checkpoint. Empty for a good one."""
    return deep_problems(directory, progress or _silent) if deep else quick_problems(directory)


def size_on_disk(directory: Path) -> int | None:
    """Bytes of the files in a checkpoint directory; None when it cannot be listed."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries if not entry.is_dir())
    except OSError:
        return None


def manifest_or_none(directory: Path) -> Manifest | None:
    """The manifest where it can be read: for showing what is known of a damaged checkpoint."""
    try:
        return open_manifest(directory)
    except ResumeKitError:
        return None


def _directory(text: str) -> Path:
    if not text:
        raise UsageError("the path is empty")
    path = Path(text)
    try:
        if path.name in ("", ".."):  # the name of a checkpoint directory counts, so `.` must have one
            path = path.resolve()
        with os.scandir(path):
            return path
    except FileNotFoundError:
        raise UsageError(f"{_shown(path)}: no such directory") from None
    except NotADirectoryError:
        raise UsageError(f"{_shown(path)} is not a directory") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _is_checkpoint(path: Path) -> bool:
    if names.parse_step(path.name) is not None or names.is_leftover(path.name):
        return True
    signs = (names.MANIFEST, names.index_file(0), names.data_file(0))
    return any(os.path.lexists(path / name) for name in signs)


def _unreadable(path: Path, error: OSError | ValueError) -> UsageError:
    return UsageError(f"{_shown(path)} cannot be read: {getattr(error, 'strerror', None) or error}")


def _shown(path: Path) -> str:
    """A path that the user typed, in one line of moderate length."""
    text = printable(str(path))
    return text if len(text) <= 300 else f"{text[:300]}…"


def _silent(_done: int, _total: int) -> None:
    pass
