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

#: `forward(module, batch) -> loss` (0-d tensor), used for the gate.
Forward = Callable[[torch.nn.Module, Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LivePiece:
    """A box of a logical tensor that this rank owns, and the memory that holds it.

    `data` is a contiguous 1-D view of box.numel elements of the engine's own memory, in C order: writing to it
    changes the live state. `cast_of` is the master piece of the same box, for a low-precision weight.
    """

    spec: TensorSpec
    box: Box
    data: torch.Tensor
    cast_of: LivePiece | None = None


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
    """

    weights: tuple[TensorSpec, ...]
    trainable: frozenset[str]
    master_dtypes: Mapping[str, str]
    buffers: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    groups: tuple[Mapping[str, Any], ...]
    pinned: Mapping[str, Any] = field(default_factory=dict)


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
    def learning_rate(self) -> float: ...

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step; None where the engine did not compute one."""

    def describe(self) -> ModelDescription:
        """The model and optimizer as constructed. Called once, before any training or load."""

    def pieces(self) -> list[LivePiece]:
        """All pieces that this rank owns, masters before what was cast from them."""

    def replicas(self) -> list[Replica]:
        """All tensors that this rank holds whole, in the same order on every rank."""

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Optimizer scalars (Adam's step) of each trainable tensor of which this rank owns a piece."""

    def state(self) -> dict[str, Any]:
        """What all ranks share: param groups, counters, LR scheduler, loss scaler. JSON-able by `canonical`."""

    def prepare_load(self, kinds: Mapping[str, Mapping[str, str]], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        """Make room for optimizer tensors (name → kind → dtype), so that `pieces` lists them."""

    def publish(self) -> None:
        """After owned pieces were written: bring every copy that follows from them up to date. Collective."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""

    def rng_trackers(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
        """The engine's own generators: name → (get state, set state), states as bytes."""

    def run_gate(self, forward: Forward, batch: Any) -> GateResult:
        """A forward/backward of `batch` that leaves no trace. Collective; the same batch on every rank."""
