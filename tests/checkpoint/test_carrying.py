"""Carrying out a read plan: what it says arrives, in any number of threads, and every fault is named."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from resume_kit.checkpoint import readplan
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.carrying import ReadAccount, carry_out, reader_count
from resume_kit.checkpoint.destination import HostMemory, Lane
from resume_kit.checkpoint.readplan import ReadPlan, Source, Window, plan_reads
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.errors import CheckpointDamaged
from tests.checkpoints import flip

IMAGE = bytes((7 * i + i // 256) % 256 for i in range(1000))
BLOCK = 64
DIGESTS = digest_image(memoryview(IMAGE), BLOCK)


@pytest.fixture(autouse=True)
def page_of_one_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or these small blocks would all be read whole."""
    monkeypatch.setattr(readplan, "PAGE", 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rank-00003.safetensors"
    path.write_bytes(IMAGE)
    return path


def wanted(*ranges: tuple[int, int], stored: int = 1000) -> tuple[ReadPlan, list[memoryview]]:
    """A plan that reads each range into a buffer of its own, and the buffers."""
    transfers = tuple(Transfer(start, number, 0, stop - start) for number, (start, stop) in enumerate(ranges))
    buffers = [memoryview(bytearray(stop - start)) for start, stop in ranges]
    return plan_reads([Source("rank-00003.safetensors", DIGESTS, stored, transfers)]), buffers


def test_wanted_bytes_are_those_of_the_file_and_all_are_accounted_for(data: Path) -> None:
    ranges = [(64, 256), (300, 310), (500, 500 + 3), (640, 704)]
    plan, buffers = wanted(*ranges)
    account = carry_out(plan, data.parent, HostMemory(buffers))
    assert [bytes(buffer) for buffer in buffers] == [IMAGE[start:stop] for start, stop in ranges]
    assert account == ReadAccount(
        wanted_bytes=269,
        read_bytes=269,
        verified_bytes=256,
        unverified=(("rank-00003.safetensors", 256, 320), ("rank-00003.safetensors", 448, 512)),
    )


def test_neighbours_that_were_read_in_part_are_one_range(data: Path) -> None:
    plan, buffers = wanted((40, 80), (140, 150))
    assert carry_out(plan, data.parent, HostMemory(buffers)).unverified == (("rank-00003.safetensors", 0, 192),)


@pytest.mark.parametrize("position", [0, 63, 64, 500, 999])
def test_a_flipped_bit_is_seen_by_who_reads_its_block_whole_and_by_nobody_else(position: int, data: Path) -> None:
    flip(data, position, 5)
    start, stop = DIGESTS.span(position // BLOCK)
    named = rf"rank-00003\.safetensors: the content of bytes {start:,}\.\.{stop:,} is not what was saved"
    plan, buffers = wanted((start, stop))
    with pytest.raises(CheckpointDamaged, match=named):
        carry_out(plan, data.parent, HostMemory(buffers))
    others = [(lo, hi) for lo, hi in [(0, start), (stop, 1000)] if lo < hi]
    plan, buffers = wanted(*others, stored=10_000)
    account = carry_out(plan, data.parent, HostMemory(buffers))
    assert account.verified_bytes == 1000 - (stop - start) and not account.unverified


def test_nothing_of_a_bad_block_is_passed_on(data: Path) -> None:
    flip(data, 70, 0)
    plan, buffers = wanted((0, 64), (64, 128))
    with pytest.raises(CheckpointDamaged):
        carry_out(plan, data.parent, HostMemory(buffers))
    assert bytes(buffers[0]) == IMAGE[:64] and bytes(buffers[1]) == bytes(64)


def test_a_flipped_bit_in_a_block_that_is_read_in_part_is_passed_on(data: Path) -> None:
    """That is why the account names the block: digests cannot tell, fingerprints will."""
    flip(data, 70, 0)
    plan, buffers = wanted((70, 72))
    account = carry_out(plan, data.parent, HostMemory(buffers))
    assert bytes(buffers[0]) == bytes([IMAGE[70] ^ 1, IMAGE[71]])
    assert account.verified_bytes == 0 and account.unverified == (("rank-00003.safetensors", 64, 128),)


@pytest.mark.parametrize("size", [0, 63, 500, 999])
@pytest.mark.parametrize("ranges", [[(0, 1000)], [(3, 7), (700, 730), (990, 1000)]])
def test_a_truncated_file_is_named_with_its_end(size: int, ranges: list[tuple[int, int]], data: Path) -> None:
    os.truncate(data, size)
    plan, buffers = wanted(*ranges)
    with pytest.raises(CheckpointDamaged, match=f"truncated: it ends at byte {size}"):
        carry_out(plan, data.parent, HostMemory(buffers))


def test_a_file_that_cannot_be_opened_or_read_is_named(tmp_path: Path) -> None:
    plan, buffers = wanted((64, 65))
    with pytest.raises(CheckpointDamaged, match=r"rank-00003\.safetensors: cannot be opened: No such file"):
        carry_out(plan, tmp_path, HostMemory(buffers))
    path = tmp_path / "rank-00003.safetensors"
    path.mkdir()
    with pytest.raises(CheckpointDamaged, match="cannot be opened: Is a directory"):
        carry_out(plan, tmp_path, HostMemory(buffers))
    path.rmdir()
    path.symlink_to("/proc/self/mem")  # no memory is there
    with pytest.raises(CheckpointDamaged, match="read failed at byte 64: Input/output error"):
        carry_out(plan, tmp_path, HostMemory(buffers))


def test_no_descriptor_is_left_open_by_a_failure(data: Path) -> None:
    flip(data, 0, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        plan, buffers = wanted((0, 64))
        with pytest.raises(CheckpointDamaged):
            carry_out(plan, data.parent, HostMemory(buffers))
    assert len(os.listdir("/proc/self/fd")) == before


# -- in several threads

FILES = [f"rank-{number:05d}.safetensors" for number in range(3)]


def many_files(directory: Path, *, most: int = 40_000) -> tuple[ReadPlan, HostMemory, list[memoryview], list[bytes]]:
    """Three files of many blocks, of which whole blocks, runs and grids are wanted: plan, targets, and what to find."""
    generator = np.random.default_rng(4)
    sources, buffers, expected = [], list[memoryview](), list[bytes]()
    for name in FILES:
        image = generator.integers(0, 256, most, np.uint8).tobytes()
        (directory / name).write_bytes(image)
        transfers = [Transfer(128, len(buffers), 0, 9_000), Transfer(10_000, len(buffers) + 1, 3, 17)]
        expected += [image[128:9_128], bytes(3) + image[10_000:10_017]]
        rows = np.frombuffer(image, np.uint8)[12_000:32_000].reshape(100, 200)[:, :50]
        transfers.append(Transfer(12_000, len(buffers) + 2, 0, 50, ((100, 200, 50),)))
        expected.append(rows.tobytes())
        buffers += [memoryview(bytearray(len(data))) for data in expected[-3:]]
        sources.append(Source(name, digest_image(memoryview(image), 512), most, tuple(transfers)))
    return plan_reads(sources), HostMemory(buffers), buffers, expected


@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_any_number_of_threads_brings_the_same_bytes_and_account(readers: int, tmp_path: Path) -> None:
    plan, _, buffers, expected = many_files(tmp_path)
    names = set()

    class Noting(HostMemory):
        @contextmanager
        def lane(self, nbytes: int) -> Iterator[Lane]:
            names.add(threading.current_thread().name)
            with super().lane(nbytes) as lane:
                yield lane

    account = carry_out(plan, tmp_path, Noting(buffers), readers=readers)
    assert [bytes(buffer) for buffer in buffers] == expected
    assert len(names) == readers
    assert account == carry_out(plan, tmp_path, HostMemory(buffers), readers=1)
    assert account.verified_bytes > 0 and len(account.unverified) > 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.mark.parametrize("readers", [1, 2, 8])
def test_the_first_bad_block_by_file_and_offset_is_always_named(readers: int, tmp_path: Path) -> None:
    plan, target, _, _ = many_files(tmp_path)
    for name, position in [(FILES[2], 200), (FILES[1], 8_000), (FILES[1], 700), (FILES[1], 1_300)]:
        flip(tmp_path / name, position, 1)
    for _ in range(20):
        with pytest.raises(CheckpointDamaged) as caught:
            carry_out(plan, tmp_path, target, readers=readers)
        first = caught.value.problems[0]
        assert first.where.endswith(FILES[1]) and "bytes 512..1,024" in first.what
        assert len(caught.value.problems) <= readers


def test_damage_stops_all_threads_soon(tmp_path: Path) -> None:
    plan, _, buffers, _ = many_files(tmp_path)
    flip(tmp_path / FILES[0], 600, 1)
    taken: list[Window] = []

    class Slow(HostMemory):
        @contextmanager
        def lane(self, nbytes: int) -> Iterator[Lane]:
            with super().lane(nbytes) as lane:
                yield SlowLane(lane)

    class SlowLane:
        def __init__(self, lane: Lane) -> None:
            self._lane = lane

        def memory(self) -> memoryview:
            return self._lane.memory()

        def take(self, memory: memoryview, window: Window) -> None:
            time.sleep(0.05)
            taken.append(window)

        def wait(self) -> None:
            self._lane.wait()

    with pytest.raises(CheckpointDamaged):
        carry_out(plan, tmp_path, Slow(buffers), readers=4)
    assert len(taken) < sum(1 for number in range(3) for _ in plan.windows(number)) / 2


def test_an_error_of_the_destination_is_raised_as_it_is(tmp_path: Path) -> None:
    plan, _, buffers, _ = many_files(tmp_path)

    class Broken(HostMemory):
        @contextmanager
        def lane(self, nbytes: int) -> Iterator[Lane]:
            if threading.current_thread() is not threading.main_thread():
                raise MemoryError("no pinned memory")
            with super().lane(nbytes) as lane:
                yield lane

    with pytest.raises(MemoryError, match="no pinned memory"):
        carry_out(plan, tmp_path, Broken(buffers), readers=3)


def test_small_readings_start_no_more_threads_than_they_have_windows() -> None:
    plan, _ = wanted((0, 100))
    assert plan.window_bytes == 64 and plan.wanted_bytes == 100
    assert [reader_count(100, 64, most) for most in (1, 2, 8)] == [1, 2, 2] and reader_count(0, 0, 8) == 1
