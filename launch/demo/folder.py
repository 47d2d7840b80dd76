"""The demo's folder. Only what a demo made is ever removed."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import TextIO

MARK = "demo.json"
REFERENCE, RESUMED, CURVES = "reference", "resumed", "curves.png"


class FolderRefused(Exception):
    """The folder is somebody else's, or another demo works in it."""


def claim(folder: Path) -> TextIO:
    """Make `folder` ready for a new demo, without what an earlier demo left in it.

    Returns the mark, locked; the claim lasts until it is closed. Raises `FolderRefused`.
    """
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise FolderRefused(f"{folder} is not a folder; give another --out")
    if folder.is_dir() and any(folder.iterdir()) and not _is_mark(mark):
        raise FolderRefused(f"{folder} holds something that is not a demo's; give another --out, or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = mark.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise FolderRefused(f"another demo is running in {folder}; give another --out") from None
    for name in (REFERENCE, RESUMED):
        if (folder / name).is_symlink():
            (folder / name).unlink()
        elif (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for path in [folder / CURVES, *folder.glob("*-attempt-*.log")]:
        path.unlink(missing_ok=True)
    write_mark(handle, {"verdict": "unfinished"})
    return handle


def write_mark(handle: TextIO, content: dict[str, object]) -> None:
    """Replace the content of the mark, which is also the demo's result for programs."""
    handle.seek(0)
    handle.truncate()
    json.dump({"made_by": "launch.demo", **content}, handle, indent=1)
    handle.write("\n")
    handle.flush()


def _is_mark(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("made_by") == "launch.demo"
