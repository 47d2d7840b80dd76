"""Reading parts of data files: whole blocks, each checked against its digest before anything uses it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import FileDigest, block_runs, first_bad_block
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import Manifest


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Checked bytes of one file: runs of [start, stop) with their memory."""

    runs: tuple[tuple[int, int, memoryview], ...]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The `nbytes` at absolute file `offset`; they lie in one run. KeyError when they were not read."""
        for start, stop, memory in self.runs:
            if start <= offset and offset + nbytes <= stop:
                return memory[offset - start : offset - start + nbytes]
        raise KeyError(f"bytes {offset}..{offset + nbytes} were not read")


def read_index(directory: Path, manifest: Manifest, rank: int) -> RankIndex:
    """The index of `rank`, checked against the manifest. Raises `CheckpointDamaged`."""
    path = directory / names.index_file(rank)
    raw = canonical.read_bytes(path)
    entry = manifest.ranks[rank]
    if len(raw) != entry.index_bytes:
        raise canonical.damaged(path, f"it has {len(raw)} bytes, the manifest says {entry.index_bytes}")
    if canonical.digest(raw) != entry.index_digest:
        raise canonical.damaged(path, "its digest is not the one in the manifest (changed, or another rank's file)")
    index = parse_index(raw, path)
    if (index.step, index.rank, index.run_id, index.attempt) != (
        manifest.step,
        rank,
        manifest.run_id,
        manifest.attempt,
    ):
        raise canonical.damaged(
            path, f"it belongs to run {index.run_id} step {index.step} rank {index.rank}", "put back the right file"
        )
    return index


def check_data_file(directory: Path, manifest: Manifest, rank: int) -> None:
    """Existence and size of a rank's data file, without reading it. Raises `CheckpointDamaged`."""
    path = directory / names.data_file(rank)
    try:
        size = path.stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise canonical.damaged(
            path, "the file is missing" if missing else f"cannot be read: {error.strerror}"
        ) from None
    stated = manifest.ranks[rank].data_bytes
    if size != stated:
        what = "truncated" if size < stated else "too long"
        raise canonical.damaged(path, f"{what}: it has {size:,} bytes, the manifest says {stated:,}")


def read_ranges(path: Path, digests: FileDigest, ranges: Iterable[tuple[int, int]]) -> FileBytes:
    """Read the blocks that hold byte `ranges` of a data file, checking each block's digest.

    Raises `CheckpointDamaged` naming the file and the first bad block's byte range.
    """
    runs = []
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise canonical.damaged(path, f"cannot be opened: {error.strerror}") from None
    try:
        for first, last in block_runs(ranges, digests):
            start, stop = digests.span(first)[0], digests.span(last - 1)[1]
            memory = memoryview(mmap.mmap(-1, stop - start))
            _read_exactly(descriptor, memory, start, path)
            bad = first_bad_block(memory, first, digests)
            if bad is not None:
                lo, hi = digests.span(bad)
                raise canonical.damaged(path, f"the content of bytes {lo:,}..{hi:,} is not what was saved")
            runs.append((start, stop, memory))
    finally:
        os.close(descriptor)
    return FileBytes(tuple(runs))


def _read_exactly(descriptor: int, memory: memoryview, start: int, path: Path) -> None:
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(descriptor, [memory[done:]], start + done)
        except OSError as error:
            raise canonical.damaged(path, f"read failed at byte {start + done:,}: {error.strerror}") from error
        if count == 0:
            raise canonical.damaged(path, f"truncated: it ends at byte {start + done:,}")
        done += count
