"""The adapter contract: what the kit needs to know of an engine, and the little it asks it to do.

An adapter is an object that the user's engine is wrapped in; nothing below this folder imports an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.records import TensorSpec
from resume_kit.errors import Problem

#: `forward(module, batch) -> loss` (0-d tensor), used for the gate.
Forward = Callable[[torch.nn.Module, Any], torch.Tensor]

#: Number of the copy that the owners hold together.
OWNED = 0


@dataclass(frozen=True, eq=False)
class LivePiece:
    """A box of a logical tensor, and the memory of this rank that holds it.

    `data` is a contiguous 1-D view of box.numel elements of the engine's own memory, in C order: writing to it
    changes the live state. `cast_of` is the master piece of the same box, for a low-precision weight.

    `copy` says in which copy of the tensor the piece counts. Copy `OWNED` is saved; each further copy is proved to
    equal it, so the pieces of one copy of a tensor, over all ranks, must cover it exactly once. None: the piece
    counts in no copy, because a larger one holds its elements too.
    `restored` is False for memory that follows from other pieces when the adapter publishes them.
    """

    spec: TensorSpec
    box: Box
    data: torch.Tensor
    cast_of: LivePiece | None = None
    copy: int | None = OWNED
    restored: bool = True

    @property
    def owned(self) -> bool:
        return self.copy == OWNED


@dataclass(frozen=True, eq=False)
class Replica:
    """A logical tensor that every rank holds whole.

    `restored` is False for a copy whose content follows from pieces (a ZeRO-1/2 weight, a persistent ZeRO-3
    parameter): it is proved, not saved. `per_rank` tensors may differ between ranks (running statistics).
    """

    spec: TensorSpec
    data: torch.Tensor
    restored: bool = True
    per_rank: bool = False


@dataclass(frozen=True)
class GateResult:
    """Loss and global gradient norm of the gate's forward/backward, as Python floats."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class ModelDescription:
    """What a resume compares before it touches anything: tensors, aliases of tied weights, groups, configuration.

    `weights` are the logical parameters; `trainable` those that have a master; `groups` the optimizer's parameter
    groups as constructed, with their members' names; `pinned` free-form configuration compared field by field.
    `partial`: this rank knows a part of the model only (a pipeline stage); the ranks' parts have to be united.
    """

    weights: tuple[TensorSpec, ...]
    trainable: frozenset[str]
    master_dtypes: Mapping[str, str]
    buffers: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    groups: tuple[Mapping[str, Any], ...]
    pinned: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False


class EngineAdapter(Protocol):
    """One training engine on one rank."""

    @property
    def topology(self) -> dict[str, Any]:
        """Engine name, ZeRO stage or parallel sizes, world size: plain JSON values."""

    @property
    def device(self) -> torch.device: ...

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def updates(self) -> int:
        """Steps in which the optimizer did update: fewer than `step` where overflows were skipped."""

    @property
    def at_step_boundary(self) -> bool:
        """Whether no gradient is being accumulated."""

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss counts in the mean over ranks; False where other ranks report the same one."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step; None where the engine did not compute one."""

    @property
    def default_forward(self) -> Forward:
        """The gate's forward where the user gives none."""

    def describe(self) -> ModelDescription:
        """The model and optimizer as constructed, however far training has come. Called once by each kit."""

    def settle(self) -> None:
        """Finish what the engine has overlapped with training, so that live state can be read. Collective."""

    def pieces(self) -> list[LivePiece]:
        """All pieces that this rank holds, masters before what was cast from them."""

    def replicas(self) -> list[Replica]:
        """All tensors that every rank holds whole, in the same order on every rank."""

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Optimizer scalars (Adam's step) of each trainable tensor of which this rank holds a master piece."""

    def state(self) -> dict[str, Any]:
        """What all ranks share: param groups, counters, LR scheduler, loss scaler. JSON-able by `canonical`."""

    def prepare_load(self, kinds: Mapping[str, Mapping[str, str]], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        """Make room for optimizer tensors (name → kind → dtype), so that `pieces` lists them."""

    def publish(self) -> None:
        """After restored pieces were written: bring every copy that follows from them up to date. Collective."""

    def schedule_problems(self, saved: Mapping[str, Any], offset: int, samples_per_step: int) -> list[Problem]:
        """Why `advance_schedule` could not do it. Touches nothing."""

    def advance_schedule(self, saved: Mapping[str, Any], offset: int, samples_per_step: int) -> None:
        """Bring the live LR schedule to where the saved one stands, and `offset` steps further.

        `saved` is what `state()` was at the save; `samples_per_step` the live global batch, for a schedule that counts
        samples. Raises `UsageError` where that cannot be done.
        """

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""

    def rng_trackers(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
        """The engine's own generators: name → (get state, set state), states as bytes."""

    def rng_stream(self, generator: str) -> str:
        """Coordinates that tell this rank's stream of `generator` from others; equal where ranks must draw alike."""

    def rank_of_stream(self, generator: str, topology: Mapping[str, Any]) -> int | None:
        """A rank that had this rank's stream of `generator` in another topology; None where there was none."""

    def run_gate(self, forward: Forward, batch: Any) -> GateResult:
        """A forward/backward of `batch` that leaves no trace. Collective; the same batch on every rank."""

    def before_update(self, hook: Callable[[list[dict[str, Any]]], Callable[[], None]]) -> None:
        """Call `hook` with the real optimizers' groups before each update, and what it returns after the update.

        Hooks stay for as long as the optimizers live. A rank that updates nothing never calls them.
        """
