"""Taking an attempt's ground away, so that it can neither commit nor delete any more. No torch."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from resume_kit.checkpoint import files, names


def take_away(place: Path, run: Path, ground: Path, *, mark: Path | None = None) -> None:
    """Rename the ground at `place` to `mark`, empty it, and remove it; an empty file `mark` stays.

    A path through `place` leads nowhere after the rename. A rename that is under way in the kernel, or that an NFS
    client sends by a handle from its cache, may still come through after it; so every entry is moved on, to where it
    belongs or into `ground`, and the directory removed: nothing can go out of it or into it then. Raises OSError.
    """
    fenced = mark or place
    if place != fenced:
        os.rename(place, fenced)
    while True:
        for name in _entries(fenced):
            with suppress(FileNotFoundError):  # its owner's rename came first, which is seen before anything is elected
                _move_on(fenced / name, run, ground)
        try:
            fenced.rmdir()
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not _entries(fenced):
                return  # what is left is not ours: the directory stays, under its new name
        ground.stat()  # raises once a newer attempt has taken it
    if mark is not None:
        mark.touch()
    for directory in (ground, fenced.parent, run):
        files.fsync_directory(directory)


def clear(ground: Path) -> list[OSError]:
    """Delete what is to be deleted in `ground`; returns why some of it could not be."""
    failures = []
    for name in _entries(ground):
        if names.is_removed(name):
            try:
                files.remove_tree(ground / name)
            except OSError as error:
                failures.append(error)
    return failures


def set_aside(checkpoint: Path, place: str, run: Path, ground: Path) -> None:
    """Move a checkpoint to `place` in `set-aside/`, through `ground`: an attempt that was shut out moves nothing."""
    through = ground / names.setting_aside_directory(place)
    os.rename(checkpoint, through)
    _move_on(through, run, ground)


def _entries(ground: Path) -> list[str]:
    """Ours among what lies there. What was being written comes first: with it gone its owner cannot commit any more."""
    ours = [e.name for e in ground.iterdir() if names.in_ground(e.name) and e.is_dir() and not e.is_symlink()]
    return sorted(ours, key=lambda name: (names.parse_step(name) is None, name))


def _move_on(entry: Path, run: Path, ground: Path) -> None:
    step, place = names.replaced_step(entry.name), names.set_aside_place(entry.name)
    if step is not None and not (run / names.step_directory(step)).exists():
        os.rename(entry, run / names.step_directory(step))
    elif place is not None:
        aside = run / names.SET_ASIDE
        aside.mkdir(exist_ok=True)
        os.rename(entry, files.free_name(aside / place))
        files.fsync_directory(aside)
    else:
        doomed = entry.name if names.is_removed(entry.name) else names.removed_directory(entry.name)
        os.rename(entry, files.free_name(ground / doomed))
