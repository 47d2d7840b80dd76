"""What a Megatron training script hands to the kit: its model chunks, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class MegatronEngine:
    """Megatron-core's parts of one rank, and the count of its steps.

    model_chunks: this rank's DistributedDataParallel modules, one per virtual pipeline stage, in order.
    optimizer: what `get_megatron_optimizer` returned.
    scheduler: an `OptimizerParamScheduler`, or None.

    Call `stepped` after each `optimizer.step()` and the scheduler's step, before `kit.step`.
    """

    def __init__(self, model_chunks: Sequence[Any], optimizer: Any, scheduler: Any | None = None) -> None:
        self.model_chunks = list(model_chunks)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.steps = 0
        self.skipped = 0
        self.grad_norm: float | None = None

    def stepped(self, successful: bool, grad_norm: float | None) -> None:
        """Count a step; `successful` is False where the loss scaler skipped the update."""
        self.steps += 1
        self.skipped += not successful
        self.grad_norm = None if grad_norm is None else float(grad_norm)
