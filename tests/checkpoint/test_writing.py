"""A data file written block by block: whatever the order, the memory, the file system and the failure."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from resume_kit.checkpoint import blocks, filesystems, writing
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.writing import ImageFile
from resume_kit.errors import SaveFailed

BLOCK = 16384
PAGE = 4096
SIZES = [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK - PAGE, 5 * BLOCK + 2 * PAGE + 77]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(writing, "spans", lambda size: blocks.spans(size, BLOCK))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Whatever happens to a file, its threads and its descriptors are gone in the end."""
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def page_aligned(size: int) -> memoryview:
    """Random bytes that begin at a page."""
    view = memoryview(mmap.mmap(-1, max(1, size)))[:size]
    view[:] = os.urandom(size)
    return view


class Writing:
    """An image on its way to a file; counts which blocks were freed."""

    def __init__(self, path: Path, image: memoryview, **options: Any) -> None:
        self.image = image
        self.freed: Counter[int] = Counter()
        self.file = ImageFile(path, len(image), **options)
        self.numbers = list(range(-(-len(image) // BLOCK)))

    def submit(self, number: int) -> None:
        part = self.image[number * BLOCK : (number + 1) * BLOCK]
        self.file.submit(number, part, lambda: self.freed.update([number]))

    def submit_all(self, seed: int = 0) -> None:
        for number in random.Random(seed).sample(self.numbers, len(self.numbers)):
            self.submit(number)

    @property
    def each_was_freed_once(self) -> bool:
        return self.freed == Counter(self.numbers)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """All writes from now on: (direct, offset, bytes)."""
    seen = []
    pwrite = os.pwrite

    def act(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append((is_direct(descriptor), offset, len(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", act)
    return seen


def require_direct(folder: Path) -> None:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder does not take O_DIRECT")


# -- what is written


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lead", [0, 64], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("writers", [None, 0, 1, 5])
def test_the_file_is_the_image_in_whatever_order_it_comes(
    size: int, lead: int, writers: int | None, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(b"a longer file of that name" * 10_000)
    work = Writing(tmp_path / "x", page_aligned(size + lead)[lead:], writers=writers)
    work.submit_all(seed=size)
    digest = work.file.finish()
    assert (tmp_path / "x").read_bytes() == work.image
    assert digest == digest_image(work.image, BLOCK)
    assert work.each_was_freed_once


def test_whole_pages_of_aligned_memory_go_past_the_page_cache(
    writes: list[tuple[bool, int, int]], tmp_path: Path
) -> None:
    require_direct(tmp_path)
    size = 2 * BLOCK + 2 * PAGE + 77
    work = Writing(tmp_path / "x", page_aligned(size))
    work.submit_all()
    work.file.finish()
    assert sorted(writes) == [
        (False, size - 77, 77),
        (True, 0, BLOCK),
        (True, BLOCK, BLOCK),
        (True, 2 * BLOCK, 2 * PAGE),
    ]


@pytest.mark.parametrize(("lead", "size"), [(64, 3 * BLOCK), (0, BLOCK)], ids=["unaligned", "one block"])
def test_other_memory_and_small_files_go_through_it(
    lead: int, size: int, writes: list[tuple[bool, int, int]], tmp_path: Path
) -> None:
    work = Writing(tmp_path / "x", page_aligned(size + lead)[lead:])
    work.submit_all()
    work.file.finish()
    assert [direct for direct, _, _ in writes] == [False] * (size // BLOCK)


def test_a_file_is_fsynced_once_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "x").read_bytes()))
    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK))
    work.submit_all()
    work.file.finish()
    assert synced == [work.image]


def test_submit_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, disk = os.pwrite, threading.Event()
    monkeypatch.setattr(os, "pwrite", lambda *arguments: disk.wait(10) and pwrite(*arguments))
    work = Writing(tmp_path / "x", page_aligned(20 * BLOCK), writers=2)
    work.submit_all()
    assert not work.freed
    disk.set()
    work.file.finish()
    assert work.each_was_freed_once


# -- file systems


@pytest.mark.parametrize("most", [PAGE, 5000])
def test_short_writes_are_finished(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    # A direct write is cut at whole sectors; a cut anywhere leaves the rest of the block to the page cache.
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: most & -512], offset))
    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK + 777))
    work.submit_all()
    assert work.file.finish() == digest_image(work.image, BLOCK)
    assert (tmp_path / "x").read_bytes() == work.image


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK + 5))
    work.submit_all()
    assert work.file.finish() == digest_image(work.image, BLOCK)
    assert (tmp_path / "x").read_bytes() == work.image


@pytest.mark.parametrize("mount", ["tmpfs tmpfs", "ramfs none"])
def test_a_memory_file_system_gets_portions(mount: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "mounted_as", lambda *_: mount)
    monkeypatch.setattr(writing, "_PORTION", 1000)
    pwrite, sizes = os.pwrite, []

    def note(descriptor: int, data: memoryview, offset: int) -> int:
        assert not is_direct(descriptor)
        sizes.append(len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK + 5))
    work.submit_all()
    assert work.file.finish() == digest_image(work.image, BLOCK)
    assert (tmp_path / "x").read_bytes() == work.image
    assert max(sizes) == 1000 and sum(sizes) == len(work.image)


def test_a_file_system_that_wants_another_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_direct(tmp_path)
    pwrite, refused = os.pwrite, []

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    work = Writing(tmp_path / "x", page_aligned(9 * BLOCK), writers=1)
    work.submit_all()
    assert work.file.finish() == digest_image(work.image, BLOCK)
    assert (tmp_path / "x").read_bytes() == work.image
    assert len(refused) == 1, "asked once, not for every block"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK))
    work.submit_all()
    work.file.finish()
    assert (tmp_path / "x").read_bytes() == work.image


# -- failures


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Only the first two writes fit; the offsets of all that were tried."""
    pwrite, tried = os.pwrite, []

    def act(descriptor: int, data: memoryview, offset: int) -> int:
        tried.append(offset)
        if len(tried) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", act)
    return tried


@pytest.mark.parametrize("writers", [0, 1])
def test_after_a_failure_nothing_more_is_written_and_all_is_freed(
    writers: int, full_disk: list[int], tmp_path: Path
) -> None:
    work = Writing(tmp_path / "x", page_aligned(9 * BLOCK), writers=writers)
    work.submit_all()
    with pytest.raises(SaveFailed, match=r"no space left for 147,456 bytes \(No space left on device\)") as error:
        work.file.finish()
    assert error.value.problems[0].where == str(tmp_path / "x") and "keep_last" in error.value.problems[0].remedy
    assert len(full_disk) == 3
    assert work.each_was_freed_once
    work.file.abandon()


def test_a_file_may_be_abandoned_after_a_failure(full_disk: list[int], tmp_path: Path) -> None:
    work = Writing(tmp_path / "x", page_aligned(9 * BLOCK))
    for number in range(5):
        work.submit(number)
    work.file.abandon()
    assert work.freed == Counter(range(5))


def test_a_full_disk_is_known_before_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "major", lambda _: 8)  # as on a local disk
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SaveFailed, match="no space left for 65,536 bytes"):
        ImageFile(tmp_path / "x", 4 * BLOCK)


def test_a_limit_on_file_size_is_a_failed_save(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BLOCK, hard))
    try:
        with pytest.raises(SaveFailed, match=r"write failed \(File too large\)"):
            write_whole(tmp_path / "x", page_aligned(3 * BLOCK))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_whole(path: Path, image: memoryview) -> None:
    work = Writing(path, image)
    work.submit_all()
    work.file.finish()


def test_a_file_that_cannot_be_made_is_a_failed_save(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match=r"write failed \(No such file or directory\)"):
        ImageFile(tmp_path / "nowhere" / "x", 3 * BLOCK)


@pytest.mark.parametrize("name", ["fsync", "close"])
def test_an_error_at_the_end_is_a_failed_save(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act = getattr(os, name)

    def fail(descriptor: int) -> None:
        act(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK))
    work.submit_all()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(SaveFailed, match=r"write failed \(Input/output error\)"):
            work.file.finish()


def test_an_error_of_free_is_not_lost(tmp_path: Path) -> None:
    image = page_aligned(2 * BLOCK)
    file = ImageFile(tmp_path / "x", len(image))

    def fail() -> None:
        raise KeyError("slot")

    file.submit(0, image[:BLOCK], fail)
    file.submit(1, image[BLOCK:])
    with pytest.raises(KeyError, match="slot"):
        file.finish()


# -- the end of the threads


def test_an_abandoned_file_frees_what_waits_and_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing_now, disk, tried = threading.Event(), threading.Event(), []
    pwrite = os.pwrite

    def slow(*arguments: Any) -> int:
        tried.append(arguments[2])
        writing_now.set()
        assert disk.wait(10)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    work = Writing(tmp_path / "x", page_aligned(9 * BLOCK), writers=1)
    work.submit_all()
    assert writing_now.wait(10)
    threading.Timer(0.05, disk.set).start()
    work.file.abandon()
    assert len(tried) == 1 and work.each_was_freed_once
    work.file.abandon()


def test_a_block_that_waits_for_its_turn_is_not_written_once_the_file_is_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_direct(tmp_path)
    begun, disk, tried = threading.Semaphore(0), threading.Event(), []
    hash_of, pwrite = xxhash.xxh3_128, os.pwrite

    def count_hash() -> xxhash.xxh3_128:
        begun.release()
        return hash_of()

    def slow(*arguments: Any) -> int:
        tried.append(arguments[2])
        begun.release()
        assert disk.wait(10)
        return pwrite(*arguments)

    monkeypatch.setattr(xxhash, "xxh3_128", count_hash)
    monkeypatch.setattr(os, "pwrite", slow)
    work = Writing(tmp_path / "x", page_aligned(9 * BLOCK))
    work.submit_all()
    for _ in range(3 + 2):  # three are hashed, two of them written
        assert begun.acquire(timeout=10)
    ending = threading.Thread(target=work.file.abandon)
    ending.start()
    while not work.file._abandoned:
        time.sleep(0.001)
    disk.set()
    ending.join()
    assert len(tried) == 2 and work.each_was_freed_once


def test_misuse_is_told(tmp_path: Path) -> None:
    image = page_aligned(2 * BLOCK)
    file = ImageFile(tmp_path / "x", len(image))
    file.submit(0, image[:BLOCK])
    with pytest.raises(ValueError, match="lacks 1 blocks"):
        file.finish()
    for number, block in ((0, image[:BLOCK]), (1, image[: BLOCK - 1])):
        with pytest.raises(ValueError, match="of another size, twice or late"):
            file.submit(number, block)
    file.abandon()
    with pytest.raises(ValueError, match="late"):
        file.submit(1, image[BLOCK:])
    with pytest.raises(ValueError, match="closed already"):
        file.finish()


def test_where_no_thread_can_be_started_submit_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the interpreter shuts down, since Python 3.12."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    work = Writing(tmp_path / "x", page_aligned(3 * BLOCK))
    work.submit(2)
    assert work.freed == Counter([2])
    work.submit(0)
    work.submit(1)
    assert work.file.finish() == digest_image(work.image, BLOCK)


def test_past_the_page_cache_a_block_is_hashed_while_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_direct(tmp_path)
    go, news = threading.Event(), threading.Condition()
    hashed, under_way, most = 0, 0, 0
    hash_of, pwrite = xxhash.xxh3_128, os.pwrite

    def count_hash() -> xxhash.xxh3_128:
        nonlocal hashed
        with news:
            hashed += 1
            news.notify_all()
        return hash_of()

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal under_way, most
        with news:
            under_way += 1
            most = max(most, under_way)
            news.notify_all()
        assert go.wait(5)
        done = pwrite(descriptor, data, offset)
        with news:
            under_way -= 1
        return done

    monkeypatch.setattr(xxhash, "xxh3_128", count_hash)
    monkeypatch.setattr(os, "pwrite", slow)
    work = Writing(tmp_path / "x", page_aligned(6 * BLOCK))
    work.submit_all()
    with news:
        assert news.wait_for(lambda: hashed == 3 and under_way == 2, timeout=5)
    go.set()
    digest = work.file.finish()
    monkeypatch.undo()
    assert most == 2 and work.each_was_freed_once
    assert digest == digest_image(work.image, BLOCK)
    assert (tmp_path / "x").read_bytes() == work.image


def test_no_more_threads_than_blocks(tmp_path: Path) -> None:
    before = threading.active_count()
    counts: dict[int, int] = {}
    for size in (0, BLOCK, 3 * BLOCK, 9 * BLOCK):
        file = ImageFile(tmp_path / "x", size, writers=4)
        counts[size // BLOCK] = threading.active_count() - before
        file.abandon()
    assert counts == {0: 0, 1: 1, 3: 3, 9: 4}
