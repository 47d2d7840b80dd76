"""Where a reading brings what it wants: the targets of its transfers, and the ways to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from resume_kit.checkpoint.pages import allocate
from resume_kit.checkpoint.readplan import Window


class Lane(Protocol):
    """One thread's way into a destination."""

    def memory(self) -> memoryview:
        """The lane's own memory for one window, on whole pages. Waits as `wait` does."""

    def take(self, memory: memoryview, window: Window) -> None:
        """Bring what the window's transfers want to their targets. `memory` begins with the window and has been
        checked."""

    def wait(self) -> None:
        """Until all that was taken has arrived, and nothing needs the memory that it was taken from."""


class Destination(Protocol):
    """The targets of a plan's transfers. Lanes may be used side by side: no two windows meet in a target."""

    def lane(self, nbytes: int) -> AbstractContextManager[Lane]:
        """A lane with memory of its own for windows of at most `nbytes`; 0 for one that takes from other memory only.

        After its end, all that it took has arrived.
        """

    def pinned(self, memory: memoryview) -> AbstractContextManager[None]:
        """Makes taking from `memory` as fast as from a lane's own, where that can be."""


class HostMemory:
    """Targets in host memory, by number. What a lane takes arrives at once."""

    def __init__(self, targets: Sequence[memoryview]) -> None:
        self._targets = targets

    @contextmanager
    def lane(self, nbytes: int) -> Iterator[Lane]:
        yield _HostLane(self._targets, allocate(nbytes))

    def pinned(self, memory: memoryview) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True, slots=True)
class _HostLane:
    targets: Sequence[memoryview]
    window: memoryview

    def memory(self) -> memoryview:
        return self.window

    def take(self, memory: memoryview, window: Window) -> None:
        for transfer in window.transfers:
            transfer.move(memory, window.start, self.targets[transfer.target])

    def wait(self) -> None:
        pass
