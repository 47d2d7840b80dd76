"""The heart of the suite: systems save and load in turns, in one process group, and the floors beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.peers.peer import System
from benchmarks.suite import floors, memory, storage
from benchmarks.suite.results import Row
from benchmarks.suite.tables import RAW_READ, RAW_WRITE
from benchmarks.suite.timing import Clock, SystemFailed


class Turns:
    """Saves and loads of several systems on one file system.

    step: trains one step and returns the number of steps taken, so that every save is of a state of its own.
    rows: one for each system, in the same order.
    """

    def __init__(
        self, clock: Clock, step: Callable[[], int], systems: Sequence[System], rows: Sequence[Row], folder: Path
    ) -> None:
        self._clock, self._step, self._folder = clock, step, folder
        self._active = [(system, row) for system, row in zip(systems, rows, strict=True) if not row.failure]
        self._cannot_load: set[str] = set()
        self._floors: _Floors | None = None
        self.floor_rows: list[Row] = []

    def take(self, *, first: bool, late: Callable[[str], bool] = lambda _: False) -> None:
        """One repeat: every system once, then the floors with as many bytes as the kit wrote.

        late: asked before each peer, but in the first repeat, whether there is no time for it and for those after it.
        """
        for system, row in list(self._active):
            if system.group == "peer" and not first and late(system.name):
                break
            try:
                self._save(system, row, first)
                if system.loads and system.name not in self._cannot_load:
                    self._load(system, row, first)
            except SystemFailed as failed:
                row.failure = str(failed)
                self._active.remove((system, row))
            self.discard(system)
        if self._floors is None:
            self._floors = _Floors(self._clock, self._folder, self._bytes_of_ours(), self._active)
            self.floor_rows = self._floors.rows
        self._floors.take(first=first)

    @property
    def active(self) -> list[System]:
        """Those that have not failed."""
        return [system for system, _ in self._active]

    @property
    def ways(self) -> dict[str, str]:
        """How the floors wrote and read best."""
        return self._floors.ways if self._floors else {}

    def discard(self, system: System) -> None:
        """Delete what a system need not keep. Collective."""
        self._clock.barrier()
        if self._clock.rank == 0:
            system.trim()
        self._clock.barrier()

    def _save(self, system: System, row: Row, first: bool) -> None:
        clock, step = self._clock, self._step()
        took: list[float] = []

        def save() -> None:
            system.save(step)
            took.append(time.perf_counter() - start)
            system.wait()

        clock.barrier()
        with memory.watched() as growth:
            start = time.perf_counter()
            clock.attempt(save)
            if not system.fsyncs:  # all ranks have written: what they failed at, `attempt` has told
                clock.attempt(partial(_once_a_host, storage.sync, system.folder()))
            took.append(time.perf_counter() - start)
        blocking, durable, *_ = clock.slowest(took)
        seconds = {"blocking": blocking, "durable": durable, **clock.slowest_of(system.details())}
        row.add(seconds, first=first)
        row.nbytes = system.nbytes()
        resident, pinned = clock.slowest([growth.resident, growth.pinned])
        name = "resident growth of the first save" if first else "resident growth"
        row.most({name: resident, "pinned": pinned})

    def _load(self, system: System, row: Row, first: bool) -> None:
        clock = self._clock
        found: dict[str, float] = {}

        def load() -> None:
            start = time.perf_counter()
            better = system.load()
            clock.synchronize()
            found.update({"load": time.perf_counter() - start, **better})

        _once_a_host(storage.drop_cached, system.folder())
        clock.barrier()
        try:
            clock.attempt(load)
        except SystemFailed as failed:
            row.failure = f"load: {failed}"
            self._cannot_load.add(system.name)
            return
        row.add(clock.slowest_of(found), first=first)

    def _bytes_of_ours(self) -> int:
        """Bytes a rank of the kit's save, or of another system's where the kit has none."""
        ours = [row.nbytes for _, row in self._active if row.group == "ours" and row.nbytes]
        known = ours or [row.nbytes for _, row in self._active if row.nbytes] or [1 << 20]
        return -(-known[0] // self._clock.world_size)


class _Floors:
    """Raw files and copies of `nbytes` a rank, in the ways that a pilot finds to be best."""

    def __init__(self, clock: Clock, folder: Path, nbytes: int, rows: Sequence[tuple[System, Row]]) -> None:
        self._clock, self._nbytes = clock, nbytes
        part, target = (rows[0][1].part, rows[0][1].target) if rows else ("", "")
        self._path = folder / f"raw-{clock.rank}"
        pilot = floors.pilot_bytes(nbytes)
        self._write = floors.choose(self._together(lambda way: floors.write(self._path, pilot, way)), clock.slowest)
        floors.write(self._path, pilot, self._write)
        self._read = floors.choose(self._together(lambda way: floors.read(self._path, way)), clock.slowest)
        self._path.unlink(missing_ok=True)
        self._copies = floors.Copies(clock.device, nbytes).measures()
        self.ways = {"write floor": str(self._write), "read floor": str(self._read)}
        total = nbytes * clock.world_size

        def row(system: str, note: str = "") -> Row:
            return Row(part, target, "floor", system, nbytes=total, note=note)

        files = [row(RAW_WRITE, str(self._write)), row(RAW_READ, str(self._read))]
        self.rows = [*files, *(row(name) for name in self._copies)]

    def _together(self, measure: Callable[[floors.Way], float]) -> Callable[[floors.Way], float]:
        def begun_together(way: floors.Way) -> float:
            self._clock.barrier()
            return measure(way)

        return begun_together

    def take(self, *, first: bool) -> None:
        clock, (written, read, *copies) = self._clock, self.rows
        clock.barrier()
        written.add({"durable": clock.slowest([floors.write(self._path, self._nbytes, self._write)])[0]}, first=first)
        clock.barrier()
        read.add({"load": clock.slowest([floors.read(self._path, self._read)])[0]}, first=first)
        with suppress(FileNotFoundError):
            self._path.unlink()
        for row, measure in zip(copies, self._copies.values(), strict=True):
            clock.barrier()
            row.add({"seconds": clock.slowest([measure()])[0]}, first=first)


def _once_a_host(work: Callable[[Path], None], folder: Path) -> None:
    """On the first rank of each host: what one host has cached, another cannot flush or drop."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        work(folder)
