"""A data file, written block by block in any order by a pool of threads that digest as they go. No torch."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import xxhash

from resume_kit.checkpoint.blocks import BLOCK_BYTES, FileDigest, spans
from resume_kit.checkpoint.filesystems import in_memory
from resume_kit.checkpoint.pages import PAGE
from resume_kit.errors import Problem, SaveFailed

_Job = tuple[int, memoryview, Callable[[], None] | None]


def write_failed(path: Path, error: OSError, nbytes: int) -> SaveFailed:
    """`error` of a write as a `SaveFailed` that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"no space left for {nbytes:,} bytes ({error.strerror})"
        remedy = "free space, raise the quota, or keep fewer checkpoints (keep_last, keep_every)"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"cannot be written ({error.strerror})"
        remedy = "give the job's user write permission, or choose another run directory"
    else:
        what, remedy = f"write failed ({error.strerror or error})", "look at the file system's health"
    return SaveFailed(f"cannot write {path.name}", [Problem("write", str(path), what, remedy)])


_PORTION = 1 << 20
#: Threads that write a file past the page cache, 16 MiB at a time. More are hardly faster on a local disk.
WRITING = 2
#: One more than that hashes meanwhile: threads that did both would fall into step, and leave the disk idle while all
#: hash. Through the page cache a thread does both, in portions, and more slow the training beside them.
WRITERS = WRITING + 1


class ImageFile:
    """A data file of known size, written in blocks of 16 MiB that may come in any order.

    Page-aligned memory goes past the page cache (O_DIRECT) where the file system takes that. All methods are for one
    thread; `finish` or `abandon` ends the writer threads.
    """

    def __init__(self, path: Path, size: int, *, writers: int | None = None) -> None:
        """Create the file, or truncate it, and start the threads. Raises `SaveFailed`, on a full disk too.

        With `writers=0`, or where no thread can be started (the interpreter is shutting down), `submit` writes.
        """
        self._path, self._size = path, size
        self._spans = list(spans(size))
        self._digests = [""] * len(self._spans)
        self._missing = set(range(len(self._spans)))
        self._failure: BaseException | None = None
        self._closed = self._abandoned = False
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._direct: int | None = None
        try:
            self._buffered = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            try:
                if len(self._spans) > 1:
                    _reserve(self._buffered, size)
                    self._direct = _open_direct(path)
            except OSError:
                os.close(self._buffered)
                raise
        except OSError as error:
            raise write_failed(path, error, size) from error
        self._bypass = self._direct is not None
        self._turn = threading.Semaphore(WRITING)
        if writers is None:
            writers = WRITERS if self._bypass else WRITING
        with suppress(RuntimeError):
            for number in range(min(writers, len(self._spans))):
                thread = threading.Thread(target=self._run, name=f"writer-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def submit(self, number: int, block: memoryview, free: Callable[[], None] | None = None) -> None:
        """Queue the bytes of block `number` and return at once.

        `free` is called once, from a writer thread, when the memory may be reused: also after a failure.
        """
        start, stop = self._spans[number]
        if self._closed or number not in self._missing or block.nbytes != stop - start:
            raise ValueError(f"{self._path}: block {number} of {block.nbytes} bytes is of another size, twice or late")
        self._missing.remove(number)
        if self._threads:
            self._queue.put((number, block, free))
        else:
            self._handle(number, block, free)

    def finish(self) -> FileDigest:
        """Wait for all blocks, fsync and close. Raises `SaveFailed` with the first failure."""
        if self._closed or self._missing:
            raise ValueError(f"{self._path} is closed already, or lacks {len(self._missing)} blocks")
        self._join()
        try:
            try:
                if self._failure is None:
                    os.fsync(self._buffered)
            finally:
                self._close()
        except OSError as error:
            self._failure = error
        if isinstance(self._failure, OSError):
            raise write_failed(self._path, self._failure, self._size) from self._failure
        if self._failure is not None:
            raise self._failure
        return FileDigest(self._size, BLOCK_BYTES, tuple(self._digests))

    def abandon(self) -> None:
        """Stop soon and close: blocks that wait are freed, not written. Does nothing after `finish` or a first call."""
        if not self._closed:
            self._abandoned = True
            self._join()
            with suppress(OSError):  # nobody wants the file
                self._close()

    def _join(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _close(self) -> None:
        try:
            os.close(self._buffered)
        finally:
            if self._direct is not None:
                os.close(self._direct)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._handle(*job)
            del job  # no reference to the block's memory while this waits

    def _handle(self, number: int, block: memoryview, free: Callable[[], None] | None) -> None:
        try:
            try:
                if self._wanted:
                    self._digests[number] = self._put(block, self._spans[number][0])
            finally:
                if free is not None:
                    free()
        except BaseException as error:
            self._failure = self._failure or error

    @property
    def _wanted(self) -> bool:
        return self._failure is None and not self._abandoned

    def _put(self, block: memoryview, offset: int) -> str:
        """Digest and write a block; past the page cache at once, else in portions that the processor's cache holds."""
        hasher = xxhash.xxh3_128()
        if self._direct is not None and self._bypass:
            hasher.update(block)
            with self._turn:
                if self._wanted:
                    self._write(block, offset)
            return hasher.hexdigest()
        for start in range(0, len(block), _PORTION):
            hasher.update(block[start : start + _PORTION])
            self._write(block[start : start + _PORTION], offset + start)
        return hasher.hexdigest()

    def _write(self, block: memoryview, offset: int) -> None:
        """Write whole pages directly where that works, and the rest through the page cache."""
        aligned = len(block) // PAGE * PAGE if np.frombuffer(block, np.uint8).ctypes.data % PAGE == 0 else 0
        done = 0
        while done < len(block):
            if self._direct is not None and self._bypass and done < aligned and done % PAGE == 0:
                try:
                    done += os.pwrite(self._direct, block[done:aligned], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._bypass = False  # this file system wants another alignment
            else:
                written = os.pwrite(self._buffered, block[done:], offset + done)
                # This starts the write-back now, rather than all of it in fsync: twice as fast.
                os.posix_fadvise(self._buffered, offset + done, written, os.POSIX_FADV_DONTNEED)
                done += written


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the file's blocks where that is cheap, so that a full disk is known before the first write.

    On a local disk it also lets direct writes run at once; a memory file system would allocate page by page, and a
    network file system without the call would have it emulated.
    """
    if os.major(os.fstat(descriptor).st_dev) == 0:  # no block device
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _open_direct(path: Path) -> int | None:
    """A second descriptor that goes past the page cache, or None where there is no such way."""
    if in_memory(path):
        return None  # from Linux 6.6 on it takes O_DIRECT, and copies all the same
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
