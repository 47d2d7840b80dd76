"""Block digests: which blocks hold what is wanted, and that each digest is that of its own block."""

from __future__ import annotations

from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.checkpoint.blocks import FileDigest, digest_image, spans

IMAGE = bytes(range(256)) * 3 + b"tail"  # 772 bytes


@st.composite
def wanted(draw: st.DrawFn) -> tuple[FileDigest, list[tuple[int, int]]]:
    size, block = draw(st.integers(1, 400)), draw(st.integers(1, 60))
    pairs = draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=12))
    return FileDigest(size, block, ("",) * -(-size // block)), [(min(p), max(p)) for p in pairs]


@given(wanted())
def test_touched_blocks_are_those_that_hold_a_byte_of_a_range(case: tuple[FileDigest, list[tuple[int, int]]]) -> None:
    digests, ranges = case
    expected = {byte // digests.block_bytes for start, stop in ranges for byte in range(start, stop)}
    assert digests.touched(ranges) == sorted(expected)


@given(wanted())
def test_runs_of_blocks_hold_exactly_them_and_are_apart(case: tuple[FileDigest, list[tuple[int, int]]]) -> None:
    digests, ranges = case
    blocks = digests.touched(ranges)
    runs = digests.runs([*reversed(blocks), *blocks])
    expected = [byte for block in blocks for byte in range(*digests.span(block))]
    assert [byte for start, stop in runs for byte in range(start, stop)] == expected
    assert all(before[1] < after[0] for before, after in pairwise(runs))


def test_empty_ranges_touch_no_block() -> None:
    digests = digest_image(memoryview(IMAGE), 64)
    assert digests.touched([(5, 5), (0, 0)]) == [] and digests.runs([]) == []


@given(st.integers(0, 1000), st.integers(1, 100))
def test_spans_tile_the_file_and_agree_with_the_digest(size: int, block: int) -> None:
    tiles = list(spans(size, block))
    assert [byte for start, stop in tiles for byte in range(start, stop)] == list(range(size))
    assert all(stop - start == block for start, stop in tiles[:-1])
    digests = FileDigest(size, block, ("",) * len(tiles))
    assert [digests.span(number) for number in range(len(tiles))] == tiles


def test_digests_are_those_of_the_blocks() -> None:
    digests = digest_image(memoryview(IMAGE), 100)
    assert digests.size == len(IMAGE) == 772 and digests.block_bytes == 100 and len(digests.blocks) == 8
    assert digests.blocks[7] == xxhash.xxh3_128_hexdigest(IMAGE[700:])
    assert digest_image(memoryview(b""), 100).blocks == ()


@pytest.mark.parametrize("other", [IMAGE[:-1], IMAGE + b"\0", IMAGE[100:] + IMAGE[:100], b""])
def test_another_image_has_another_digest(other: bytes) -> None:
    assert digest_image(memoryview(other), 100).whole != digest_image(memoryview(IMAGE), 100).whole


def test_every_flipped_byte_changes_the_digest_of_its_block_and_no_other() -> None:
    digests = digest_image(memoryview(IMAGE), 64)
    for position in range(len(IMAGE)):
        changed = bytearray(IMAGE)
        changed[position] ^= 1
        found = digest_image(memoryview(changed), 64).blocks
        assert [a != b for a, b in zip(found, digests.blocks, strict=True)].index(True) == position // 64
        assert sum(a != b for a, b in zip(found, digests.blocks, strict=True)) == 1
