"""Content digests of a data file, block by block, so that a reader of a part can check that part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    def touched(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """The blocks that hold any byte of `ranges`, in file order, each once."""
        size = self.block_bytes
        return sorted({block for lo, hi in ranges if lo < hi for block in range(lo // size, -(-hi // size))})

    def runs(self, blocks: Iterable[int]) -> list[tuple[int, int]]:
        """The fewest byte ranges that hold exactly `blocks`, in file order."""
        found: list[tuple[int, int]] = []
        for start, stop in map(self.span, sorted(set(blocks))):
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, stop))
        return found


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
