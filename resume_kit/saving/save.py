"""The background's part of a save, from captured state to a committed checkpoint, in four rounds of all ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from resume_kit.algebra import fingerprint
from resume_kit.checkpoint import canonical, files, names
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.writing import ImageFile
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.totals import totals_of
from resume_kit.errors import Fenced, InconsistentState, Problem, ResumeKitError, SaveFailed
from resume_kit.recovery.attempts import fencing
from resume_kit.saving.capture import Capture, FailedCapture, SaveRequest
from resume_kit.saving.commit import commit_checkpoint
from resume_kit.saving.copies import require_casts, require_equal_copies
from resume_kit.saving.measure import Measured


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: where it is, its bytes over all ranks, and seconds by phase on this rank.

    The phases: gate and capture (in the training thread), agree, stage (until every copy lies in host memory), write
    (until this rank's files are durable), commit (until the checkpoint is). `durable` is their sum.
    """

    directory: Path
    step: int
    total_bytes: int
    seconds: Mapping[str, float]


class SaveJournal(Protocol):
    """Is told of a save on rank 0, in the background."""

    def begun(self, request: SaveRequest) -> None: ...

    def published(self, request: SaveRequest, commit: Commit) -> None: ...


class Progress:
    """How far a save is: `staged` once the live state is no longer needed, and seconds by phase since it began."""

    def __init__(self, began: float, gate: float) -> None:
        self.staged = threading.Event()
        self.seconds: dict[str, float] = {}
        self._began, self._last = began, began + gate
        self.seconds["gate"] = gate
        self.lap("capture")

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    def sum(self) -> dict[str, float]:
        return {**self.seconds, "durable": self._last - self._began}


def finish(
    capture: Capture | FailedCapture,
    coordinator: Coordinator,
    journal: SaveJournal,
    progress: Progress,
) -> Commit:
    """Stage, write and commit. Collective, over the store alone, so that it may run beside training.

    Raises the same error on every rank: `InconsistentState` when the live state contradicts itself, `SaveFailed`
    when it could not be written, `Fenced` when a newer attempt has taken the ground in which it was prepared. In each
    case nothing was committed and older checkpoints stand, unless it is the journal that fails once the checkpoint
    stands.
    """
    if isinstance(capture, FailedCapture):
        failure = capture.failure
        coordinator.round("save: agree", lambda: _raise(failure), lambda _: None)
        raise AssertionError("unreachable: this rank's capture failed")
    request = capture.account.request
    staging = request.ground / names.step_directory(request.step)
    fenced = fencing(request.ground)
    made: list[ImageFile] = []
    try:
        coordinator.round(
            "save: agree",
            lambda: _account(capture),
            lambda accounts: fenced(_agree)(accounts, request, staging, journal),
        )
        progress.lap("agree")
        found: list[Measured] = []
        sums = coordinator.round(
            "save: stage",
            lambda: fenced(_stage)(capture, staging, coordinator.rank, made, found, progress),
            lambda staged: _compare(capture, staged),
        )
        progress.lap("stage")
        measured, copied = found[0], capture.plan.copied
        totals = totals_of(sums, copied.keys, copied.copies)
        require_equal_copies(capture.holdings, capture.plan, measured, totals, coordinator)
        total_bytes = coordinator.round(
            "save: commit",
            lambda: fenced(_write)(
                capture, measured, coordinator.rank, coordinator.world_size, made[0], staging, progress
            ),
            lambda written: fenced(commit_checkpoint)(capture, written, staging),
        )
        progress.lap("commit")
    except Exception:
        for image in made:
            image.abandon()
        if coordinator.rank == 0 and staging.is_dir():
            with suppress(OSError):  # what cannot be removed now is a torn directory; the next start removes it
                files.remove_checkpoint(staging, staging.parent)
        raise
    result = Commit(request.directory / names.step_directory(request.step), request.step, total_bytes, progress.sum())
    try:
        coordinator.on_rank_zero("save: published", lambda: journal.published(request, result))
    except Fenced:
        raise
    except ResumeKitError as error:
        headline = (
            f"the checkpoint of step {request.step} stands, but not every rank or the journal knows: {error.headline}"
        )
        raise SaveFailed(headline, error.problems) from error
    return result


def _raise(failure: Exception) -> None:
    raise failure


def _account(capture: Capture) -> dict[str, Any]:
    """What the ranks compare before anything is written."""
    request = capture.account.request
    shared = {"step": request.step, **request.state, "data position": request.data["position"]}
    return {
        "parts": {part: canonical.value_digest(value) for part, value in shared.items()},
        "step": request.step,
        "replicas": [str(replica.spec) for replica in capture.holdings.replicas],
        "bytes": capture.plan.layout.size,
    }


def _agree(accounts: list[dict[str, Any]], request: SaveRequest, staging: Path, journal: SaveJournal) -> None:
    """On rank 0: compare the ranks' accounts, and make the directory."""
    journal.begun(request)
    first = accounts[0]
    problems = []
    for rank, account in enumerate(accounts):
        for part, digest in account["parts"].items():
            if digest != first["parts"].get(part):
                what = "differs from rank 0's"
                if part == "step":
                    what = f"rank {rank} is at step {account['step']}, rank 0 at step {first['step']}"
                problems.append(Problem("agreement", f"rank {rank}, {part}", what, "find out which rank went astray"))
        if account["replicas"] != first["replicas"]:
            problems.append(Problem("agreement", f"rank {rank}", "it holds other tensors than rank 0"))
    if problems:
        raise InconsistentState("the ranks disagree; nothing was saved", problems)
    files.require_space(request.directory, sum(account["bytes"] for account in accounts))
    if staging.is_dir():
        files.remove_checkpoint(staging, staging.parent)
    try:
        staging.mkdir()
    except OSError as error:
        raise files.write_failed(staging, error, 0) from error


def _stage(
    capture: Capture,
    staging: Path,
    rank: int,
    made: list[ImageFile],
    found: list[Measured],
    progress: Progress,
) -> dict[str, Any]:
    """Hand every block to the writers as soon as it lies in host memory, and read what was measured."""
    plan, holdings = capture.plan, capture.holdings
    made.append(ImageFile(staging / names.data_file(rank), plan.layout.size))
    for block in capture.staging.blocks(capture.header):
        made[0].submit(block.number, block.memory, block.free)
    measurement = capture.measured or capture.measuring.run()
    found.append(Measured.of(measurement, plan))
    sums = measurement.sums.tolist()
    progress.staged.set()  # from here on nothing live is read
    require_casts(holdings, plan, found[0], rank)
    return {
        "sums": sums,
        "added": capture.measured is not None,
        "replicas": [fingerprint.to_hex(value) for value in found[0].replicas],
    }


def _compare(capture: Capture, staged: list[dict[str, Any]]) -> list[list[int]]:
    """On rank 0: what all ranks hold whole must be alike. Returns the sums over copies of all ranks."""
    problems = []
    for number, replica in enumerate(capture.holdings.replicas):
        if replica.spec.key in capture.differing:
            continue
        values = [row["replicas"][number] for row in staged]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            what = f"rank {odd[0]}'s copy is not rank 0's: the replicas have drifted apart"
            problems.append(
                Problem("replicas", str(replica.spec.key), what, "resume from the last commit; suspect that GPU")
            )
    if problems:
        raise InconsistentState("replicas have drifted apart; nothing was saved", problems)
    if staged[0]["added"]:
        sums: list[list[int]] = staged[0]["sums"]
        return sums
    return [
        [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*(s["sums"] for s in staged), strict=True)
    ]


def _write(
    capture: Capture,
    measured: Measured,
    rank: int,
    world_size: int,
    image: ImageFile,
    staging: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Wait for the data file, write the index; return what the manifest says of it."""
    account, request, every = capture.account, capture.account.request, capture.holdings.every
    index = RankIndex(
        run_id=request.run_id,
        attempt=request.attempt,
        step=request.step,
        rank=rank,
        world_size=world_size,
        data=image.finish(),
        pieces=tuple(
            StoredPiece(
                every[number].spec,
                every[number].box,
                fingerprint.to_hex(measured.values[number]),
                offset,
                0 if offset is None else every[number].box.numel * every[number].spec.itemsize,
            )
            for number, offset in zip(capture.plan.saved, capture.plan.offsets, strict=True)
        ),
        scalars=canonical.encode(account.scalars, "optimizer scalars"),
        rng=dict(account.rng),
        carried=tuple(dict(carried.records) for carried in request.carried),
    )
    raw = index.to_bytes()
    files.write_durably(staging / names.index_file(rank), raw)
    files.fsync_directory(staging)
    progress.lap("write")
    return {"bytes": len(raw), "digest": canonical.digest(raw)}
