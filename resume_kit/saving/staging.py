"""From live pieces to the file's image in host memory, block by block."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from resume_kit.checkpoint.blocks import BLOCK_BYTES, spans
from resume_kit.errors import Problem, SaveFailed

_TOGETHER = 4  # blocks that are copied by one call where they can: fewer calls, and writers still start early


@dataclass(frozen=True, eq=False)
class Block:
    """A block of the image, complete in host memory. Call `free` once its memory may be used again."""

    number: int
    memory: memoryview
    free: Callable[[], None] | None


class Staging:
    """The copies of one save. `sources` are (byte offset in the file, bytes as a uint8 tensor), in file order.

    `header` are the file's first bytes. `memory` (uint8, whole blocks) holds the image, or as many of its blocks at a
    time as it has room for. `copied` counts the blocks that have come.
    """

    def __init__(
        self,
        header: bytes,
        sources: Sequence[tuple[int, torch.Tensor]],
        size: int,
        memory: torch.Tensor,
        stream: torch.cuda.Stream | None,
        timeout: float,
    ) -> None:
        self._spans = list(spans(size))
        on_host = [source for source in sources if not source[1].is_cuda]
        self._all_on_device = not on_host
        self._host = _Cursor([(0, torch.frombuffer(bytearray(header), dtype=torch.uint8)), *on_host])
        self._device = _Cursor([source for source in sources if source[1].is_cuda])
        self._memory = memory
        self._stream = stream
        self._timeout = timeout
        self._events: dict[int, torch.cuda.Event] = {}
        self._enqueued = False
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
    def by_device_alone(self) -> bool:
        """Whether every copy of live memory is already in the stream's queue."""
        return self._enqueued and self._all_on_device

    def enqueue(self) -> None:
        """Start all copies from the device; nothing waits. Only where the whole image has room."""
        for first in range(0, len(self._spans), _TOGETHER):
            numbers = range(first, min(first + _TOGETHER, len(self._spans)))
            start, stop = self._spans[numbers[0]][0], self._spans[numbers[-1]][1]
            self._copy_from_device(numbers, self._memory[start:stop], start, stop)
        self._enqueued = True

    def copied_on_device(self) -> None:
        """Make the current stream wait for the copies that `enqueue` started."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def blocks(self) -> Iterator[Block]:
        """Each block, in order, once its bytes are there. Raises `SaveFailed` when no memory is freed in time."""
        for number, (start, stop) in enumerate(self._spans):
            slot = self._take()
            memory = self._memory[start:stop] if slot is None else _slot(self._memory, slot, stop - start)
            self._host.copy(memory, start, stop)
            if not self._enqueued:
                self._copy_from_device((number,), memory, start, stop)
            if (event := self._events.pop(number, None)) is not None:
                event.synchronize()
            self.copied += 1
            yield Block(number, memory.numpy().data, self._freeing(slot))

    def _copy_from_device(self, numbers: Sequence[int], memory: torch.Tensor, start: int, stop: int) -> None:
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            if self._device.copy(memory, start, stop):
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
                self._events |= dict.fromkeys(numbers, event)

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


class _Cursor:
    """Sources in file order, consumed block by block."""

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


def _slot(memory: torch.Tensor, slot: int, nbytes: int) -> torch.Tensor:
    return memory[slot * BLOCK_BYTES : slot * BLOCK_BYTES + nbytes]
