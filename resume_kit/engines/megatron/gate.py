"""The gate's forward/backward through all pipeline stages, built to leave no trace.

One micro-batch passes the stages in order and its gradient passes back; no schedule, no reduction of gradients, no
gradient buffer is touched: `torch.autograd.grad` does not run the nodes that Megatron's hooks hang on. The model is
in eval mode: dropout patterns and auxiliary losses depend on the topology, the rest of the computation does not.
Each weight's gradient is squared, summed and dropped, but for the few of which a rank has only a part (tied
embedding, sequence-parallel norms): those are summed over their ranks first. Every rank sees the same batch, so the
data-parallel ranks compute the same; the first one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from resume_kit.engines import rng
from resume_kit.engines.adapter import Forward, GateResult
from resume_kit.engines.megatron.engine import MegatronEngine
from resume_kit.engines.megatron.grid import Grid
from resume_kit.engines.megatron.logical import LocalWeight, unwrapped
from resume_kit.errors import UsageError

SEED = 0x5EED

_WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_AXES = 6

#: Attributes of linear layers that make a backward pass write into the gradient buffer itself.
_FUSED = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")


def forward_backward(
    engine: MegatronEngine,
    weights: Sequence[LocalWeight],
    grid: Grid,
    forward: Forward,
    batch: Any,
    trackers: dict[str, rng.Tracker],
) -> GateResult:
    """Loss and gradient norm of `batch`. Collective: all ranks, with the same batch."""
    device = weights[0].weight.device
    norm = _Norm(grid, bool(unwrapped(engine.model_chunks[0]).config.sequence_parallel), device)
    with rng.preserved(trackers), _evaluating(engine.model_chunks), torch.enable_grad():
        rng.seed_all(SEED)
        loss = _through_stages(engine, weights, grid, forward, batch, norm)
    value = torch.zeros(2, dtype=torch.float64, device=device)
    value[0] = loss if loss is not None and grid.tensor_rank == 0 and grid.data_rank == 0 else 0.0
    value[1] = norm.squares()
    dist.all_reduce(value)
    return GateResult(loss=float(value[0]), grad_norm=float(value[1].sqrt()))


@dataclass
class _Norm:
    """Sums the squares of this rank's share of the whole gradient."""

    grid: Grid
    sequence_parallel: bool
    device: torch.device
    _squares: list[torch.Tensor] = field(default_factory=list)
    _kept: list[tuple[LocalWeight, torch.Tensor, list[Any]]] = field(default_factory=list)

    def consume(self, weight: LocalWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        groups = self._partial_over(weight)

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if groups:
                self._kept.append((weight, gradient.detach().double(), groups))
            elif self._counts(weight):
                self._squares.append((gradient.detach().double() / self._times(weight)).square().sum())
            return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

        return hook

    def squares(self) -> torch.Tensor:
        for weight, gradient, groups in sorted(self._kept, key=lambda kept: (kept[0].chunk, kept[0].order)):
            for group in groups:
                dist.all_reduce(gradient, group=group)
            if self._counts(weight):
                self._squares.append((gradient / self._times(weight)).square().sum())
        return torch.stack([torch.zeros((), dtype=torch.float64, device=self.device), *self._squares]).sum()

    def _partial_over(self, weight: LocalWeight) -> list[Any]:
        """Groups of ranks that each have a part of this weight's gradient."""
        from megatron.core import parallel_state

        groups: list[Any] = []
        if self.grid.tensor > 1 and weight.expert is None:
            normed = ".q_layernorm." in weight.physical or ".k_layernorm." in weight.physical
            if (self.sequence_parallel and getattr(weight.weight, "sequence_parallel", False)) or normed:
                groups.append(parallel_state.get_tensor_model_parallel_group())
        if getattr(weight.weight, "shared_embedding", False):
            groups.append(parallel_state.get_embedding_group())
        if weight.expert is not None and self._spread_tokens:
            groups.append(parallel_state.get_expert_data_parallel_group())
        return groups

    @property
    def _spread_tokens(self) -> bool:
        """Whether an expert's ranks see only some of the tokens that the tensor ranks split among them."""
        return bool(self.grid.expert * self.grid.expert_tensor % self.grid.tensor)

    def _times(self, weight: LocalWeight) -> float:
        """How many copies of the batch the gradient is of: experts get the tokens of several data-parallel ranks."""
        if weight.expert is None:
            return 1.0
        if self._spread_tokens:
            return float(self.grid.data)
        return self.grid.expert * self.grid.expert_tensor / self.grid.tensor

    def _counts(self, weight: LocalWeight) -> bool:
        rank, _ = weight.spread(self.grid)
        return rank == 0 and weight.tensor_copy(self.grid) == 0 and not weight.later_copy


def _through_stages(
    engine: MegatronEngine,
    weights: Sequence[LocalWeight],
    grid: Grid,
    forward: Forward,
    batch: Any,
    norm: _Norm,
) -> torch.Tensor | None:
    """Forward through all stages and backward again; the loss on the ranks of the last stage."""
    stages = grid.pipeline * grid.virtual
    mine = [stage for stage in range(stages) if stage % grid.pipeline == grid.pipeline_rank]
    inputs: dict[int, torch.Tensor | None] = {}
    outputs: dict[int, torch.Tensor] = {}
    for stage in mine:
        inputs[stage] = _received(stage - 1, stage, grid, outputs, norm.device) if stage else None
        chunk = engine.model_chunks[stage // grid.pipeline]
        unwrapped(chunk).set_input_tensor(inputs[stage])
        outputs[stage] = forward(chunk, batch)
        if stage < stages - 1:
            _send(outputs[stage], stage, stage + 1, grid)
    gradients: dict[int, torch.Tensor] = {}
    for stage in reversed(mine):
        last = stage == stages - 1
        if last and (not isinstance(outputs[stage], torch.Tensor) or outputs[stage].numel() != 1):
            raise UsageError("the gate's forward must return the loss, a tensor of one element; pass `forward=`")
        arriving = None if last else _received(stage + 1, stage, grid, gradients, norm.device)
        of_chunk = [w for w in weights if w.chunk == stage // grid.pipeline and w.weight.requires_grad]
        gradient = _backward(outputs[stage], arriving, inputs[stage], of_chunk, norm)
        if gradient is not None:
            gradients[stage] = gradient
            _send(gradient, stage, stage - 1, grid)
    return outputs[stages - 1].detach().double() if stages - 1 in outputs else None


def _backward(
    output: torch.Tensor,
    arriving: torch.Tensor | None,
    source: torch.Tensor | None,
    weights: Sequence[LocalWeight],
    norm: _Norm,
) -> torch.Tensor | None:
    """Run one chunk's backward; its weights' gradients go to `norm`, that of its input comes back."""
    hooks = [torch.Tensor.register_hook(w.weight, norm.consume(w)) for w in weights]  # type: ignore[no-untyped-call]
    wanted = [w.weight for w in weights] + ([] if source is None else [source])
    try:
        found = torch.autograd.grad(output, wanted, arriving, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return None if source is None else found[-1]


def _send(tensor: torch.Tensor, stage: int, to: int, grid: Grid) -> None:
    if to % grid.pipeline == stage % grid.pipeline:
        return
    group, rank = _peer(to, grid)
    padding = [0] * (_MOST_AXES - tensor.dim())
    header = [_WIRE_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *padding]
    dist.send(torch.tensor(header, device=tensor.device), rank, group=group)
    dist.send(tensor.detach().contiguous(), rank, group=group)


def _received(stage: int, at: int, grid: Grid, local: dict[int, torch.Tensor], device: torch.device) -> torch.Tensor:
    """What `stage` sent to stage `at`; differentiable memory of its own."""
    if stage % grid.pipeline == at % grid.pipeline:
        return local[stage].detach().requires_grad_()
    group, rank = _peer(stage, grid)
    header = torch.zeros(2 + _MOST_AXES, dtype=torch.int64, device=device)
    dist.recv(header, rank, group=group)
    dtype, axes, *extents = header.tolist()
    received = torch.empty(extents[:axes], dtype=_WIRE_DTYPES[dtype], device=device)
    dist.recv(received, rank, group=group)
    return received.requires_grad_()


def _peer(stage: int, grid: Grid) -> tuple[Any, int]:
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    return group, dist.get_global_rank(group, stage % grid.pipeline)


@contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Eval mode, and no layer that writes gradients by itself; all as before afterwards."""
    modes = [(part, part.training) for chunk in chunks for part in chunk.modules()]
    fused = [(part, name) for part, _ in modes for name in _FUSED if getattr(part, name, False) is True]
    buffers = [(b, b.detach().clone()) for chunk in chunks for b in unwrapped(chunk).buffers()]
    for chunk in chunks:
        chunk.eval()
    for part, name in fused:
        setattr(part, name, False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for part, name in fused:
            setattr(part, name, True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for chunk in chunks:
            unwrapped(chunk).set_input_tensor(None)
