"""Indices and data files of a checkpoint against its manifest, and blocks against their digests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.datafile import DataFile, Way
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.pages import allocate, whole_pages
from resume_kit.checkpoint.sharing import Shared, default_readers, share_out
from resume_kit.errors import CheckpointDamaged


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
        what = "the file is missing" if missing else f"cannot be read: {error.strerror}"
        raise canonical.unread(path, error, what) from None
    stated = manifest.ranks[rank].data_bytes
    if size != stated:
        what = "truncated" if size < stated else "too long"
        raise canonical.damaged(path, f"{what}: it has {size:,} bytes, the manifest says {stated:,}")


def check_ranges(
    path: Path,
    digests: FileDigest,
    ranges: Iterable[tuple[int, int]],
    *,
    way: Way = "cache",
    on_block: Callable[[int], None] = lambda _size: None,
) -> None:
    """Read the blocks that hold byte `ranges` of a data file, checking each block's digest, and keep nothing.

    `on_block` is called with the size of each block when it was read. Raises `CheckpointDamaged` with all bad blocks
    by file and byte range.
    """
    damage: dict[int, CheckpointDamaged] = {}

    def check(blocks: Shared[int]) -> None:
        memory = allocate(whole_pages(min(digests.block_bytes, digests.size)))
        with DataFile(path) as file:
            for block in blocks:
                try:
                    file.read_block(memory, block, digests, way)
                except CheckpointDamaged as error:
                    damage[block] = error
                start, stop = digests.span(block)
                on_block(stop - start)

    blocks = digests.touched(ranges)
    share_out(blocks, check, max(1, min(default_readers(), len(blocks))))
    if damage:
        problems = [problem for block in sorted(damage) for problem in damage[block].problems]
        raise CheckpointDamaged(f"{path.name} is damaged", dict.fromkeys(problems))
