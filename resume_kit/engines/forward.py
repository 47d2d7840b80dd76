"""What the gate runs: a batch on the engine's device, and the loss that a transformers model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def causal_lm_loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a transformers model for a batch with labels."""
    loss: torch.Tensor = module(**batch).loss
    return loss


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it, in mappings and sequences too, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
