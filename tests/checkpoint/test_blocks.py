"""Block digests: the fewest blocks that hold what is wanted, and the first bad one by number."""

from __future__ import annotations

from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.checkpoint.blocks import FileDigest, block_runs, digest_image, first_bad_block, spans

IMAGE = bytes(range(256)) * 3 + b"tail"  # 772 bytes


@st.composite
def wanted(draw: st.DrawFn) -> tuple[FileDigest, list[tuple[int, int]]]:
    size, block = draw(st.integers(1, 400)), draw(st.integers(1, 60))
    pairs = draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=12))
    return FileDigest(size, block, ("",) * -(-size // block)), [(min(p), max(p)) for p in pairs]


@given(wanted())
def test_runs_hold_exactly_the_blocks_that_ranges_touch(case: tuple[FileDigest, list[tuple[int, int]]]) -> None:
    digests, ranges = case
    runs = block_runs(ranges, digests)
    touched = {byte // digests.block_bytes for start, stop in ranges for byte in range(start, stop)}
    assert [block for first, last in runs for block in range(first, last)] == sorted(touched)
    assert all(first < last <= len(digests.blocks) for first, last in runs)


@given(wanted())
def test_runs_are_in_file_order_and_apart(case: tuple[FileDigest, list[tuple[int, int]]]) -> None:
    runs = block_runs(case[1], case[0])
    assert all(before[1] < after[0] for before, after in pairwise(runs))


@given(wanted())
def test_every_range_lies_within_one_run(case: tuple[FileDigest, list[tuple[int, int]]]) -> None:
    digests, ranges = case
    held = [(digests.span(first)[0], digests.span(last - 1)[1]) for first, last in block_runs(ranges, digests)]
    for start, stop in ranges:
        assert start == stop or sum(lo <= start and stop <= hi for lo, hi in held) == 1


def test_empty_ranges_want_no_block() -> None:
    assert block_runs([(5, 5), (0, 0)], digest_image(memoryview(IMAGE), 64)) == []


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


def test_every_flipped_byte_is_found_in_its_block() -> None:
    digests = digest_image(memoryview(IMAGE), 64)
    assert first_bad_block(memoryview(IMAGE), 0, digests) is None
    for position in range(len(IMAGE)):
        changed = bytearray(IMAGE)
        changed[position] ^= 1
        assert first_bad_block(memoryview(changed), 0, digests) == position // 64


@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 6), (12, 13), (11, 13)])
def test_a_run_from_the_middle_is_checked_against_its_own_blocks(first: int, last: int) -> None:
    digests = digest_image(memoryview(IMAGE), 64)
    start, stop = digests.span(first)[0], digests.span(last - 1)[1]
    run = bytearray(IMAGE[start:stop])
    assert first_bad_block(memoryview(run), first, digests) is None
    run[-1] ^= 128
    assert first_bad_block(memoryview(run), first, digests) == last - 1
    run[0] ^= 128
    assert first_bad_block(memoryview(run), first, digests) == first
