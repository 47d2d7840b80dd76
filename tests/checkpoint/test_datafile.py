"""One open data file: the same bytes from the page cache, past it, and where neither can be told apart."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from resume_kit.checkpoint import datafile
from resume_kit.checkpoint.blocks import FileDigest, digest_image
from resume_kit.checkpoint.datafile import DataFile, Way
from resume_kit.checkpoint.pages import PAGE, allocate, whole_pages
from resume_kit.errors import CheckpointDamaged
from tests.checkpoints import flip

BLOCK = 2 << 20
TAIL = (1 << 20) + 1234
IMAGE = np.random.default_rng(3).integers(0, 256, 2 * BLOCK + TAIL, np.uint8).tobytes()
DIGESTS = digest_image(memoryview(IMAGE), BLOCK)

WAYS: tuple[Way, ...] = get_args(Way)

Preadv = Callable[..., int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rank-00000.safetensors"
    with path.open("wb") as file:
        file.write(IMAGE)
        os.fsync(file.fileno())
    return path


def drop(path: Path) -> None:
    """Take the file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def is_direct(descriptor: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


class Calls:
    """Stands in for os.preadv: counts bytes by the way that they came, and fails or falls short where told to."""

    def __init__(self, *, direct_error: int = 0, nowait: bool | int = True, most: int = 1 << 30) -> None:
        self._real: Preadv = os.preadv
        self._direct_error, self._nowait, self._most = direct_error, nowait, most
        self.direct = self.buffered = 0

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            if self._nowait is True:
                return self._real(descriptor, buffers, offset)  # all is in the cache
            raise OSError(self._nowait or errno.EAGAIN, "not at once")
        direct = is_direct(descriptor)
        if direct and self._direct_error:
            raise OSError(self._direct_error, os.strerror(self._direct_error))
        count = self._real(descriptor, [buffers[0][: self._most]], offset)
        if direct:
            self.direct += count
        else:
            self.buffered += count
        return count


def read_all(path: Path, way: Way = "fastest") -> bytes:
    memory, found = allocate(whole_pages(BLOCK)), b""
    with DataFile(path) as file:
        for block in range(3):
            file.read_block(memory, block, DIGESTS, way)
            start, stop = DIGESTS.span(block)
            found += bytes(memory[: stop - start])
    return found


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_all_blocks_arrive_the_short_last_one_too(path: Path, cold: bool, way: Way) -> None:
    if cold:
        drop(path)
    assert read_all(path, way) == IMAGE


@pytest.mark.parametrize(
    ("calls", "way", "direct"),
    [
        ({"nowait": True}, "fastest", False),
        ({"nowait": False}, "cache", False),
        ({"nowait": True}, "disk", True),
        ({"nowait": False}, "fastest", True),
        ({"nowait": errno.EOPNOTSUPP}, "fastest", False),
        ({"nowait": False, "direct_error": errno.EINVAL}, "fastest", False),
        ({"nowait": False, "direct_error": errno.EIO}, "fastest", False),
        ({"nowait": False, "most": 64 << 10}, "fastest", True),
    ],
)  # fmt: skip
def test_where_the_bytes_come_from(
    calls: dict[str, Any], way: Way, direct: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the page cache if they are there, else past it; through it where there is no way past."""
    counted = Calls(**calls)
    monkeypatch.setattr("os.preadv", counted)
    assert read_all(path, way) == IMAGE
    ways = (counted.direct, counted.buffered)
    assert ways == ((len(IMAGE), 0) if direct else (0, len(IMAGE)))


def test_a_direct_read_that_ends_inside_a_page_goes_on_through_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Calls(nowait=False, most=PAGE + 100)
    monkeypatch.setattr("os.preadv", counted)
    assert read_all(path) == IMAGE


def test_a_file_system_that_cannot_be_read_directly_is_read_through_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, command: int, flags: int) -> int:
        assert (command, flags) == (fcntl.F_SETFL, os.O_DIRECT)
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    counted = Calls(nowait=False)
    monkeypatch.setattr("fcntl.fcntl", refuse)
    monkeypatch.setattr("os.preadv", counted)
    assert read_all(path) == IMAGE and counted.buffered == len(IMAGE)


@pytest.mark.parametrize(("room", "direct"), [(BLOCK - 100, 0), (BLOCK, BLOCK)])
def test_blocks_that_begin_inside_a_page_and_memory_without_room_go_through_the_page_cache(
    room: int, direct: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these blocks only the first begins on a page; read directly, it comes to the end of its last page."""
    digests = digest_image(memoryview(IMAGE), BLOCK - 100)
    counted = Calls(nowait=False)
    monkeypatch.setattr("os.preadv", counted)
    with DataFile(path) as file:
        for block in range(len(digests.blocks)):
            file.read_block(allocate(room)[:room], block, digests)
    assert (counted.direct, counted.buffered) == (direct, len(IMAGE) - (direct and BLOCK - 100))


@pytest.mark.parametrize("way", WAYS)
def test_a_flipped_bit_is_named_whichever_way_it_comes(way: Way, path: Path) -> None:
    flip(path, BLOCK + 17, 3)
    drop(path)
    memory = allocate(BLOCK)
    with DataFile(path) as file:
        file.read_block(memory, 0, DIGESTS, way)
        with pytest.raises(CheckpointDamaged, match=rf"bytes {BLOCK:,}\.\.{2 * BLOCK:,} is not what was saved"):
            file.read_block(memory, 1, DIGESTS, way)


@pytest.mark.parametrize("size", [0, 100, BLOCK + PAGE, BLOCK + PAGE + 1])
def test_a_truncated_file_is_named_with_its_end(size: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(path, size)
    for nowait in (True, False):
        monkeypatch.setattr("os.preadv", Calls(nowait=nowait))
        with pytest.raises(CheckpointDamaged, match=f"truncated: it ends at byte {size:,}"):
            read_all(path)


@pytest.fixture(params=[True, False])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C extension, where it is built, and as without it."""
    if request.param and not datafile.RUNS_AT_ONCE:
        pytest.skip("the C extension was not built (no compiler?)")
    monkeypatch.setattr(datafile, "RUNS_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("runs", [[], [(700, 701)], [(1000, 1010), (5000, 9000), (9001, 9002)]])
def test_runs_come_to_their_places_and_nothing_else_changes(
    runs: list[tuple[int, int]], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nowait in (True, False, errno.EOPNOTSUPP):
        monkeypatch.setattr("os.preadv", Calls(nowait=nowait))
        memory = allocate(10_000)
        memory[:] = bytes(10_000)
        with DataFile(path) as file:
            file.read_runs(memory, 500, rows(runs))
        expected = bytearray(10_000)
        for start, stop in runs:
            expected[start - 500 : stop - 500] = IMAGE[start:stop]
        assert memory == expected


def rows(runs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(runs, np.int64).reshape(-1, 2)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("size", [0, 1005, 5000, 9001])
def test_runs_beyond_the_end_of_a_file_are_named(size: int, path: Path) -> None:
    os.truncate(path, size)
    memory = memoryview(bytearray(10_000))
    with DataFile(path) as file, pytest.raises(CheckpointDamaged, match=f"truncated: it ends at byte {size:,}"):
        file.read_runs(memory, 500, rows([(1000, 1010), (5000, 9000), (9001, 9002)]))
    assert bytes(memory[500:510]) == (IMAGE[1000:1010] if size > 1010 else IMAGE[1000:size].ljust(10, b"\0"))


@pytest.mark.usefixtures("at_once")
def test_runs_that_cannot_be_read_are_named() -> None:
    nothing = Path("/proc/self/mem")  # at its beginning, that is
    with DataFile(nothing) as file, pytest.raises(CheckpointDamaged, match="failed at byte 3: Input/output error"):
        file.read_runs(allocate(10), 0, rows([(3, 5), (7, 9)]))


@pytest.mark.skipif(not datafile.RUNS_AT_ONCE, reason="the C extension was not built (no compiler?)")
@pytest.mark.parametrize(("run", "origin"), [((10, 21), 10), ((9, 12), 10), ((-5, 3), 0)])
def test_the_extension_writes_nothing_outside_the_memory(run: tuple[int, int], origin: int, path: Path) -> None:
    memory = bytearray(12)
    with path.open("rb") as file:
        runs = rows([(10, 12), run, (12, 13)])
        assert datafile._runs.read_runs(file.fileno(), memoryview(memory)[1:11], origin, runs, True) == (origin == 10)
    assert memory == (bytes(1) + IMAGE[10:12] if origin == 10 else b"").ljust(12, b"\0")


def test_the_page_that_is_asked_for_is_inside_the_range(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def note(_descriptor: int, _buffers: Any, offset: int, _flags: int = 0) -> int:
        asked.add(offset)
        raise BlockingIOError

    monkeypatch.setattr("os.preadv", note)
    with DataFile(path) as file:
        for _ in range(500):
            assert not file.in_page_cache(10, 10 + PAGE * 3 + 1)
            assert not file.in_page_cache(10, 11)
    assert asked == {10, 10 + PAGE, 10 + 2 * PAGE, 10 + 3 * PAGE}


@pytest.mark.parametrize("nbytes", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (3 << 20) + 1])
def test_memory_is_of_the_asked_size_and_large_memory_starts_on_a_page(nbytes: int) -> None:
    memory = allocate(nbytes)
    assert (memory.nbytes, memory.itemsize, memory.readonly) == (nbytes, 1, False)
    if nbytes >= 1 << 20:
        assert np.frombuffer(memory, np.uint8).ctypes.data % PAGE == 0
    assert nbytes <= whole_pages(nbytes) < nbytes + PAGE and whole_pages(nbytes) % PAGE == 0


def test_portions_of_any_size_give_the_same_digest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for portion in (1000, PAGE, BLOCK, 16 << 20):
        monkeypatch.setattr(datafile, "PORTION", portion)
        assert read_all(path) == IMAGE


def test_an_empty_file_has_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with DataFile(tmp_path / "x") as file:
        file.read_runs(allocate(0), 0, rows([]))
    assert FileDigest(0, BLOCK, ()).runs([]) == []
