"""How a ZeRO optimizer's flat partitions hold the logical tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import LivePiece, Replica
from resume_kit.errors import Problem, UsageError


@dataclass(frozen=True, eq=False)
class Fragment:
    """The elements [start, start+numel) of a flattened weight that this rank owns.

    They lie at [flat_start, flat_start+numel) of `flat`, the tensor that the real optimizer updates;
    `low_precision` is the view of the same elements of the weight itself.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    flat: torch.Tensor
    flat_start: int
    start: int
    numel: int
    low_precision: torch.Tensor


class Partitioning(Protocol):
    """One ZeRO stage's layout on this rank."""

    @property
    def base(self) -> torch.optim.Optimizer:
        """The real optimizer."""

    def members(self) -> list[list[str]]:
        """Names of the trainable weights of each parameter group."""

    def flats(self) -> list[tuple[int, torch.Tensor]]:
        """(group, flat tensor) of every tensor that the real optimizer updates on this rank."""

    def fragments(self) -> list[Fragment]: ...

    def frozen(self) -> tuple[list[LivePiece], list[Replica]]:
        """Weights outside the optimizer: as owned pieces or as replicas."""

    def copies(self) -> list[Replica]:
        """Whole low-precision weights on this rank that follow from the fragments."""

    def publish(self) -> None:
        """Bring `copies` up to date with the owned low-precision fragments. Collective."""

    def settle(self) -> None:
        """Free what a forward/backward outside of training has gathered. Collective."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weight_spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(TensorKey("param", name), dtype_name(dtype), shape)


def flat_pieces(
    spec: TensorSpec, start: int, data: torch.Tensor, masters: Mapping[Box, LivePiece] | None = None
) -> Iterator[LivePiece]:
    """The pieces of a flat range of `spec` that begins at element `start` and lies in 1-D `data`, in order."""
    position = 0
    for box in boxes_of_flat_range(spec.shape, start, start + data.numel()):
        view = data.narrow(0, position, box.numel)
        yield LivePiece(spec, box, view, masters[box] if masters else None)
        position += box.numel


def split_state(
    flat: torch.Tensor, state: Mapping[str, Any], owner: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One flat tensor's optimizer state as (elementwise tensors, encoded scalars).

    Raises `UsageError` for a tensor that is neither: it has no place in a layout-free checkpoint.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == flat.shape and value.dim() > 0:
            tensors[key] = value.detach()
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            place = "cpu" if value.device.type == "cpu" else "param"
            scalars[key] = {"dtype": dtype_name(value.dtype), "value": value.item(), "device": place}
        elif isinstance(value, bool | int | float):
            scalars[key] = {"value": value}
        else:
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            problem = Problem(
                "optimizer layout",
                f"{owner}, state {key!r}",
                f"it is {shape}, neither one value per element of the weights nor a single number",
                "use an optimizer with elementwise state (Adam, AdamW, SGD, Lion, Adagrad)",
            )
            raise UsageError("this optimizer's state cannot be saved free of its layout", [problem])
    return tensors, scalars


def join_scalar(record: Mapping[str, Any], flat: torch.Tensor) -> Any:
    """The inverse of the scalar encoding of `split_state`."""
    if "dtype" not in record:
        return record["value"]
    device = flat.device if record["device"] == "param" else torch.device("cpu")
    return torch.tensor(record["value"], dtype=getattr(torch, record["dtype"]), device=device)
