"""A module as text: its layers, their order and settings, whatever ZeRO-3 has gathered of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def structure(module: torch.nn.Module) -> str:
    """The module's `repr`, in which layers that print the shapes of their weights print the whole ones."""
    with _whole_shapes(module):
        return repr(module)


@contextmanager
def _whole_shapes(module: torch.nn.Module) -> Iterator[None]:
    """Partitioned weights look whole for a while: one element, repeated; no memory is filled."""
    held = [(weight, weight.data) for weight in module.parameters() if hasattr(weight, "ds_shape")]
    try:
        for weight, data in held:
            weight.data = data.new_empty(()).expand(weight.ds_shape)
        yield
    finally:
        for weight, data in held:
            weight.data = data
