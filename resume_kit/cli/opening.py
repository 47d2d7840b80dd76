"""From a path on the command line to a run, a checkpoint, its manifest, and all that is wrong with it.

Whatever lies at a path, the outcome is a value or a `ResumeKitError`: also for documents that are signed and
well formed, but whose fields are of other types than the format says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.errors import Problem, ResumeKitError, UsageError
from resume_kit.integrity.verify import Progress, deep_problems, quick_problems

#: What reading a document raises when its fields are of other types than the format says.
_MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


def open_run(text: str) -> Path:
    """The run directory at `text`. `UsageError` for anything else, a checkpoint directory included."""
    path = _directory(text)
    if _is_checkpoint(path):
        raise UsageError(f"{path} is a checkpoint, not a run directory; its run may be {path.parent}")
    return path


def open_checkpoints(text: str, *, every: bool = False) -> list[Path]:
    """The checkpoint directory at `text`; of a run, the newest, or `every` one, oldest first."""
    path = _directory(text)
    if _is_checkpoint(path):
        if every:
            raise UsageError(f"--all wants a run directory; {path} is one checkpoint")
        return [path]
    steps = steps_of(path)
    if not steps:
        raise UsageError(f"{path} holds no checkpoint: no {names.MANIFEST}, no step-<9 digits> directory")
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
    """The manifest, with every field of the type that the format says.

    Raises `CheckpointDamaged` when it is not so, and `ResumeRefused` when this version cannot read it.
    """
    path = directory / names.MANIFEST
    try:
        manifest = read_manifest(directory)
    except ResumeKitError:
        raise
    except _MALFORMED as error:
        raise canonical.damaged(path, f"a field is malformed: {error!r}") from None
    wrong = next(_misshapen(manifest), None)
    if wrong is not None:
        raise canonical.damaged(path, f"{wrong} is not what the format says")
    return manifest


def find_problems(directory: Path, *, deep: bool = False, progress: Progress | None = None) -> list[Problem]:
    """All that is wrong with a checkpoint. Empty for a good one."""
    try:
        problems = deep_problems(directory, progress or _silent) if deep else quick_problems(directory)
        if not problems:
            open_manifest(directory)
    except ResumeKitError as error:
        return list(error.problems) or [
            Problem("integrity", str(directory), error.headline, canonical.RESTORE)
        ]
    except OSError as error:
        where = str(error.filename or directory)
        return [
            Problem("integrity", where, f"cannot be read: {error.strerror or error}", "check permissions")
        ]
    except _MALFORMED as error:
        what = f"a manifest, index or data file is malformed: {error!r}"
        return [Problem("integrity", str(directory), what, canonical.RESTORE)]
    return problems


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
        raise UsageError(f"{text}: no such directory") from None
    except NotADirectoryError:
        raise UsageError(f"{text} is not a directory") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _is_checkpoint(path: Path) -> bool:
    if names.parse_step(path.name) is not None or names.is_leftover(path.name):
        return True
    signs = (names.MANIFEST, names.index_file(0), names.data_file(0))
    return any(os.path.lexists(path / name) for name in signs)


def _unreadable(path: Path, error: OSError | ValueError) -> UsageError:
    return UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _silent(_done: int, _total: int) -> None:
    pass


def _misshapen(manifest: Manifest) -> Iterator[str]:
    """Names of fields whose type is not the format's."""
    whole: dict[str, type | tuple[type, ...]] = {
        "run_id": str,
        "attempt": int,
        "step": int,
        "created": (int, float),
    }
    whole |= dict.fromkeys(("engine", "aliases", "state", "data", "pinned"), dict)
    whole |= {"gate": (dict, type(None))}
    for name, kind in whole.items():
        if not isinstance(getattr(manifest, name), kind):
            yield name
    for number, entry in enumerate(manifest.tensors):
        texts = (*entry.spec.key, entry.fingerprint)
        owner = entry.owner is None or isinstance(entry.owner, int)
        shape = all(isinstance(extent, int) and extent >= 0 for extent in entry.spec.shape)
        if not (
            all(isinstance(text, str) for text in texts)
            and isinstance(entry.stored, bool)
            and owner
            and shape
        ):
            yield f"tensors[{number}]"
    for rank in manifest.ranks:
        texts = (rank.data_digest, rank.index_digest, rank.rng_digest)
        sizes = (rank.data_bytes, rank.index_bytes)
        if not (all(isinstance(t, str) for t in texts) and all(isinstance(n, int) and n >= 0 for n in sizes)):
            yield f"ranks[{rank.rank}]"
    if not all(isinstance(feature, str) for feature in manifest.requires):
        yield "requires"
