"""Which pieces of which logical tensors this rank holds, in Megatron's optimizers and parameter buffers.

With the distributed optimizer a rank updates one flat range of a parameter; without it, all of it, like every other
data-parallel rank, and each of them owns an equal flat share. What is whole on every data-parallel rank (the
low-precision parameter, and without the distributed optimizer masters and moments too) is one copy more on each,
which is proved and not saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import LivePiece
from resume_kit.engines.megatron.grid import Grid
from resume_kit.engines.megatron.logical import LocalWeight, Part
from resume_kit.engines.pieces import dtype_name, flat_pieces, split_state, weight_spec


@dataclass(frozen=True, eq=False)
class Master:
    """Elements [start, start + tensor.numel()) of a local parameter in the memory that an optimizer updates."""

    tensor: torch.Tensor
    start: int
    optimizer: torch.optim.Optimizer
    sharded: bool

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.optimizer.state[self.tensor]
        return found


def single_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers in a chain that update anything on this rank."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chain if not getattr(one, "is_stub_optimizer", False)]


def masters_of(optimizer: Any) -> dict[int, Master]:
    """id of a parameter → its master on this rank. A parameter of which this rank updates nothing has none."""
    found: dict[int, Master] = {}
    for one in single_optimizers(optimizer):
        base = one.optimizer
        if hasattr(one, "model_param_gbuf_map"):
            pairs = [*zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True)]
            pairs += [*zip(one.model_fp32_groups, one.shard_fp32_groups, strict=True)]
            for weights, shards in pairs:
                for weight, shard in zip(weights, shards, strict=True):
                    owned = one._get_model_param_range_map(weight)["param"]
                    found[id(weight)] = Master(shard, owned.start, base, sharded=True)
        elif hasattr(one, "fp32_from_float16_groups"):
            for weights, copies in zip(one.float16_groups, one.fp32_from_float16_groups, strict=True):
                for weight, copy in zip(weights, copies, strict=True):
                    found[id(weight)] = Master(copy, 0, base, sharded=False)
            for weights in one.fp32_from_fp32_groups:
                found |= {id(weight): Master(weight, 0, base, sharded=False) for weight in weights}
        else:
            for group in base.param_groups:
                found |= {id(weight): Master(weight, 0, base, sharded=False) for weight in group["params"]}
    return found


class Ownership:
    """Names the pieces of each local weight. `distributed`: the optimizer shards over data-parallel ranks."""

    def __init__(self, grid: Grid, *, distributed: bool) -> None:
        self._grid = grid
        self._distributed = distributed

    def pieces(self, weight: LocalWeight, master: Master | None) -> Iterator[LivePiece]:
        """All pieces of a weight on this rank, masters before what was cast from them."""
        low = weight.weight.data.view(-1)
        number, ranks = weight.spread(self._grid)
        share = self._copy(weight, 0)
        held: list[tuple[int, int, int | None]] = []
        if master is not None and master.sharded:
            held = [(master.start, master.start + master.tensor.numel(), share)]
        elif not (self._distributed and weight.weight.requires_grad):
            begin, end = number * low.numel() // ranks, (number + 1) * low.numel() // ranks
            held = [(begin, end, share), (0, begin, None), (end, low.numel(), None)]
        for start, stop, copy in held:
            for part in weight.parts:
                yield from self._range(part, start, stop, copy, low, master)
        if ranks > 1:
            for part in weight.parts:
                yield from self._whole(part, self._copy(weight, number + 1), low, master)

    def _whole(self, part: Part, copy: int, low: torch.Tensor, master: Master | None) -> Iterator[LivePiece]:
        """This rank's whole slice of everything that every data-parallel rank holds: proved, and read by no one."""
        held = {"param": low}
        if master is not None and not master.sharded:
            tensors, _ = split_state(master.tensor, master.state, part.name)
            held |= {"master": master.tensor.detach().view(-1)} | {k: t.view(-1) for k, t in tensors.items()}
        for kind, flat in held.items():
            spec = TensorSpec(TensorKey(kind, part.name), dtype_name(flat.dtype), part.shape)
            yield LivePiece(spec, part.box, flat.narrow(0, part.start, part.box.numel), None, copy, restored=False)

    def _range(
        self, part: Part, start: int, stop: int, copy: int | None, low: torch.Tensor, master: Master | None
    ) -> Iterator[LivePiece]:
        """Elements [start, stop) of a local weight, as far as they belong to `part`."""
        start, stop = max(start, part.start), min(stop, part.start + part.box.numel)
        if start >= stop:
            return
        masters: Mapping[Box, LivePiece] | None = None
        if master is not None:
            full = master.tensor.detach().view(-1)
            tensors, _ = split_state(master.tensor, master.state, part.name)
            kinds = {"master": full, **{kind: tensor.view(-1) for kind, tensor in tensors.items()}}
            for kind, flat in kinds.items():
                spec = TensorSpec(TensorKey(kind, part.name), dtype_name(flat.dtype), part.shape)
                data = flat.narrow(0, start - master.start, stop - start)
                found = list(flat_pieces(spec, start - part.start, data, within=part.box, copy=copy))
                if kind == "master":
                    masters = {piece.box: piece for piece in found}
                yield from found
        spec = weight_spec(part.name, low.dtype, part.shape)
        data = low.narrow(0, start, stop - start)
        yield from flat_pieces(spec, start - part.start, data, masters, within=part.box, copy=copy)

    def buffer(self, name: str, data: torch.Tensor) -> LivePiece:
        """A buffer that all ranks of a stage hold alike; the stage's first rank owns it."""
        spec = TensorSpec(TensorKey("buffer", name), dtype_name(data.dtype), tuple(data.shape))
        return LivePiece(
            spec,
            Box.whole(spec.shape),
            data.detach().view(-1),
            copy=self._grid.tensor_rank + self._grid.tensor * self._grid.data_rank,
        )

    def _copy(self, weight: LocalWeight, slot: int) -> int:
        """Number of a copy: slot 0 lies spread over the data-parallel ranks, slot d + 1 whole on rank d of them."""
        tensor = max(self._grid.tensor, self._grid.expert_tensor)
        spread = max(self._grid.data, self._grid.expert_data)
        return (weight.later_copy * tensor + weight.tensor_copy(self._grid)) * (spread + 1) + slot
