"""What the machine can do at best with the same bytes: raw writes and reads of files, copies to and from the device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from resume_kit.checkpoint.pages import allocate

BLOCK = 16 << 20
_ALIGNED = 4096
_PILOT = 512 << 20  # bytes a rank to choose a way with
_COPIED = 1 << 30  # bytes of the buffers that are copied again and again


@dataclass(frozen=True)
class Way:
    """How raw files are written or read."""

    threads: int
    direct: bool

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, {'O_DIRECT' if self.direct else 'buffered'}"

    @property
    def flags(self) -> int:
        return os.O_DIRECT if self.direct else 0


WAYS = tuple(Way(threads, direct) for direct in (True, False) for threads in (1, 4, 8))


def write(path: Path, nbytes: int, way: Way) -> float:
    """Write `nbytes`, rounded up to 4096, of one file and fsync it; seconds. Raises OSError where `way` is refused."""
    size = -(-nbytes // _ALIGNED) * _ALIGNED
    content = _block()
    start = time.perf_counter()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | way.flags, 0o644)
    try:

        def put(at: int) -> None:
            end = min(at + BLOCK, size)
            while at < end:
                at += os.pwrite(descriptor, content[: end - at], at)

        _over(size, way.threads, put)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - start


def read(path: Path, way: Way) -> float:
    """Read a whole file into memory; seconds. Without O_DIRECT its cached pages are dropped first."""
    size = path.stat().st_size
    if not way.direct:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    buffers = [allocate(BLOCK) for _ in range(way.threads)]
    start = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY | way.flags)
    try:

        def get(at: int) -> None:
            buffer = buffers.pop()
            end = min(at + BLOCK, size)
            while at < end:
                got = os.preadv(descriptor, [buffer[: end - at]], at)
                if not got:
                    raise OSError(f"{path} ends at {at} of {size} bytes")
                at += got
            buffers.append(buffer)

        _over(size, way.threads, get)
    finally:
        os.close(descriptor)
    return time.perf_counter() - start


def _over(size: int, threads: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, size, BLOCK)))


def _block() -> memoryview:
    """A page-aligned block that no file system can compress."""
    block = allocate(BLOCK)
    block[:] = os.urandom(1 << 20) * (BLOCK >> 20)
    return block


def choose(
    measure: Callable[[Way], float], slowest: Callable[[list[float]], list[float]], ways: tuple[Way, ...] = WAYS
) -> Way:
    """The fastest of `ways`, the same on all ranks. `measure` may raise OSError for a way that is refused."""
    seconds = []
    for way in ways:
        try:
            mine = measure(way)
        except OSError:
            mine = float("inf")
        seconds.append(slowest([mine])[0])
    return ways[seconds.index(min(seconds))]


def pilot_bytes(nbytes: int) -> int:
    return min(nbytes, _PILOT)


class Copies:
    """Copies of the same bytes between device and pinned host memory, or within memory on a CPU."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._nbytes = max(1, nbytes)
        size = min(self._nbytes, _COPIED)
        self._cuda = device.type == "cuda"
        self._device = torch.ones(size, dtype=torch.uint8, device=device)
        self._host = torch.ones(size, dtype=torch.uint8, pin_memory=self._cuda)
        self._other = torch.ones_like(self._device) if self._cuda else None

    def measures(self) -> dict[str, Callable[[], float]]:
        """Seconds to move the bytes, by name."""
        if not self._cuda:
            return {"memory copy": lambda: self._seconds(self._host, self._device)}
        assert self._other is not None
        other = self._other
        return {
            "pinned copy, device to host": lambda: self._seconds(self._host, self._device),
            "pinned copy, host to device": lambda: self._seconds(self._device, self._host),
            "device copy": lambda: self._seconds(other, self._device),
        }

    def _seconds(self, target: torch.Tensor, source: torch.Tensor) -> float:
        self._wait()
        start, left = time.perf_counter(), self._nbytes
        while left > 0:
            part = min(left, source.numel())
            target[:part].copy_(source[:part], non_blocking=True)
            left -= part
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device.device)
