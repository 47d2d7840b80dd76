"""Error-transparent rounds of all ranks over the c10d store.

In a round each rank computes something, rank 0 combines what all computed, and every rank gets the result.
If any rank fails, or rank 0 does while combining, every rank raises the same error. A rank that does not
arrive within the bound is named. No collective is used, so nothing here can deadlock a process group.
The idea of error-transparent named steps is torch DCP's.
"""

from __future__ import annotations

import atexit
import itertools
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from resume_kit import errors
from resume_kit.checkpoint import canonical
from resume_kit.errors import Problem, RanksFailed, ResumeKitError

T = TypeVar("T")
R = TypeVar("R")

#: Seconds that rank 0 waits for the others to have read an error.
_GRACE = 5.0

#: The same at the end of a run.
_FAREWELL = 60.0

#: Coordinators are made in the same order on every rank; each has keys of its own in the shared store.
_instances = itertools.count()

_ERRORS: dict[str, type[ResumeKitError]] = {
    cls.__name__: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, ResumeKitError) and cls is not RanksFailed
}


class Coordinator:
    """Rounds among `world_size` ranks. Every rank must call the same rounds in the same order.

    `timeout` (seconds) bounds every wait.
    """

    def __init__(self, store: c10d.Store, *, rank: int, world_size: int, timeout: float = 600.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._store = store
        self._round = 0
        self._read_by_all: str | None = None

    @classmethod
    def of_default_group(cls, *, timeout: float = 600.0) -> Coordinator:
        """The coordinator of the initialised default process group, or of this single process without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(
                dist.HashStore(),  # type: ignore[attr-defined]
                rank=0,
                world_size=1,
                timeout=timeout,
            )
        store = c10d.PrefixStore(f"resume_kit/{next(_instances)}", c10d._get_default_store())
        found = cls(store, rank=dist.get_rank(), world_size=dist.get_world_size(), timeout=timeout)
        atexit.register(found._leave)
        return found

    def twin(self) -> Coordinator:
        """A coordinator of the same ranks for another thread: a connection and keys of its own.

        Every rank must make its twins in the same order. One thread's wait never holds up the other's.
        """
        connection = self._store.clone()  # type: ignore[attr-defined]
        store = c10d.PrefixStore(f"twin/{next(_instances)}", connection)
        return Coordinator(store, rank=self.rank, world_size=self.world_size, timeout=self.timeout)

    def section(self, name: str) -> Coordinator:
        """Rounds counted from the beginning, under keys of their own, over the same connection.

        For work that some rank may leave early: what comes after it is not out of step.
        """
        store = c10d.PrefixStore(name, self._store)
        return Coordinator(store, rank=self.rank, world_size=self.world_size, timeout=self.timeout)

    def round(self, name: str, local: Callable[[], T], combine: Callable[[list[T]], R]) -> R:
        """Run `local` on every rank and `combine` on rank 0; return `combine`'s result on every rank.

        Values travel as canonical JSON. Raises the ranks' common error class, or `RanksFailed`.
        """
        try:
            return self._exchange(name, local, combine)
        except dist.DistNetworkError as error:
            atexit.unregister(self._leave)  # nobody is left to hear it
            what = f"the connection to the store of the process group broke: {error}"
            remedy = "the process that keeps the store has ended: look at rank 0's log, or that of the launcher's agent"
            problem = Problem(name, f"rank {self.rank}", what, remedy)
            raise ResumeKitError(f"{name}: the store is gone", [problem]) from error

    def _exchange(self, name: str, local: Callable[[], T], combine: Callable[[list[T]], R]) -> R:
        self._round += 1
        prefix = f"{self._round}/{name}"
        try:
            mine: dict[str, Any] = {"value": canonical.encode(local(), name)}
            cause: BaseException | None = None
        except Exception as error:  # every failure must reach the other ranks
            mine, cause = {"error": _pack(error)}, error
        self._store.set(f"{prefix}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            try:
                answers = self._collect(prefix, name)
                result = {"value": canonical.encode(combine([canonical.decode(a) for a in answers]), name)}
            except Exception as error:
                result, cause = {"error": _pack(error)}, error if cause is None else cause
            self._store.set(f"{prefix}/result", json.dumps(result))
        else:
            result = self._wait(f"{prefix}/result", name)
        self._forget(prefix)
        if "error" in result:
            self._acknowledge(prefix)
            raise _unpack(result["error"]) from cause
        value: R = canonical.decode(result["value"])
        return value

    def gather(self, name: str, local: Callable[[], T]) -> list[T]:
        """What every rank computed, in rank order, on every rank."""
        return self.round(name, local, lambda values: values)

    def on_rank_zero(self, name: str, work: Callable[[], R]) -> R:
        """Run `work` on rank 0 alone; every rank gets its result or its error."""
        return self.round(name, lambda: None, lambda _: work())

    def depart(self) -> None:
        """The last call before the process ends: rank 0 stays until the others have read the last result.

        A process that ends without it makes up for it, but does not stay as long.
        """
        self._leave(_FAREWELL)

    def _leave(self, bound: float = _GRACE) -> None:
        atexit.unregister(self._leave)
        with suppress(RuntimeError):  # a rank that comes too late finds the store gone, and has nothing left to read
            self._acknowledge("depart", bound)

    def _collect(self, prefix: str, name: str) -> list[Any]:
        deadline = time.monotonic() + self.timeout
        values: list[Any] = []
        failures: list[tuple[int, dict[str, Any]]] = []
        for rank in range(self.world_size):
            try:
                answer = self._wait(f"{prefix}/{rank}", name, deadline)
            except ResumeKitError as missing:
                answer = {"error": _pack(missing)}
            if "error" in answer:
                failures.append((rank, answer["error"]))
            else:
                values.append(answer["value"])
        if failures:
            raise _merge(name, failures)
        return values

    def _wait(self, key: str, name: str, deadline: float | None = None) -> dict[str, Any]:
        left = self.timeout * 2 if deadline is None else max(deadline - time.monotonic(), 0.01)
        try:
            self._store.wait([key], timedelta(seconds=left))
            answer: dict[str, Any] = json.loads(self._store.get(key))
        except dist.DistNetworkError:
            raise
        except (RuntimeError, ValueError) as error:
            who = key.rsplit("/", 1)[1]
            late = "rank 0 sent no result" if who == "result" else f"rank {who} did not arrive"
            problem = Problem(
                name,
                f"rank {self.rank}",
                f"{late} within {left:.0f} s",
                "look at that rank's log: it is dead, hung, or took another path",
            )
            raise ResumeKitError(f"{name}: a rank is missing", [problem]) from error
        return answer

    def _acknowledge(self, prefix: str, bound: float = _GRACE) -> None:
        """Rank 0, whose process may hold the store, lets the others read it before it goes on to end."""
        if self.rank:
            self._store.set(f"{prefix}/{self.rank}/seen", "")
            return
        seen = [f"{prefix}/{rank}/seen" for rank in range(1, self.world_size)]
        with suppress(RuntimeError, ValueError):  # a rank that died never answers
            self._store.wait(seen, timedelta(seconds=min(bound, self.timeout))) if seen else None
        for key in seen:
            self._store.delete_key(key)

    def _forget(self, prefix: str) -> None:
        """Delete this rank's key of this round; rank 0 also the result of the round before, which all have read."""
        if self.rank == 0:
            for rank in range(self.world_size):
                self._store.delete_key(f"{prefix}/{rank}")
            if self._read_by_all is not None:
                self._store.delete_key(f"{self._read_by_all}/result")
            self._read_by_all = prefix


def _pack(error: Exception) -> dict[str, Any]:
    if isinstance(error, ResumeKitError):
        problems = [[p.check, p.where, p.what, p.remedy] for p in error.problems]
        packed: dict[str, Any] = {"type": type(error).__name__, "headline": error.headline, "problems": problems}
        if isinstance(error, RanksFailed):
            packed["step"], packed["failures"] = error.step, [[rank, what] for rank, what in error.failures]
        return packed
    return {"type": "", "headline": f"{type(error).__name__}: {error}", "problems": []}


def _unpack(packed: dict[str, Any]) -> ResumeKitError:
    if packed["type"] == "RanksFailed":
        return RanksFailed(packed["step"], [(rank, what) for rank, what in packed["failures"]])
    cls = _ERRORS.get(packed["type"], ResumeKitError)
    return cls(packed["headline"], [Problem(*problem) for problem in packed["problems"]])


def _merge(name: str, failures: list[tuple[int, dict[str, Any]]]) -> ResumeKitError:
    """One error for all ranks: of their common class where they agree on one, else `RanksFailed`.

    `Fenced` counts before all others: what fails besides, once a newer attempt has come, follows from that.
    """
    fenced = [(rank, packed) for rank, packed in failures if packed["type"] == errors.Fenced.__name__]
    failures = fenced or failures
    classes = {packed["type"] for _, packed in failures}
    if len(classes) == 1 and (cls := _ERRORS.get(next(iter(classes)))):
        problems: dict[tuple[str, str, str, str], list[int]] = {}
        for rank, packed in failures:
            for problem in packed["problems"] or [[name, "", packed["headline"], ""]]:
                problems.setdefault(tuple(problem), []).append(rank)
        merged = [
            Problem(check, _whose(ranks, where), what, remedy)
            for (check, where, what, remedy), ranks in problems.items()
        ]
        return cls(failures[0][1]["headline"], merged)
    return RanksFailed(name, [(rank, _text(packed)) for rank, packed in failures])


def _text(packed: dict[str, Any]) -> str:
    return "; ".join([packed["headline"], *(f"{where}: {what}" for _, where, what, _ in packed["problems"])])


def _whose(ranks: list[int], where: str) -> str:
    if where.startswith("rank "):
        return where
    label = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]} ({len(ranks)})"
    return f"{label}, {where}" if where else label
