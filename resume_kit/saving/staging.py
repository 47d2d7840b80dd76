"""From live pieces to the file's image in host memory, block by block."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from resume_kit.checkpoint.blocks import BLOCK_BYTES, spans
from resume_kit.errors import Problem, SaveFailed

_TOGETHER = 4  # blocks that are copied by one call where they can: fewer calls, and writers still start early
_AHEAD = 3  # such copies in the stream's queue while somebody waits: 4 ms at 55 GB/s, the interpreter may be busy


@dataclass(frozen=True, eq=False)
class Block:
    """A block of the image, complete in host memory. Call `free` once its memory may be used again."""

    number: int
    memory: memoryview
    free: Callable[[], None] | None


class Staging:
    """The copies of one save. `sources` are (byte offset in the file, bytes as a uint8 tensor), in file order.

    `memory` (uint8, whole blocks) holds the image, or as many of its blocks at a time as it has room for. `copied`
    counts the blocks that have come.
    """

    def __init__(
        self,
        sources: Sequence[tuple[int, torch.Tensor]],
        size: int,
        memory: torch.Tensor,
        stream: torch.cuda.Stream | None,
        timeout: float,
    ) -> None:
        self._spans = list(spans(size))
        self._on_host = [source for source in sources if not source[1].is_cuda]
        self._on_device = [source for source in sources if source[1].is_cuda]
        self._device = _Cursor(self._on_device)
        self._order: tuple[Sequence[int], Sequence[int]] = range(len(self._spans)), ()
        self._memory = memory
        self._stream = stream
        self._timeout = timeout
        self._pacer: threading.Thread | None = None
        self._events: dict[int, torch.cuda.Event | None] = {}
        self._news = threading.Condition()
        self._go_on, self._queued, self._hurried = threading.Event(), threading.Event(), threading.Event()
        self._abandoned = False
        self._failure: BaseException | None = None
        self.copied = 0
        self._slots: queue.SimpleQueue[int] | None = None
        room = memory.numel() // BLOCK_BYTES
        if room < len(self._spans):
            self._slots = queue.SimpleQueue()
            for slot in range(room):
                self._slots.put(slot)

    @property
    def bounded(self) -> bool:
        """Whether memory has to be used again, so that copies wait for writes."""
        return self._slots is not None

    @property
    def from_device_alone(self) -> bool:
        """Whether all of it lies on the device."""
        return not self._on_host

    @property
    def by_device_alone(self) -> bool:
        """Whether every copy of live memory is already in the stream's queue."""
        return self._queued.is_set() and not self._on_host

    def start(self, *, without: Iterable[tuple[int, int]] = ()) -> None:
        """Begin the copies from the device but those into bytes `without` of the file; nothing waits.

        Only where the whole image has room. `start_rest` must follow, or `abandon`. A thread gives the stream one copy
        at a time: a copy of training's own, a loss say, comes in between. Before a queue that never runs dry it would
        not: the device's copy engine stays with that one.
        """
        late = {number for lo, hi in without for number in range(lo // BLOCK_BYTES, -(-hi // BLOCK_BYTES))}
        self._order = [n for n in range(len(self._spans)) if n not in late], sorted(late)
        if self._stream is not None:
            self._pacer = threading.Thread(target=self._pace, name="copies", daemon=True)
            self._pacer.start()

    def start_rest(self) -> None:
        """Begin the copies that `start` left out."""
        self._go_on.set()

    def hurry(self) -> None:
        """Somebody waits for the copies: from here on they come as fast as they can, and others after them."""
        self._hurried.set()

    def abandon(self) -> None:
        """Begin no more copies. Those in the stream's queue still come."""
        self._abandoned = True
        self._go_on.set()
        if self._pacer is not None:
            self._pacer.join()

    def copied_on_device(self) -> None:
        """Make the current stream wait for the copies in the stream's queue."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def blocks(self, header: bytes) -> Iterator[Block]:
        """Each block, in the order of the copies, once its bytes are there; `header` are the file's first bytes.

        Raises `SaveFailed` when no memory is freed in time.
        """
        on_host = [(0, torch.frombuffer(bytearray(header), dtype=torch.uint8)), *self._on_host]
        for part in self._order:
            yield from self._part(part, _Cursor(on_host))

    def _part(self, numbers: Iterable[int], host: _Cursor) -> Iterator[Block]:
        for number in numbers:
            start, stop = self._spans[number]
            slot = self._take()
            memory = self._memory[start:stop] if slot is None else _slot(self._memory, slot, stop - start)
            host.copy(memory, start, stop)
            copied = self._coming(number) if self._pacer else self._copy_from_device(memory, start, stop)
            if copied is not None:
                copied.synchronize()
            self.copied += 1
            yield Block(number, memory.numpy().data, self._freeing(slot))

    def _copy_from_device(self, memory: torch.Tensor, start: int, stop: int) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        with on_stream(self._stream):
            if not self._device.copy(memory, start, stop):
                return None
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            return event

    def _pace(self) -> None:
        """In a thread: all copies in their order, one in the stream's queue, or `_AHEAD` while somebody waits."""
        flight: deque[torch.cuda.Event] = deque()
        try:
            for late, part in enumerate(self._order):
                if late:
                    self._go_on.wait()
                self._device = _Cursor(self._on_device)
                for numbers in _neighbours(part):
                    while len(flight) >= (_AHEAD if self._hurried.is_set() else 1):
                        flight.popleft().synchronize()
                    if self._abandoned:
                        return
                    start, stop = self._spans[numbers[0]][0], self._spans[numbers[-1]][1]
                    event = self._copy_from_device(self._memory[start:stop], start, stop)
                    if event is not None:
                        flight.append(event)
                    with self._news:
                        self._events |= dict.fromkeys(numbers, event)
                        self._news.notify()
            self._queued.set()
        except BaseException as error:  # whoever asks for the next block raises it
            with self._news:
                self._failure = error
                self._news.notify()

    def _coming(self, number: int) -> torch.cuda.Event | None:
        """The event of the block's copy, once it is in the stream's queue."""
        with self._news:
            self._news.wait_for(lambda: number in self._events or self._failure is not None)
            if number not in self._events:
                assert self._failure is not None
                raise self._failure
            return self._events.pop(number)

    def _take(self) -> int | None:
        if self._slots is None:
            return None
        try:
            return self._slots.get(timeout=self._timeout)
        except queue.Empty:
            what = f"no block was written within {self._timeout:.0f} s"
            problem = Problem("write", "", what, "look at the file system's health; it is full, hung or very slow")
            raise SaveFailed("the file system does not take the checkpoint", [problem]) from None

    def _freeing(self, slot: int | None) -> Callable[[], None] | None:
        if self._slots is None or slot is None:
            return None
        put, number = self._slots.put, slot
        return lambda: put(number)


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """The stream is the current one, on its own device; nothing without one.

    A thread begins on the first device. `torch.cuda.stream` alone would go back there at its end in a way that makes a
    context on it, hundreds of MB on the GPU of another rank.
    """
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


class _Cursor:
    """Sources in file order, consumed block by block; blocks may be left out."""

    def __init__(self, sources: Sequence[tuple[int, torch.Tensor]]) -> None:
        self._sources = sources
        self._next = 0

    def copy(self, memory: torch.Tensor, start: int, stop: int) -> bool:
        """Copy what lies in bytes [start, stop) of the file to `memory`; whether there was anything."""
        found = False
        while self._next < len(self._sources):
            offset, data = self._sources[self._next]
            end = offset + data.numel()
            if offset >= stop:
                break
            lo, hi = max(offset, start), min(end, stop)
            if lo < hi:
                whole = lo == offset and hi == end
                source = data if whole else data[lo - offset : hi - offset]
                memory[lo - start : hi - start].copy_(source, non_blocking=True)
                found = True
            if end > stop:
                break
            self._next += 1
        return found


def _neighbours(numbers: Sequence[int]) -> Iterator[list[int]]:
    """`numbers`, rising, in runs of neighbours of at most `_TOGETHER`."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == _TOGETHER):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _slot(memory: torch.Tensor, slot: int, nbytes: int) -> torch.Tensor:
    return memory[slot * BLOCK_BYTES : slot * BLOCK_BYTES + nbytes]
