"""Reading parts of data files: what a plan says, block by block, each whole one checked before anything uses it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import FileDigest, digest_block
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.readplan import ReadPlan
from resume_kit.errors import CheckpointDamaged, Problem

#: Bytes from which memory is mapped on its own.
_LARGE = 1 << 20


@dataclass(frozen=True, slots=True)
class ReadAccount:
    """What a reading took. `verified_bytes` came in whole blocks, each checked against its digest.

    `unverified` are the ranges (file, start, stop) of the blocks of which only a part was read: whether that part is
    what was saved, the fingerprints of the tensors must tell.
    """

    wanted_bytes: int
    read_bytes: int
    verified_bytes: int
    unverified: tuple[tuple[str, int, int], ...]


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


def allocate(nbytes: int) -> memoryview:
    """Host memory, on pages of its own where it is large; it costs nothing until it is filled."""
    if nbytes < _LARGE:
        return np.empty(nbytes, np.uint8).data
    # np.empty would ask for huge pages: up to 3 times slower to fill where the host has yet to back them, as in a VM
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def carry_out(plan: ReadPlan, directory: Path, buffers: Sequence[memoryview]) -> ReadAccount:
    """Fill `buffers`, the targets of the plan's transfers, through memory for one block.

    Raises `CheckpointDamaged` naming the file and the byte range of the first bad block.
    """
    memory = allocate(plan.window_bytes)
    read_bytes = verified_bytes = 0
    unverified: list[tuple[str, int, int]] = []
    for number, source in enumerate(plan.sources):
        path, partly = directory / source.file, set[int]()
        with _opened(path) as descriptor:
            for window in plan.windows(number):
                reads: list[tuple[int, int]] = window.reads.tolist()
                _announce(descriptor, window.block is not None, reads)
                _read_exactly(descriptor, memory, window.start, reads, path)
                read_bytes += sum(stop - start for start, stop in reads)
                if window.block is None:
                    partly.add(window.start // source.digests.block_bytes)
                else:
                    verified_bytes += window.stop - window.start
                    _check(memory[: window.stop - window.start], window.block, source.digests, path)
                for transfer in window.transfers:
                    transfer.move(memory, window.start, buffers[transfer.target])
        unverified += [(source.file, start, stop) for start, stop in source.digests.runs(partly)]
    return ReadAccount(plan.wanted_bytes, read_bytes, verified_bytes, tuple(unverified))


def check_ranges(path: Path, digests: FileDigest, ranges: Iterable[tuple[int, int]], *, cached: bool = True) -> None:
    """Read the blocks that hold byte `ranges` of a data file, checking each block's digest, and keep nothing.

    Raises `CheckpointDamaged` with all bad blocks by file and byte range. Unless `cached`, what the page cache holds
    of these blocks is dropped first, so that what is checked comes from the disk.
    """
    problems: list[Problem] = []
    with _opened(path) as descriptor:
        memory = allocate(min(digests.block_bytes, digests.size))
        for block in digests.touched(ranges):
            start, stop = digests.span(block)
            if not cached:
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
            try:
                _read_exactly(descriptor, memory, start, [(start, stop)], path)
                _check(memory[: stop - start], block, digests, path)
            except CheckpointDamaged as damage:
                problems += damage.problems
    if problems:
        raise CheckpointDamaged(f"{path.name} is damaged", dict.fromkeys(problems))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise canonical.damaged(path, f"cannot be opened: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _announce(descriptor: int, whole: bool, reads: Sequence[tuple[int, int]]) -> None:
    """Tell the kernel what comes next, so that it reads that, all of it at once, and nothing else."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL if whole else os.POSIX_FADV_RANDOM)
    if len(reads) > 1:  # 98,000 runs of 0.5 to 2 KiB from a cold disk: 1.4 s so, 6 s without
        for start, stop in reads:
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def _check(memory: memoryview, block: int, digests: FileDigest, path: Path) -> None:
    if digest_block(memory) != digests.blocks[block]:
        start, stop = digests.span(block)
        raise canonical.damaged(path, f"the content of bytes {start:,}..{stop:,} is not what was saved")


def _read_exactly(
    descriptor: int, memory: memoryview, origin: int, reads: Iterable[tuple[int, int]], path: Path
) -> None:
    """Bytes [start, stop) of the file for each of `reads`, to where they belong in `memory`, which begins at `origin`.

    One call a run: 1 µs, so runs of 1 KiB still come at 1 GB/s. A preadv over the gaps as well, into a spare buffer,
    takes a quarter of that, but reads them.
    """
    for start, stop in reads:
        at = start
        while at < stop:
            try:
                count = os.preadv(descriptor, (memory[at - origin : stop - origin],), at)
            except OSError as error:
                raise canonical.damaged(path, f"read failed at byte {at:,}: {error.strerror}") from error
            if count == 0:
                raise canonical.damaged(path, f"truncated: it ends at byte {os.fstat(descriptor).st_size:,}")
            at += count
