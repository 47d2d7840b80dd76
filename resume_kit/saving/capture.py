"""What a save takes from the live run in the training thread, before training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines import rng
from resume_kit.engines.adapter import EngineAdapter, LivePiece, ModelDescription, Replica
from resume_kit.engines.fingerprint import fingerprints
from resume_kit.errors import InconsistentState, Problem
from resume_kit.saving.measure import Measurement, Measuring
from resume_kit.saving.plan import Holdings, SavePlan
from resume_kit.saving.staging import Staging

Held = TypeVar("Held", LivePiece, Replica)


@dataclass(frozen=True)
class SaveRequest:
    """What a save writes besides the engine's tensors. `directory` is the run directory, `ground` where this attempt
    prepares a checkpoint: on the same file system.

    `updates` counts those that the optimizer's state must show; `carried` are this rank's share of RNG records of
    other topologies; `gate_seconds` is what the gate's record took.
    """

    directory: Path
    ground: Path
    run_id: str
    attempt: int
    step: int
    description: ModelDescription
    state: Mapping[str, Any]
    data: Mapping[str, Any]
    pinned: Mapping[str, Any]
    gate: Mapping[str, Any] | None
    updates: int
    carried: Sequence[CarriedRecords] = ()
    gate_seconds: float = 0.0


class CarriedRecords(Protocol):
    """RNG records of another topology: rank (as text) → record."""

    @property
    def topology(self) -> Mapping[str, Any]: ...

    @property
    def records(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Account:
    """The host side of a rank's state at the step boundary, and its tensors, not yet copied.

    per_rank: fingerprints of the tensors that may differ between ranks, int64 [n].
    """

    request: SaveRequest
    topology: Mapping[str, Any]
    scalars: Mapping[str, Any]
    rng: Mapping[str, Any]
    pieces: tuple[LivePiece, ...]
    replicas: tuple[Replica, ...]
    per_rank: torch.Tensor


@dataclass(frozen=True, eq=False)
class Capture:
    """All that the background needs. `measured` is None where the background takes the measurements.

    `differing` are the names of per-rank tensors that do differ between ranks; `header` the first bytes of the file.
    """

    account: Account
    holdings: Holdings
    differing: frozenset[TensorKey]
    plan: SavePlan
    header: bytes
    staging: Staging
    measuring: Measuring
    measured: Measurement | None


@dataclass(frozen=True, eq=False)
class FailedCapture:
    """A rank could not capture its state once the others had begun to: the background tells them."""

    account: Account
    failure: Exception


class Snapshots:
    """Copies of the tensors that a forward changes: buffers. Small; their memory is kept from save to save."""

    def __init__(self) -> None:
        self._kept: dict[TensorKey, torch.Tensor] = {}

    def of(self, held: Held) -> Held:
        """The same; a buffer as it is now, in memory that only the next save writes."""
        key, data = held.spec.key, held.data
        if key.kind != "buffer":
            return held
        kept = self._kept.get(key)
        if kept is None or kept.shape != data.shape or kept.dtype != data.dtype or kept.device != data.device:
            kept = self._kept[key] = torch.empty_like(data, memory_format=torch.contiguous_format)
        return replace(held, data=kept.copy_(data.detach()))


def take_account(request: SaveRequest, adapter: EngineAdapter, snapshots: Snapshots) -> Account:
    """Everything that this rank can know by itself, as copies that training does not change.

    Raises `InconsistentState` for a state that must not be saved.
    """
    if not adapter.at_step_boundary:
        raise InconsistentState("a checkpoint can only be taken between optimizer steps; gradients are pending")
    request = replace(request, state=canonical.decode(canonical.encode(dict(request.state), "state")))
    pieces = tuple(snapshots.of(piece) for piece in adapter.pieces())
    replicas = tuple(snapshots.of(replica) for replica in adapter.replicas())
    _require_known_buffers(request.description, pieces, replicas)
    mine = [replica for replica in replicas if replica.per_rank]
    return Account(
        request=request,
        topology=adapter.topology,
        scalars=adapter.scalars(),
        rng=rng.capture(adapter.rng_trackers()),
        pieces=pieces,
        replicas=replicas,
        per_rank=fingerprints((r.data.reshape(-1), r.spec.shape, Box.whole(r.spec.shape)) for r in mine),
    )


def _require_known_buffers(
    description: ModelDescription, pieces: Sequence[LivePiece], replicas: Sequence[Replica]
) -> None:
    specs = [*(piece.spec for piece in pieces), *(replica.spec for replica in replicas)]
    buffers = {spec for spec in specs if spec.key.kind == "buffer"}
    known = set(description.buffers)
    strange = buffers - known if description.partial else buffers ^ known
    if strange:
        what = "registered, removed or reshaped after the kit was made"
        problems = [
            Problem("buffers", str(spec), what, "build the whole model first") for spec in sorted(strange, key=str)
        ]
        raise InconsistentState("the model is not the one that the kit was made for", problems)
