"""The gate's forward/backward on a DeepSpeed module, built to leave no trace.

Gradients are asked for with `torch.autograd.grad`, which does not run the gradient-accumulation nodes that ZeRO
hooks into, so no reduction starts and no buffer fills. Each weight's gradient is squared and summed in a tensor
hook and replaced by an expanded zero at once: one full gradient is alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from resume_kit.engines import rng
from resume_kit.engines.adapter import Forward, GateResult
from resume_kit.errors import Problem, UsageError

SEED = 0x5EED


def forward_backward(
    module: torch.nn.Module, forward: Forward, batch: Any, trackers: dict[str, rng.Tracker]
) -> GateResult:
    """Loss and gradient norm of `batch` in training mode from a fixed seed.

    Generators, buffers and module modes come out as they went in. Raises `UsageError` when the forward returns
    no loss or the model cannot be differentiated this way.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    squares: list[torch.Tensor] = []

    def consume(gradient: torch.Tensor) -> torch.Tensor:
        squares.append(gradient.detach().double().square().sum())
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    with rng.preserved(trackers), _buffers_preserved(module), _training(module), torch.enable_grad():
        rng.seed_all(SEED)
        loss = forward(module, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise UsageError("the gate's forward must return the loss, a tensor of one element; pass `forward=`")
        hooks = [torch.Tensor.register_hook(weight, consume) for weight in weights]  # type: ignore[no-untyped-call]
        try:
            torch.autograd.grad(loss, weights, allow_unused=True)
        except RuntimeError as error:
            if "not compatible with .grad()" not in str(error):
                raise
            problem = Problem(
                "gate",
                type(module).__name__,
                "re-entrant activation checkpointing cannot be differentiated without side effects",
                "use gradient_checkpointing_kwargs={'use_reentrant': False}, or set gate: off in the policy",
            )
            raise UsageError("the gate cannot run on this model", [problem]) from error
        finally:
            for hook in hooks:
                hook.remove()
    total = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    return GateResult(loss=float(loss.detach().double()), grad_norm=float(total))


@contextmanager
def _buffers_preserved(module: torch.nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def _training(module: torch.nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
