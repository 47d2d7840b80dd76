"""File systems as a benchmark meets them: their kind, fsync of what others wrote, reads that no cache serves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resume_kit.checkpoint.filesystems import mounted_as

_THREADS = 8


def file_system(path: Path) -> str:
    """The kind of file system that holds `path`, `ext4` for instance; `unknown` where the system does not tell."""
    return (mounted_as(path) or "unknown").partition(" ")[0]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in files_in(folder))


def sync(folder: Path) -> None:
    """fsync every file under `folder`, and the folders."""
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    _each([*files_in(folder), *folders, folder], os.fsync)


def drop_cached(folder: Path) -> None:
    """Ask the system to forget the pages of every file under `folder` (posix_fadvise DONTNEED); fsync comes first."""

    def forget(descriptor: int) -> None:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    _each(files_in(folder), forget)


def _each(paths: Iterable[Path], work: Callable[[int], None]) -> None:
    def on(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            work(descriptor)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(on, paths))
