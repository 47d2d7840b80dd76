"""Durable files: every write is fsynced, every rename is followed by an fsync of its directory."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import BLOCK_BYTES, FileDigest, spans
from resume_kit.checkpoint.filesystems import require_atomic_renames
from resume_kit.checkpoint.writing import ImageFile
from resume_kit.checkpoint.writing import write_failed as write_failed  # for all who import files
from resume_kit.errors import Problem, SaveFailed, UsageError

#: Seconds within which what another host wrote and closed must be seen here. NFS caches names for up to 60.
VISIBLE_WITHIN = 90.0
_LATE = "look at the shared file system: every host must see what another has written and closed"


def fsync_directory(directory: Path) -> None:
    """Make the entries of `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new small file and fsync it. Raises `SaveFailed` with the remedy when the disk says no."""
    write_image(path, memoryview(data))


def write_image(path: Path, image: memoryview) -> FileDigest:
    """Write a file image, digesting it as it goes, and fsync it: several blocks at a time, a small one without threads.

    Returns the digests of the bytes in `image`. A short or failed write raises `SaveFailed`.
    """
    file = ImageFile(path, image.nbytes, writers=None if image.nbytes > BLOCK_BYTES else 0)
    try:
        for number, (start, stop) in enumerate(spans(image.nbytes)):
            file.submit(number, image[start:stop])
        return file.finish()
    finally:
        file.abandon()


def read_when_visible(path: Path, nbytes: int, deadline: float | None = None) -> bytes:
    """The bytes of a small file that another host has just written and closed: `nbytes` of them.

    Through the caches of a shared file system they may come late, or by a stale handle: that is waited for, until
    `deadline` (monotonic), by default for `VISIBLE_WITHIN` seconds. Raises `CheckpointDamaged`.
    """
    if deadline is None:
        deadline = time.monotonic() + VISIBLE_WITHIN
    while True:
        try:
            raw = path.read_bytes()
            if len(raw) >= nbytes or time.monotonic() > deadline:
                return raw
        except OSError as error:
            late = error.errno in (errno.ENOENT, errno.ESTALE) and path.parent.is_dir()
            if not late or time.monotonic() > deadline:
                raise canonical.damaged(path, f"it cannot be read: {error.strerror}", _LATE) from error
        _look_anew(path.parent)


def is_visible(path: Path) -> bool:
    """Whether what another host has made is seen here, within `VISIBLE_WITHIN` seconds."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        _look_anew(next(parent for parent in path.parents if parent.exists()))
    return True


def _look_anew(directory: Path) -> None:
    with suppress(OSError):
        os.listdir(directory)  # makes a client of NFS ask the server
    time.sleep(0.05)


def require_writable(run: Path) -> None:
    """Create `run` if need be and prove by a write that it can be written. Raises `UsageError`, also on an object
    store."""
    probe = run / f".write-probe-{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"resume_kit")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        problem = Problem(
            "run directory",
            str(run),
            f"cannot be written ({error.strerror or error})",
            "give the job's user write permission, free space, or choose another run directory",
        )
        raise UsageError("the run directory cannot be used", [problem]) from error
    require_atomic_renames(run)


def require_space(run: Path, nbytes: int) -> None:
    """Raise `SaveFailed` unless the file system under `run` has `nbytes` free."""
    free = shutil.disk_usage(run).free
    if free < nbytes:
        problem = Problem(
            "space",
            str(run),
            f"the checkpoint needs {nbytes:,} bytes, {free:,} are free: no space left",
            "free space, raise the quota, or keep fewer checkpoints (keep_last, keep_every)",
        )
        raise SaveFailed("not enough space for the checkpoint", [problem])


def publish(staging: Path, final: Path) -> None:
    """Rename the finished `staging` directory, which lies in a ground, to `final`: the one act that commits.

    A checkpoint that already stands at `final` (the same step, trained again) is first renamed into the ground
    and deleted after the commit, so that a crash at any point loses neither.
    """
    ground = staging.parent
    fsync_directory(staging)
    aside, replaces = ground / names.replaced_directory(final.name), final.exists()
    if replaces:
        if aside.exists():  # could not be deleted when this step was last replaced
            remove_checkpoint(aside, ground)
        os.rename(final, aside)
    try:
        os.rename(staging, final)
    except OSError:
        if replaces:
            with suppress(FileNotFoundError):  # the ground was taken away; its taker puts it back
                os.rename(aside, final)
        raise
    try:
        fsync_directory(final.parent)
    except OSError as error:
        what = f"committed, but not known to be on disk: the directory's fsync failed ({error.strerror or error})"
        remedy = "look at the file system's health; verify the checkpoint before you rely on it"
        raise SaveFailed("a commit may not be durable", [Problem("commit", str(final), what, remedy)]) from error
    if replaces:
        with suppress(OSError, ValueError):  # the new checkpoint stands; the next start removes what is left of the old
            remove_checkpoint(aside, ground)


def remove_checkpoint(directory: Path, ground: Path) -> None:
    """Delete a checkpoint directory whose name matches one of ours whole; refuse any other with ValueError.

    It is first renamed into `ground`: a crash half-way never leaves something that looks like a checkpoint, and an
    attempt whose ground was taken away deletes nothing. Raises OSError.
    """
    name = directory.name
    if not (names.parse_step(name) is not None or names.in_ground(name) or names.is_leftover(name)):
        raise ValueError(f"{directory} is not named like a checkpoint; nothing was deleted")
    if directory.is_symlink():
        raise ValueError(f"{directory} is a symbolic link; nothing was deleted")
    doomed = directory
    if directory.parent != ground or not names.is_removed(name):
        doomed = free_name(ground / names.removed_directory(name))
        os.rename(directory, doomed)
        fsync_directory(ground)
        fsync_directory(directory.parent)
    remove_tree(doomed)
    with suppress(FileNotFoundError):  # the ground was taken away meanwhile; what was renamed is deleted by its taker
        fsync_directory(ground)


def remove_tree(directory: Path) -> None:
    """Delete a directory of ours with all in it. Links are not followed.

    Files that another process has open stay on NFS, as `.nfs…`, until it closes them, and so does their directory:
    that is no error, the next start deletes it. Neither is what somebody else has just deleted.
    """

    def tolerate(_function: Callable[..., Any], path: str, failure: tuple[Any, BaseException, Any]) -> None:
        error = failure[1]
        if not isinstance(error, FileNotFoundError) and not _open_elsewhere(Path(path)):
            raise error

    shutil.rmtree(directory, onerror=tolerate)


def _open_elsewhere(path: Path) -> bool:
    """Whether `path` is a file that NFS keeps for a process that has it open, or a directory of nothing else."""
    if path.is_symlink() or not path.is_dir():
        return path.name.startswith(".nfs")
    return all(_open_elsewhere(entry) for entry in path.iterdir())


def free_name(path: Path) -> Path:
    """`path`, or the first of path.2, path.3, … that does not exist."""
    if not path.exists():
        return path
    return next(p for n in itertools.count(2) if not (p := path.with_name(f"{path.name}.{n}")).exists())
