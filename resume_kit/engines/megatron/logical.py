"""From Megatron's local parameters to logical tensors that no parallel layout changes.

Names carry global layer and expert numbers. A gated first MLP layer holds two logical tensors, its gate and its up
projection: each tensor rank stores [its gate rows; its up rows], so as one tensor its rows would depend on the layout.
Fused layer norms of Transformer Engine get the names of their own that the local layers use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.engines.megatron.grid import Grid

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*\bexperts)\.local_experts\.(\d+)\.(.+)")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Part:
    """A logical tensor's slice inside a local parameter: elements [start, start + box.numel) of its memory."""

    name: str
    shape: tuple[int, ...]
    box: Box
    start: int


@dataclass(frozen=True, eq=False)
class LocalWeight:
    """A parameter of this rank and the logical tensors in it.

    axis: the axis that tensor parallelism splits, None where every tensor rank holds it whole.
    expert: global number of the expert that it belongs to; `spread` is then over expert-data ranks.
    later_copy: it is the last stage's copy of a tied embedding, which the first stage owns.
    chunk, order: which model chunk, and its number among that chunk's parameters.
    """

    weight: torch.nn.Parameter
    physical: str
    parts: tuple[Part, ...]
    axis: int | None
    layer: int | None
    expert: int | None
    later_copy: bool
    chunk: int
    order: int

    def spread(self, grid: Grid) -> tuple[int, int]:
        """(rank, size) of the data-parallel ranks that hold the same slice."""
        if self.expert is not None:
            return grid.expert_data_rank, grid.expert_data
        return grid.data_rank, grid.data

    def tensor_copy(self, grid: Grid) -> int:
        """Number of this rank's copy among the tensor ranks; 0 where they split the tensor."""
        if self.axis is not None:
            return 0
        return grid.expert_tensor_rank if self.expert is not None else grid.tensor_rank


def unwrapped(chunk: torch.nn.Module) -> Any:
    """The model inside DistributedDataParallel and Float16Module."""
    inner: Any = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def local_weights(chunks: Sequence[Any], grid: Grid) -> list[LocalWeight]:
    """All parameters of this rank, in the order in which Megatron builds its buffers."""
    found: list[LocalWeight] = []
    for number, chunk in enumerate(chunks):
        model = unwrapped(chunk)
        config = model.config
        layers = {name: module.layer_number - 1 for name, module in model.named_modules() if _is_layer(module)}
        experts = max(1, (config.num_moe_experts or 0) // grid.expert)
        tied = bool(getattr(model, "share_embeddings_and_output_weights", False)) and grid.pipeline > 1
        for order, (name, weight) in enumerate(model.named_parameters()):
            found.append(
                _local_weight(
                    name,
                    weight,
                    layers,
                    experts,
                    grid,
                    tied=tied,
                    gated=config.gated_linear_unit,
                    place=(number, order),
                )
            )
    return found


def _is_layer(module: torch.nn.Module) -> bool:
    return hasattr(module, "layer_number") and hasattr(module, "self_attention")


def _local_weight(
    name: str,
    weight: torch.nn.Parameter,
    layers: dict[str, int],
    local_experts: int,
    grid: Grid,
    *,
    tied: bool,
    gated: bool,
    place: tuple[int, int],
) -> LocalWeight:
    physical, layer = _global_layer(name, layers)
    physical, expert = _global_expert(physical, local_experts, grid)
    later_copy = tied and physical == "output_layer.weight"
    if later_copy:
        physical = "embedding.word_embeddings.weight"
    axis = int(weight.partition_dim) if getattr(weight, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]
    size, rank = grid.tensor, grid.tensor_rank
    if expert is not None:
        size, rank = grid.expert_tensor, grid.expert_tensor_rank
    suffixes: tuple[str, ...] = ("",)
    if gated and re.search(r"\blinear_fc1\.(weight|bias)$", physical):
        suffixes = (".gate", ".up")
    rows = weight.shape[0] // len(suffixes) if weight.dim() else 1
    local = torch.Size((rows, *weight.shape[1:])) if weight.dim() else weight.shape
    shape = tuple(extent * (size if a == axis else 1) for a, extent in enumerate(local))
    offset = tuple(rank * extent if a == axis else 0 for a, extent in enumerate(local))
    box = Box.whole(local).shifted(offset)
    parts = tuple(Part(physical + suffix, shape, box, number * local.numel()) for number, suffix in enumerate(suffixes))
    return LocalWeight(weight, physical, parts, axis, layer, expert, later_copy, *place)


def _global_layer(name: str, layers: dict[str, int]) -> tuple[str, int | None]:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, None
    stack, local, rest = match.groups()
    layer = layers[f"{stack}.{local}"]
    for fused, plain in _FUSED_NORMS.items():
        if rest.startswith(fused):
            rest = plain + rest.removeprefix(fused)
    return f"{stack}.{layer}.{rest}", layer


def _global_expert(name: str, local_experts: int, grid: Grid) -> tuple[str, int | None]:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name, None
    experts, local, rest = match.groups()
    expert = grid.expert_rank * local_experts + int(local)
    return f"{experts}.{expert}.{rest}", expert


def keep_float_biases(chunks: Sequence[Any]) -> None:
    """Let expert routers bring their bias back to fp32 now, as they do by themselves at their first forward."""
    for chunk in chunks:
        for module in unwrapped(chunk).modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()


def local_buffers(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers of this rank's layers by global name (the bias of an expert router)."""
    for chunk in chunks:
        model = unwrapped(chunk)
        layers = {name: module.layer_number - 1 for name, module in model.named_modules() if _is_layer(module)}
        for module_name, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield _global_layer(f"{module_name}.{name}", layers)[0], buffer
