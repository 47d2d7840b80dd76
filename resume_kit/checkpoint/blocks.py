"""Content digests of a data file, block by block, so that a reader of a part can check that part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and XXH3-128 block digests of one file; the last block may be short."""

    size: int
    block_bytes: int
    blocks: tuple[str, ...]

    @property
    def whole(self) -> str:
        """One digest for the file: that of its block digests in order."""
        return xxhash.xxh3_128_hexdigest("".join(self.blocks).encode("ascii"))

    def span(self, block: int) -> tuple[int, int]:
        """Byte range [start, stop) of a block."""
        start = block * self.block_bytes
        return start, min(start + self.block_bytes, self.size)


def digest_block(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def spans(size: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Byte ranges of the blocks of a file of `size` bytes."""
    for start in range(0, size, block_bytes):
        yield start, min(start + block_bytes, size)


def digest_image(image: memoryview, block_bytes: int = BLOCK_BYTES) -> FileDigest:
    """The digests of a file image that lies in memory."""
    blocks = tuple(digest_block(image[start:stop]) for start, stop in spans(len(image), block_bytes))
    return FileDigest(len(image), block_bytes, blocks)


def block_runs(ranges: Iterable[tuple[int, int]], digests: FileDigest) -> list[tuple[int, int]]:
    """The fewest runs [first, last) of whole blocks that hold all byte `ranges`, in file order."""
    size = digests.block_bytes
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        first, last = start // size, -(-stop // size)
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], last))
        else:
            runs.append((first, last))
    return runs


def first_bad_block(image: memoryview, first: int, digests: FileDigest) -> int | None:
    """Number of the first block of `image` (which starts at block `first`) whose digest is not the stated one."""
    stated: Sequence[str] = digests.blocks[first:]
    for number, (start, stop) in enumerate(spans(len(image), digests.block_bytes)):
        if digest_block(image[start:stop]) != stated[number]:
            return first + number
    return None
