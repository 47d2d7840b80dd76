"""A data file, open for reading: whole blocks from where they come fastest, parts through the page cache."""

from __future__ import annotations

import fcntl
import io
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.blocks import FileDigest, spans
from resume_kit.checkpoint.pages import LARGE, PAGE, whole_pages

try:
    from resume_kit.checkpoint import _runs
except ImportError:  # no compiler at the installation
    RUNS_AT_ONCE = False
else:
    RUNS_AT_ONCE = True

#: Where a block is read from: the page cache if it is there (a restart on the same node) and else past it; through the
#: page cache, where it then stays; or from the disk, whatever the page cache says.
Way = Literal["fastest", "cache", "disk"]
#: A block comes from the page cache in portions, each hashed while the processor's own cache holds it.
PORTION = 1 << 20


class DataFile:
    """One open data file, for one thread. All faults raise `CheckpointDamaged` naming the file and the byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # objects, not descriptors: an interrupt between opening a file and keeping it closes it again
        self._past_cache: io.FileIO | None = None
        self._tried_direct = False
        try:
            self._through_cache = io.FileIO(path)
        except OSError as error:
            raise canonical.unread(path, error, f"cannot be opened: {error.strerror}") from None
        self._buffered = self._through_cache.fileno()

    def close(self) -> None:
        self._through_cache.close()
        self._close_direct()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_block(self, memory: memoryview, block: int, digests: FileDigest, way: Way = "fastest") -> None:
        """A whole block into the start of `memory`, checked against its digest.

        Only memory with room for whole pages can be read into past the page cache.
        """
        start, stop = digests.span(block)
        if way == "disk":
            os.posix_fadvise(self._buffered, start, stop - start, os.POSIX_FADV_DONTNEED)
        at, hasher = start, xxhash.xxh3_128()
        large = stop - start >= LARGE and start % PAGE == 0 and whole_pages(stop - start) <= len(memory)
        if large and (way == "disk" or (way == "fastest" and not self.in_page_cache(start, stop))):
            at = self._read_directly(memory, start, stop)
            hasher.update(memory[: at - start])
        if at < stop:
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for lo, hi in spans(stop - at, PORTION):
            self._read(memory, start, at + lo, at + hi)
            hasher.update(memory[at + lo - start : at + hi - start])
        if hasher.hexdigest() != digests.blocks[block]:
            raise canonical.damaged(self.path, f"the content of bytes {start:,}..{stop:,} is not what was saved")

    def read_runs(self, memory: memoryview, origin: int, runs: NDArray[np.int64]) -> None:
        """Bytes [start, stop) of each row of `runs` to where they belong in `memory`, which begins at byte `origin`.

        The C extension reads them all in one call: 8 KiB each from memory, in 8 threads on 2 cores, at 10 GB/s. A call
        for each, as without it, makes threads queue for the interpreter: 4 GB/s.
        """
        os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)
        # 98,000 runs of 0.5 to 2 KiB from a cold disk: 1.4 s when all are asked for ahead, 6 s if not
        ahead = len(runs) > 1 and not self.in_page_cache(int(runs[0, 0]), int(runs[-1, 1]))
        done = 0
        if RUNS_AT_ONCE:
            done = _runs.read_runs(self._buffered, memory, origin, runs, ahead)
        elif ahead:
            for start, stop in runs.tolist():
                os.posix_fadvise(self._buffered, start, stop - start, os.POSIX_FADV_WILLNEED)
        for start, stop in runs[done:].tolist():  # from the first that failed on, if any, which is named here
            self._read(memory, origin, start, stop)

    def in_page_cache(self, start: int, stop: int) -> bool:
        """Whether a page somewhere in [start, stop) can be had at once; True where the file system cannot tell.

        Somewhere else each time: the question itself may bring that page into the cache.
        """
        page = start + time.perf_counter_ns() % -(-(stop - start) // PAGE) * PAGE
        os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)  # or it would bring in many more
        try:
            return os.preadv(self._buffered, (bytearray(1),), page, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _read_directly(self, memory: memoryview, start: int, stop: int) -> int:
        """Read past the page cache as far as that goes; returns the first byte that did not come."""
        if not self._tried_direct:
            self._tried_direct = True
            try:
                self._past_cache = io.FileIO(self.path)
                fcntl.fcntl(self._past_cache, fcntl.F_SETFL, os.O_DIRECT)
            except OSError:
                self._close_direct()
        at = start
        while self._past_cache is not None and at < stop:
            try:
                count = os.preadv(self._past_cache.fileno(), (memory[at - start : whole_pages(stop - start)],), at)
            except OSError:  # not on this file system, or a fault, which the read through the page cache will name
                self._close_direct()
                break
            if count == 0:
                break
            at += count
        return min(at, stop)

    def _read(self, memory: memoryview, origin: int, start: int, stop: int) -> None:
        at = start
        while at < stop:
            try:
                count = os.preadv(self._buffered, (memory[at - origin : stop - origin],), at)
            except OSError as error:
                raise canonical.unread(self.path, error, f"read failed at byte {at:,}: {error.strerror}") from error
            if count == 0:
                size = os.fstat(self._buffered).st_size
                raise canonical.damaged(self.path, f"truncated: it ends at byte {size:,}")
            at += count

    def _close_direct(self) -> None:
        if self._past_cache is not None:
            self._past_cache.close()
            self._past_cache = None
