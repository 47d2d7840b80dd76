"""Carrying out a read plan: threads bring windows of files into memory, check them, and hand them to a destination."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resume_kit.checkpoint.datafile import DataFile
from resume_kit.checkpoint.pages import allocate, whole_pages
from resume_kit.checkpoint.readplan import ReadPlan, Window
from resume_kit.checkpoint.sharing import Shared, default_readers, share_out
from resume_kit.errors import CheckpointDamaged


@dataclass(frozen=True, slots=True)
class ReadAccount:
    """What a reading took. `read_bytes` are those of files, gaps that were read over among them.

    `verified_bytes` came in whole blocks, each checked against its digest.
    `unverified` are the ranges (file, start, stop) of the blocks of which only a part was read: whether that part is
    what was saved, the fingerprints of the tensors must tell.
    """

    wanted_bytes: int
    read_bytes: int
    verified_bytes: int
    unverified: tuple[tuple[str, int, int], ...]


class Lane(Protocol):
    """One thread's way into a destination."""

    def memory(self) -> memoryview:
        """Memory for one window, on whole pages. Waits until nothing needs what was in it before."""

    def take(self, memory: memoryview, window: Window) -> None:
        """Bring what the window's transfers want to their targets. `memory`, from the last call of `memory`, begins
        with the window and has been checked."""


class Destination(Protocol):
    """The targets of a plan's transfers. Lanes may be used side by side: no two windows meet in a target."""

    def lane(self, nbytes: int) -> AbstractContextManager[Lane]:
        """A lane for windows of at most `nbytes`. After its end, all that it took has arrived."""


class HostMemory:
    """Targets in host memory, by number. What a lane takes arrives at once."""

    def __init__(self, targets: Sequence[memoryview]) -> None:
        self._targets = targets

    @contextmanager
    def lane(self, nbytes: int) -> Iterator[Lane]:
        yield _HostLane(self._targets, allocate(nbytes))


@dataclass(frozen=True, slots=True)
class _HostLane:
    targets: Sequence[memoryview]
    window: memoryview

    def memory(self) -> memoryview:
        return self.window

    def take(self, memory: memoryview, window: Window) -> None:
        for transfer in window.transfers:
            transfer.move(memory, window.start, self.targets[transfer.target])


def reader_count(plan: ReadPlan, readers: int | None = None) -> int:
    """How many threads a plan is worth: at most `readers`, by default this rank's share of the cores."""
    windows = -(-plan.wanted_bytes // max(1, plan.window_bytes))
    return max(1, min(readers or default_readers(), windows))


def window_memory(wanted_bytes: int, block_bytes: int, readers: int) -> int:
    """Bytes of host memory that reading so much takes at the most, beside its targets."""
    return block_bytes * min(readers, -(-wanted_bytes // max(1, block_bytes)))


def carry_out(plan: ReadPlan, directory: Path, destination: Destination, *, readers: int | None = None) -> ReadAccount:
    """Read what the plan says, each window in one of `readers` threads. Nothing of a bad block reaches its target.

    Raises `CheckpointDamaged` naming file and byte range of every bad block that was met: the first one of all, and
    those that other threads had in hand.
    """
    accounts: list[tuple[int, int]] = []
    partly: list[set[int]] = [set() for _ in plan.sources]
    damage: list[tuple[int, int, CheckpointDamaged]] = []

    def read(windows: Shared[tuple[int, Window]]) -> None:
        read_bytes = verified_bytes = 0
        with destination.lane(whole_pages(plan.window_bytes)) as lane, _Opened(directory) as opened:
            for number, window in windows:
                source = plan.sources[number]
                memory = lane.memory()
                try:
                    file = opened.file(source.file)
                    if window.whole:
                        file.read_block(memory, window.block, source.digests)
                        verified_bytes += window.stop - window.start
                    else:
                        file.read_runs(memory, window.start, window.reads)
                        partly[number].add(window.block)
                except CheckpointDamaged as error:
                    windows.stop()
                    damage.append((number, window.start, error))
                    break
                read_bytes += int((window.reads[:, 1] - window.reads[:, 0]).sum())
                lane.take(memory, window)
        accounts.append((read_bytes, verified_bytes))

    every = ((number, window) for number in range(len(plan.sources)) for window in plan.windows(number))
    share_out(every, read, reader_count(plan, readers))
    if damage:
        found = [problem for *_, error in sorted(damage, key=lambda one: one[:2]) for problem in error.problems]
        raise CheckpointDamaged(f"{directory.name} is damaged", dict.fromkeys(found)) from damage[0][2]
    unverified = [
        (source.file, start, stop)
        for source, blocks in zip(plan.sources, partly, strict=True)
        for start, stop in source.digests.runs(blocks)
    ]
    read_bytes, verified_bytes = (sum(column) for column in zip(*accounts, strict=True))
    return ReadAccount(plan.wanted_bytes, read_bytes, verified_bytes, tuple(unverified))


class _Opened:
    """The data file that one thread reads, opened as it comes to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: DataFile | None = None

    def file(self, name: str) -> DataFile:
        if self._file is None or self._file.path.name != name:
            self._close()
            self._file = DataFile(self._directory / name)
        return self._file

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
