"""From an optimizer's flat memory to pieces of logical tensors, and its state to tensors and scalars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import OWNED, LivePiece
from resume_kit.errors import Problem, UsageError


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weight_spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(TensorKey("param", name), dtype_name(dtype), shape)


def flat_pieces(
    spec: TensorSpec,
    start: int,
    data: torch.Tensor,
    masters: Mapping[Box, LivePiece] | None = None,
    *,
    within: Box | None = None,
    copy: int | None = OWNED,
    restored: bool = True,
) -> Iterator[LivePiece]:
    """The pieces of a flat range of `within` (default: all of `spec`) that begins at its element `start`.

    `data` is 1-D and holds the range. `masters` are the master pieces of the same boxes.
    """
    region = within or Box.whole(spec.shape)
    position = 0
    for box in boxes_of_flat_range(region.shape, start, start + data.numel()):
        view = data.narrow(0, position, box.numel)
        moved = box if within is None else box.shifted(region.lo)
        yield LivePiece(spec, moved, view, masters[moved] if masters else None, copy, restored)
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


def make_room(state: dict[str, Any], flat: torch.Tensor, kinds: Mapping[str, str], scalars: Mapping[str, Any]) -> None:
    """Give one flat tensor's optimizer state exactly these tensors (kind → dtype) and scalars."""
    for key in set(state) - set(kinds) - set(scalars):
        del state[key]
    for kind, dtype in kinds.items():
        wanted = getattr(torch, dtype)
        live = state.get(kind)
        if not isinstance(live, torch.Tensor) or live.shape != flat.shape or live.dtype != wanted:
            state[kind] = torch.zeros_like(flat, dtype=wanted, requires_grad=False)
    for key, record in scalars.items():
        state[key] = join_scalar(record, flat)


def hyperparameters(group: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """A parameter group as plain values, without its params."""
    left_out = {"params", *without}
    plain = canonical.encode({key: value for key, value in group.items() if key not in left_out}, "param group")
    decoded: dict[str, Any] = canonical.decode(plain)
    return decoded


def set_hyperparameters(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Write saved hyperparameters into a live group, into its tensors where it holds such."""
    for key, value in values.items():
        if isinstance(group.get(key), torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def hook_updates(optimizers: Sequence[torch.optim.Optimizer], hook: Any) -> None:
    """See `EngineAdapter.before_update`; the hooks stay for as long as the optimizers live."""
    for optimizer in optimizers:
        after: list[Any] = []

        def before(opt: torch.optim.Optimizer, *_: Any, after: list[Any] = after) -> None:
            after.append(hook(opt.param_groups))

        def done(_opt: torch.optim.Optimizer, *_: Any, after: list[Any] = after) -> None:
            after.pop()()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(done)
