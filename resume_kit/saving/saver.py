"""The saver: captures in the training thread, finishes in the background, and holds the fence between the two."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from resume_kit.checkpoint.layout import ALIGNMENT
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines import casts, fingerprint
from resume_kit.engines.adapter import EngineAdapter, ModelDescription
from resume_kit.engines.coordination import Coordinator
from resume_kit.environment import available_memory, local_world_size
from resume_kit.errors import Problem, ResumeKitError, SaveFailed, TooLittleMemory, UsageError
from resume_kit.policy.judgement import MODEL_KINDS
from resume_kit.saving.arena import Arena, memory_problems
from resume_kit.saving.capture import (
    Account,
    Capture,
    FailedCapture,
    SaveRequest,
    Snapshots,
    take_account,
)
from resume_kit.saving.measure import Gauges
from resume_kit.saving.options import Returns, Saving
from resume_kit.saving.pending import Pending
from resume_kit.saving.plan import Copied, Holdings, SavePlan, agree_on_copies, plan_save, shares_of, signature
from resume_kit.saving.save import Commit, SaveJournal
from resume_kit.saving.staging import Staging


class SaveState(IntEnum):
    """How a rank's part of a pending save stands, as the ranks tell each other."""

    RUNNING = 0
    DONE = 1
    FAILED = 2


_HANGS = Problem(
    "save",
    "",
    "its thread did not end in time; nothing more can be saved by this process",
    "look at the file system's health, then start the job again",
)


class Saver:
    """One save at a time. All ranks must call every method alike. `journal` is told of saves on rank 0."""

    def __init__(
        self,
        adapter: EngineAdapter,
        coordinator: Coordinator,
        description: ModelDescription,
        options: Saving,
        *,
        journal: SaveJournal,
    ) -> None:
        self._adapter = adapter
        self._coordinator = coordinator
        self._background = coordinator.twin()
        self._description = description
        self._options = options
        self._journal = journal
        self._device = adapter.device
        self._stream = side_stream(self._device)
        self._arena = Arena(self._device)
        self._snapshots = Snapshots()
        self._gauges = Gauges()
        self._per_rank = sum(replica.per_rank for replica in adapter.replicas())
        self._signature: list[Any] | None = None
        self._copied = Copied((), 1)
        self._plan: SavePlan | None = None
        self._sources: list[tuple[int, torch.Tensor]] = []
        self._staging: Staging | None = None
        self._layout: list[Any] | None = None
        self._pending: Pending | None = None
        self._stuck: Pending | None = None
        self._begun = 0
        self._updates = adapter.updates
        self._hooked = self._hook_ran = False
        adapter.before_update(self._fence)

    @property
    def busy(self) -> bool:
        """Whether a save has been begun whose outcome nobody has taken."""
        return self._pending is not None

    @property
    def state(self) -> SaveState:
        """How this rank's part of the pending save stands. Never waits."""
        if self._pending is None or not self._pending.over:
            return SaveState.RUNNING
        return SaveState.FAILED if self._pending.failure is not None else SaveState.DONE

    @property
    def note(self) -> str:
        """What is wrong with the host memory, if anything."""
        return self._arena.note

    @property
    def pending_step(self) -> int | None:
        return None if self._pending is None else self._pending.step

    def require_memory(self) -> None:
        """Raise `TooLittleMemory` when the ranks of this host will need more than it has. No communication."""
        expected = expected_bytes(self._holdings(self._adapter.pieces(), self._adapter.replicas()))
        more, free = self._options.arena_bytes(expected) - self._arena.nbytes, available_memory()
        problems = memory_problems(max(0, more), local_world_size(), free)
        if problems:
            raise TooLittleMemory("this host has too little memory to stage checkpoints", problems)

    def prepare(self) -> None:
        """Allocate host memory for what this rank holds now, and compile kernels, in the background."""
        holdings = self._holdings(self._adapter.pieces(), self._adapter.replicas())
        with suppress(UsageError):  # the capture raises it, where the other ranks hear of it
            self._arena.begin(self._options.arena_bytes(image_bytes(holdings)))
        if self._stream is not None:
            threading.Thread(target=_warm_up, args=(self._device,), name="warm up", daemon=True).start()

    def forget(self) -> None:
        """Let go of the engine's tensors: a load is about to replace some."""
        self._gauges = Gauges()
        self._sources = []
        self._staging = None

    def stepped(self) -> None:
        """After every optimizer step: notice whether the step's update passed the fence."""
        if self._adapter.updates != self._updates:
            self._hooked, self._updates = self._hook_ran, self._adapter.updates
        self._hook_ran = False

    def begin(self, build: Callable[[], SaveRequest], returns: Returns) -> None:
        """Capture the live state; the rest goes on in the background. The save before must have been taken.

        `build` is run first, on every rank. Raises alike on all ranks when that fails on one.
        """
        assert self._pending is None
        began = time.perf_counter()
        waits = returns != "overlapped" or not self._hooked  # no update has been seen to pass the fence
        capture = self._capture(build, waits)
        self._begun += 1  # by every rank: it names the keys of this save's rounds
        rounds = self._background.section(f"save {self._begun}")
        self._pending = Pending(capture, rounds, self._stream, self._journal, began)
        unguarded = isinstance(capture, Capture) and capture.plan.frozen  # what no update changes, a forward may
        if returns != "committed" and (waits or unguarded):
            self._pending.wait_until_staged()

    def take(self, *, failed: bool = False) -> tuple[Commit, bool]:
        """The pending save's commit, and whether it recorded the gate; waits for it.

        `failed`: the ranks have told each other that it did, on some; then one whose disk hangs is not waited for long.
        Raises its failure, alike on all ranks.
        """
        assert self._pending is not None
        pending = self._pending
        came = pending.wait(self._coordinator.timeout / 2 if failed else None)
        failures = self._coordinator.gather("save: outcome", lambda: not came or pending.failure is not None)
        self._pending = None
        pending.taken()
        failure = pending.failure
        if not came:
            self._stuck = pending
            raise SaveFailed(f"the save of step {pending.step} hangs", [_HANGS])
        if isinstance(failure, ResumeKitError):
            raise failure
        if failure is not None:
            what = f"{type(failure).__name__}: {failure}"
            raise SaveFailed(f"the save of step {pending.step} failed: {what}") from failure
        if any(failures):
            raise SaveFailed(f"the save of step {pending.step} failed on rank {failures.index(True)}; see its log")
        assert pending.commit is not None
        return pending.commit, pending.with_gate

    def close(self) -> None:
        """Give the host memory back. Nothing may be pending."""
        if self._stuck is None:
            if self._stream is not None:
                self._stream.synchronize()  # a capture that failed may have begun to copy
            self._arena.close()

    def _fence(self, _groups: list[dict[str, Any]]) -> Callable[[], None]:
        """Before each update of the real optimizer: what is being copied must not change."""
        self._hook_ran = True
        if self._pending is not None:
            self._pending.fence()
        return lambda: None

    def _capture(self, build: Callable[[], SaveRequest], waits: bool) -> Capture | FailedCapture:
        account: Account | None = None
        early: Staging | None = None
        failure: Exception | None = None
        try:
            if self._stuck is not None:
                raise SaveFailed(f"the save of step {self._stuck.step} still hangs", [_HANGS])
            early = self._copy_early(waits)
            account = take_account(build(), self._adapter, self._snapshots)
        except Exception as error:  # the others must know before they enter a collective
            failure = error
        agreed = self._exchange(account)
        if early is not None and (account is None or agreed is None or agreed[1]):
            early.abandon()  # what it has copied is overwritten, on the same stream
            early = None
        if account is None or agreed is None:
            self._coordinator.round("save: capture", lambda: _reraise(failure), lambda _: None)
            raise AssertionError("unreachable: some rank's capture failed")
        differing, changed = agreed
        if changed:
            self._copied = agree_on_copies(account.pieces, self._description, self._coordinator)
            self._layout = _layout_of(account)
        capture: Capture | FailedCapture
        try:
            capture = self._enqueue(account, differing, changed, early)
        except Exception as error:  # the others are on their way to the all-reduce below
            if self._staging is not None:
                self._staging.abandon()  # the next save copies into the same memory
            capture = FailedCapture(account, error)
        return self._reduced(capture)

    def _copy_early(self, waits: bool) -> Staging | None:
        """Start the copies that the save before made: most likely they are those of this one. No communication.

        None where they cannot begin before the state has been looked at, or a gate's forward may change some.
        """
        if self._stream is None or not self._sources or not self._adapter.at_step_boundary:
            return None
        if self._plan is None or self._plan.frozen:
            return None
        staging = self._stage(self._plan)
        if staging.bounded or not staging.from_device_alone:
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if waits:
            staging.hurry()
        staging.start(without=self._plan.snapshots)
        return staging

    def _stage(self, plan: SavePlan) -> Staging:
        """A staging of this save's sources, which is kept so that a capture that fails can end its copies."""
        memory = self._arena.memory(self._options.arena_bytes(plan.layout.size))
        self._staging = Staging(self._sources, plan.layout.size, memory, self._stream, self._coordinator.timeout)
        return self._staging

    def _enqueue(
        self, account: Account, differing: frozenset[TensorKey], changed: bool, early: Staging | None
    ) -> Capture:
        """Lay out the file, start the copies that were not started early, and the measurements. No communication."""
        holdings = self._holdings(account.pieces, account.replicas, differing)
        metadata = {
            "format": "resume_kit",
            "step": f"{account.request.step:09d}",
            "rank": str(self._coordinator.rank),
            "world_size": str(self._coordinator.world_size),
        }
        found = signature(holdings)
        if self._plan is None or changed or found != self._signature:
            self._plan, self._signature = plan_save(holdings, self._copied, metadata, self._device), found
            self._sources = []
            if early is not None:
                early.abandon()
                early = None
        plan = self._plan
        if early is None:
            self._sources = plan.sources(holdings.every)
        staging = early or self._stage(plan)
        measuring, measured = self._gauges.measuring(holdings, plan), None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            if early is None and not staging.bounded:
                staging.start()
            staging.start_rest()
            measured = measuring.run()
        header = plan.layout.relabelled(metadata)
        return Capture(account, holdings, differing, plan, header, staging, measuring, measured)

    def _reduced(self, capture: Capture | FailedCapture) -> Capture | FailedCapture:
        """On devices, the sums over copies are added up among the ranks, of which one that failed has none."""
        if self._stream is None:
            return capture
        measured = capture.measured if isinstance(capture, Capture) else None
        if self._copied.keys and dist.is_initialized():
            rows = self._copied.copies * len(self._copied.keys)
            nothing = torch.zeros(2, rows, dtype=torch.int64, device=self._device)
            dist.all_reduce(nothing if measured is None else measured.sums)
        if measured is None or isinstance(capture, FailedCapture):
            return capture
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return replace(capture, measured=replace(measured, done=done))

    def _holdings(self, pieces: Any, replicas: Any, differing: frozenset[TensorKey] = frozenset()) -> Holdings:
        rank, world_size = self._coordinator.rank, self._coordinator.world_size
        return Holdings(tuple(pieces), shares_of(replicas, differing, rank, world_size), tuple(replicas))

    def _exchange(self, account: Account | None) -> tuple[frozenset[TensorKey], bool] | None:
        """What all ranks must know before they lay out their files: (per-rank tensors that differ, changes of layout).

        One small all-reduce. None when some rank's capture failed.
        """
        figures = torch.zeros(2 + 2 * self._per_rank, dtype=torch.int64, device=self._device)
        shared: list[TensorKey] = []
        if account is None:
            figures[0] = 1
        else:
            shared = [replica.spec.key for replica in account.replicas if replica.per_rank]
            values = account.per_rank.to(self._device)
            figures[2:] = torch.cat([values, ~values])
            figures[1] = _layout_of(account) != self._layout
        if dist.is_initialized():
            dist.all_reduce(figures, dist.ReduceOp.MAX)
        failed, changed, *found = figures.tolist()
        if failed:
            return None
        highest, lowest = found[: self._per_rank], [~value for value in found[self._per_rank :]]
        return frozenset(k for k, hi, lo in zip(shared, highest, lowest, strict=True) if hi != lo), bool(changed)


def _layout_of(account: Account) -> list[Any]:
    """What the agreement on copies depends on."""
    return [(piece.spec.key, piece.copy) for piece in account.pieces]


def _warm_up(device: torch.device) -> None:
    torch.cuda.set_device(device)  # of this thread
    fingerprint.warm_up(device)
    casts.warm_up(device)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies beside training; None without a GPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def image_bytes(holdings: Holdings) -> int:
    """About the size of this rank's file: what it stores, and room for the header."""
    stored = sum(p.box.numel * p.spec.itemsize for p in holdings.every if p.owned and p.cast_of is None)
    header = 256 * len(holdings.every)
    return stored + -(-header // ALIGNMENT) * ALIGNMENT


def expected_bytes(holdings: Holdings) -> int:
    """`image_bytes` once the optimizer's state exists: before the first step, with Adam's two moments a master."""
    found = image_bytes(holdings)
    if any(piece.spec.key.kind not in MODEL_KINDS for piece in holdings.pieces):
        return found
    masters = sum(p.box.numel * p.spec.itemsize for p in holdings.pieces if p.owned and p.spec.key.kind == "master")
    return found + 2 * masters


def _reraise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
