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
from functools import partial
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
_FAILED = -1

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
        passage = _Passage(engine, weights, grid, forward, batch, norm)
        loss = passage.go()
    failed = torch.tensor(float(passage.failure is not None), device=device)
    dist.all_reduce(failed)
    if failed:
        raise passage.failure or UsageError("the gate failed on another rank; see its error")
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


@dataclass
class _Passage:
    """One micro-batch through all stages and back.

    A stage that fails sends word of it in place of what it would have sent, so that no other waits for ever: each
    then sends that on, and all ranks learn of it in the end. Tensor ranks that fail alone leave their peers in a
    collective, whose own timeout ends that.
    """

    engine: MegatronEngine
    weights: Sequence[LocalWeight]
    grid: Grid
    forward: Forward
    batch: Any
    norm: _Norm
    failure: Exception | None = None

    def go(self) -> torch.Tensor | None:
        """The loss on the ranks of the last stage; None on the others, and after a failure."""
        stages, here = self.grid.pipeline * self.grid.virtual, self.grid.pipeline_rank
        mine = [stage for stage in range(stages) if stage % self.grid.pipeline == here]
        inputs: dict[int, torch.Tensor | None] = {}
        outputs: dict[int, torch.Tensor | None] = {}
        gradients: dict[int, torch.Tensor | None] = {}
        for stage in mine:
            inputs[stage] = self._receive(stage - 1, stage, outputs) if stage else None
            outputs[stage] = self._try(partial(self._output, stage, inputs[stage]))
            if stage < stages - 1:
                _send(outputs[stage], stage, stage + 1, self.grid, self.norm.device)
        for stage in reversed(mine):
            arriving = self._receive(stage + 1, stage, gradients) if stage < stages - 1 else None
            gradients[stage] = self._try(partial(self._gradient, stage, outputs[stage], arriving, inputs[stage]))
            if stage:
                _send(gradients[stage], stage, stage - 1, self.grid, self.norm.device)
        last = outputs.get(stages - 1)
        return None if last is None or self.failure is not None else last.detach().double()

    def _try(self, work: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        if self.failure is not None:
            return None
        try:
            return work()
        except Exception as error:  # every other stage must hear of it; `forward_backward` raises it
            self.failure = error
            return None

    def _output(self, stage: int, source: torch.Tensor | None) -> torch.Tensor:
        chunk = self.engine.model_chunks[stage // self.grid.pipeline]
        unwrapped(chunk).set_input_tensor(source)
        output = self.forward(chunk, self.batch)
        last = stage == self.grid.pipeline * self.grid.virtual - 1
        if not isinstance(output, torch.Tensor) or (last and output.numel() != 1):
            raise UsageError("the gate's forward must return the loss, a tensor of one element; pass `forward=`")
        return output

    def _gradient(
        self,
        stage: int,
        output: torch.Tensor | None,
        arriving: torch.Tensor | None,
        source: torch.Tensor | None,
    ) -> torch.Tensor | None:
        assert output is not None
        chunk = stage // self.grid.pipeline
        weights = [w for w in self.weights if w.chunk == chunk and w.weight.requires_grad]
        return _backward(output, arriving, source, weights, self.norm)

    def _receive(self, stage: int, at: int, local: dict[int, torch.Tensor | None]) -> torch.Tensor | None:
        """What `stage` sent to stage `at`, as memory of its own; None, and a failure, where that stage failed."""
        if stage % self.grid.pipeline == at % self.grid.pipeline:
            own = local[stage]
            return None if own is None else own.detach().requires_grad_()
        received = _received(stage, self.grid, self.norm.device)
        if received is None and self.failure is None:
            self.failure = UsageError(f"the gate failed on pipeline stage {stage % self.grid.pipeline}; see its error")
        return received


def _backward(
    output: torch.Tensor,
    arriving: torch.Tensor | None,
    source: torch.Tensor | None,
    weights: Sequence[LocalWeight],
    norm: _Norm,
) -> torch.Tensor | None:
    """Run one chunk's backward; its weights' gradients go to `norm`, that of its input comes back."""
    if not weights and source is None:
        return None  # a first stage that is all frozen
    hooks = [torch.Tensor.register_hook(w.weight, norm.consume(w)) for w in weights]  # type: ignore[no-untyped-call]
    wanted = [w.weight for w in weights] + ([] if source is None else [source])
    try:
        found = torch.autograd.grad(output, wanted, arriving, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return None if source is None else found[-1]


def _send(tensor: torch.Tensor | None, stage: int, to: int, grid: Grid, device: torch.device) -> None:
    """Send a tensor to a stage, or word that there is none."""
    if to % grid.pipeline == stage % grid.pipeline:
        return
    group, rank = _peer(to, grid)
    if tensor is None:
        dist.send(torch.tensor([_FAILED, *[0] * (1 + _MOST_AXES)], device=device), rank, group=group)
        return
    padding = [0] * (_MOST_AXES - tensor.dim())
    header = [_WIRE_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *padding]
    dist.send(torch.tensor(header, device=device), rank, group=group)
    dist.send(tensor.detach().contiguous(), rank, group=group)


def _received(stage: int, grid: Grid, device: torch.device) -> torch.Tensor | None:
    """What a stage on another rank sent; None where it failed."""
    group, rank = _peer(stage, grid)
    header = torch.zeros(2 + _MOST_AXES, dtype=torch.int64, device=device)
    dist.recv(header, rank, group=group)
    dtype, axes, *extents = header.tolist()
    if dtype == _FAILED:
        return None
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
