"""On which file system a directory lies: whether a rename there is one act, and whether it is memory."""

from __future__ import annotations

import re
from pathlib import Path

from resume_kit.errors import Problem, UsageError

_MOUNTS = Path("/proc/self/mounts")
#: Object stores dressed up as file systems: the rename of a directory is missing, or copies object by object.
_OBJECT_STORES = {
    "blobfuse",
    "blobfuse2",
    "gcsfuse",
    "geesefs",
    "goofys",
    "mountpoint-s3",
    "ossfs",
    "rclone",
    "s3fs",
}
_MEMORY = {"tmpfs", "ramfs", "hugetlbfs"}


def require_atomic_renames(run: Path, mounts: Path = _MOUNTS) -> None:
    """Raise `UsageError` where `run` lies on an object store, on which half a checkpoint could look committed."""
    kind = mounted_as(run, mounts)
    if kind is not None and _OBJECT_STORES.intersection(re.split(r"[^a-z0-9-]+", kind.lower())):
        what = f"lies on an object store ({kind}), where the rename of a directory is not one act"
        remedy = "take a file system for the run directory, and copy committed checkpoints to the store from there"
        raise UsageError("the run directory cannot be used", [Problem("run directory", str(run), what, remedy)])


def in_memory(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether what lies at `path` is in memory, and nowhere else. False where the system does not tell."""
    return (mounted_as(path, mounts) or "").partition(" ")[0] in _MEMORY


def mounted_as(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Type and source of the mount under `path`, as ``ext4 /dev/sda1``; None where the system does not tell."""
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    place, found = path.resolve(), (-1, "")
    for source, point, kind, *_ in (row for row in rows if len(row) > 2):
        folder = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))
        if place.is_relative_to(folder) and len(folder.parts) >= found[0]:  # a later mount hides an earlier one
            found = (len(folder.parts), f"{kind} {source}")
    return found[1] or None
