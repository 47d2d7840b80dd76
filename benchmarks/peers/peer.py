"""What the suite asks of a system that saves and loads, the kit included."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from benchmarks.suite.results import Group
from benchmarks.suite.storage import size_of
from benchmarks.suite.workloads import Workload


class System(Protocol):
    """A way to save and load a workload's state. Every call is made on all ranks, in the same order.

    name: in tables. group: the kit's own ways are `ours`. fsyncs: whether `wait` leaves durable files; where it does
    not, the suite fsyncs them and counts that in. loads: whether `load` is measured too.
    """

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> Group: ...

    @property
    def note(self) -> str: ...

    @property
    def fsyncs(self) -> bool: ...

    @property
    def loads(self) -> bool: ...

    def available(self) -> str | None:
        """Why it cannot run here; None if it can. No collectives."""

    def save(self, step: int) -> None:
        """Save the live state, as of `step`; return when training may go on."""

    def wait(self) -> None:
        """Return when the save is complete."""

    def folder(self) -> Path:
        """Where the newest save lies."""

    def load(self) -> Mapping[str, float]:
        """Load the newest save into the live state. Seconds by metric, where it knows better than the whole call."""

    def nbytes(self) -> int:
        """Bytes of the newest save's files, of all ranks."""

    def trim(self) -> None:
        """Delete what is not needed any more. On one rank."""

    def details(self) -> Mapping[str, float]:
        """Seconds of the newest save's phases, by name."""

    def close(self) -> None:
        """Give back what it holds."""


class Peer(ABC):
    """What peers have in common: a folder a step, no phases, nothing to close. `key` names it on the command line."""

    key: ClassVar[str]
    name: ClassVar[str]
    engines: ClassVar[frozenset[str]] = frozenset({"deepspeed", "megatron"})
    group: ClassVar[Group] = "peer"
    note: ClassVar[str] = ""
    fsyncs: ClassVar[bool] = False
    loads: ClassVar[bool] = True

    def __init__(self, workload: Workload, root: Path) -> None:
        self.workload = workload
        self._root = root / self.key
        self._step = 0

    def available(self) -> str | None:
        return None

    def begin(self, step: int) -> Path:
        """The folder of a new save. It may not exist yet; its parent does."""
        self._root.mkdir(parents=True, exist_ok=True)
        self._step = step
        return self.folder()

    @abstractmethod
    def save(self, step: int) -> None: ...

    @abstractmethod
    def load(self) -> Mapping[str, float]: ...

    def folder(self) -> Path:
        return self._root / f"step-{self._step}"

    def wait(self) -> None:
        return

    def nbytes(self) -> int:
        return size_of(self.folder())

    def trim(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def details(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        return
