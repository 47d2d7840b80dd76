"""From live pieces to the file's image in host memory, block by block."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    def from_device_alone(self) -> bool:
        """Whether all of it lies on the device."""
        return not self._on_host

    @property
    def by_device_alone(self) -> bool:
        """Whether every copy of live memory is already in the stream's queue."""
        return self._enqueued and not self._on_host

    def enqueue(self, *, without: Iterable[tuple[int, int]] = ()) -> None:
        """Start all copies from the device but those into bytes `without` of the file; nothing waits.

        Only where the whole image has room. `enqueue_rest` must follow where something was left out.
        """
        late = {number for lo, hi in without for number in range(lo // BLOCK_BYTES, -(-hi // BLOCK_BYTES))}
        self._order = [n for n in range(len(self._spans)) if n not in late], sorted(late)
        self._enqueue(self._order[0])
        self._enqueued = not late

    def enqueue_rest(self) -> None:
        """Start the copies that `enqueue` left out."""
        self._enqueue(self._order[1])
        self._enqueued = True

    def _enqueue(self, numbers: Sequence[int]) -> None:
        """Up to `_TOGETHER` neighbours at a time, in file order."""
        self._device = _Cursor(self._on_device)
        at = 0
        while at < len(numbers):
            end = at + 1
            while end < len(numbers) and end - at < _TOGETHER and numbers[end] == numbers[end - 1] + 1:
                end += 1
            start, stop = self._spans[numbers[at]][0], self._spans[numbers[end - 1]][1]
            self._copy_from_device(numbers[at:end], self._memory[start:stop], start, stop)
            at = end

    def copied_on_device(self) -> None:
        """Make the current stream wait for the copies that `enqueue` started."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

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


def _slot(memory: torch.Tensor, slot: int, nbytes: int) -> torch.Tensor:
    return memory[slot * BLOCK_BYTES : slot * BLOCK_BYTES + nbytes]
