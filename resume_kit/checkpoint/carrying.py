"""Carrying out a read plan: threads bring windows of files into memory, check them, and hand them to a destination."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from resume_kit.checkpoint.datafile import DataFile
from resume_kit.checkpoint.destination import Destination, Lane
from resume_kit.checkpoint.node import NeighbourLost
from resume_kit.checkpoint.pages import whole_pages
from resume_kit.checkpoint.readplan import ReadPlan, Source, Window
from resume_kit.checkpoint.sharing import Shared, default_readers, side_by_side
from resume_kit.checkpoint.together import Together, copy
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


def reader_count(wanted_bytes: int, window_bytes: int, readers: int | None = None) -> int:
    """How many threads a reading is worth: at most `readers`, by default this rank's share of the cores."""
    windows = -(-wanted_bytes // max(1, window_bytes))
    return max(1, min(readers or default_readers(), windows))


def carry_out(
    plan: ReadPlan,
    directory: Path,
    destination: Destination,
    *,
    readers: int | None = None,
    together: Together | None = None,
) -> ReadAccount:
    """Read what the plan says, each window in one of `readers` threads. Nothing of a bad block reaches its target.

    The blocks that the plan leaves to the node are read and given, or taken, over `together`. Raises
    `CheckpointDamaged` naming file and byte range of every bad block that was met: the first one of all, and those
    that other threads had in hand; `NeighbourLost` if another rank of the node failed.
    """
    accounts: list[tuple[int, int]] = []
    partly: list[set[int]] = [set() for _ in plan.sources]
    damage: list[tuple[int, int, CheckpointDamaged]] = []

    def read() -> None:
        read_bytes = verified_bytes = 0
        with destination.lane(whole_pages(plan.window_bytes)) as lane, _Opened(directory) as opened:
            for number, window in windows:
                source = plan.sources[number]
                try:
                    file = opened.file(source.file)
                    if together is not None and window.block in plan.shared[number]:
                        _read_for_all(file, source, window, lane, together)
                    else:
                        _read_alone(file, source, window, lane)
                except CheckpointDamaged as error:
                    damage.append((number, window.start, error))
                    stop()
                    break
                read_bytes += int((window.reads[:, 1] - window.reads[:, 0]).sum())
                if window.whole:
                    verified_bytes += window.stop - window.start
                else:
                    partly[number].add(window.block)
        accounts.append((read_bytes, verified_bytes))

    def stop() -> None:
        windows.stop()
        if together is not None:
            together.abort()

    alone = ((number, window) for number in range(len(plan.sources)) for window in plan.windows(number))
    windows = Shared(chain(together.own(plan) if together else (), alone))
    takers = together.takers(plan) if together else []
    try:
        side_by_side([("reader", read)] * reader_count(plan.wanted_bytes, plan.window_bytes, readers) + takers, stop)
    except NeighbourLost:
        if not damage:
            raise
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


def _read_alone(file: DataFile, source: Source, window: Window, lane: Lane) -> None:
    memory = lane.memory()
    if window.whole:
        file.read_block(memory, window.block, source.digests)
    else:
        file.read_runs(memory, window.start, window.reads)
    lane.take(memory, window)


def _read_for_all(file: DataFile, source: Source, window: Window, lane: Lane, together: Together) -> None:
    """From the page cache straight into the window that the others see; past it, disks are slow with the small pages of
    that, and the block comes by way of the lane's own memory."""
    if file.in_page_cache(window.start, window.stop):
        number, shared = together.window()
        file.read_block(shared, window.block, source.digests, "cache")
        lane.take(shared, window)
        lane.wait()
    else:
        memory = lane.memory()
        file.read_block(memory, window.block, source.digests)
        lane.take(memory, window)
        number, shared = together.window()
        copy(memory, shared, window.stop - window.start)
    together.give(number, source.file, window.block)


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
