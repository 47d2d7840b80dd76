"""Durable files: every write is fsynced, every rename is followed by an fsync of its directory."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from resume_kit.checkpoint import names
from resume_kit.checkpoint.blocks import BLOCK_BYTES, FileDigest, spans
from resume_kit.checkpoint.writing import ImageFile
from resume_kit.checkpoint.writing import write_failed as write_failed  # for all who import files
from resume_kit.errors import Problem, SaveFailed, UsageError


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


def require_writable(run: Path) -> None:
    """Create `run` if need be and prove by a write that it can be written. Raises `UsageError`."""
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


def publish(staging: Path, final: Path, aside: Path) -> None:
    """Rename the finished `staging` directory to `final`: the one act that commits a checkpoint.

    A checkpoint that already stands at `final` (the same step, trained again) is first renamed to `aside`
    and deleted after the commit, so that a crash at any point loses neither.
    """
    fsync_directory(staging)
    replaces = final.exists()
    if replaces:
        os.rename(final, aside)
    try:
        os.rename(staging, final)
    except OSError:
        if replaces:
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
            remove_checkpoint(aside)


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint directory whose name matches one of ours whole; refuse any other with ValueError.

    It is renamed first, so that a crash half-way never leaves something that looks like a checkpoint.
    """
    if names.parse_step(directory.name) is None and not names.is_leftover(directory.name):
        raise ValueError(f"{directory} is not named like a checkpoint; nothing was deleted")
    if directory.is_symlink():
        raise ValueError(f"{directory} is a symbolic link; nothing was deleted")
    doomed = directory
    if not directory.name.startswith(".removed-"):
        doomed = directory.with_name(names.removed_directory(directory.name))
        if doomed.is_dir():
            shutil.rmtree(doomed)
        os.rename(directory, doomed)
        fsync_directory(directory.parent)
    shutil.rmtree(doomed)
    fsync_directory(directory.parent)
