"""Which pieces of which logical tensors this rank holds, in Megatron's optimizers and parameter buffers.

With the distributed optimizer a rank updates one flat range of a parameter; without it, all of it, like every other
data-parallel rank, and each of them owns an equal flat share: saves it, and after reading it back gives it to the
others. What is whole on every data-parallel rank (the low-precision parameter, and without the distributed optimizer
masters and moments too) is one copy more on each, which is proved, neither saved nor read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
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
        start = stop = 0
        if master is not None and master.sharded:
            start, stop = master.start, master.start + master.tensor.numel()
        elif self._whole_everywhere(weight):
            start, stop = number * low.numel() // ranks, (number + 1) * low.numel() // ranks
        for part in weight.parts:
            yield from self._range(part, start, stop, self._copy(weight, 0), low, master)
        if ranks > 1:
            for part in weight.parts:
                yield from self._whole(part, self._copy(weight, number + 1), low, master)

    def gather(self, weight: LocalWeight, master: Master | None) -> None:
        """Give and take the shares of what every data-parallel rank holds whole of a weight, in place. Collective."""
        number, ranks = weight.spread(self._grid)
        if ranks == 1 or not self._whole_everywhere(weight):
            return
        flats = [weight.weight.data.view(-1)]
        if master is not None:
            tensors, _ = split_state(master.tensor, master.state, weight.parts[0].name)
            flats += [master.tensor.detach().view(-1), *(tensors[kind].view(-1) for kind in sorted(tensors))]
        group = self._grid.data_group(expert=weight.expert is not None)
        for flat in {flat.data_ptr(): flat for flat in flats}.values():  # an fp32 weight is its own master
            _gather_shares(flat, number, ranks, group)

    def _whole_everywhere(self, weight: LocalWeight) -> bool:
        """Whether all data-parallel ranks hold all that there is of a weight, and share its ownership evenly."""
        return not (self._distributed and weight.weight.requires_grad)

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
        self, part: Part, start: int, stop: int, copy: int, low: torch.Tensor, master: Master | None
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


def _gather_shares(flat: torch.Tensor, number: int, ranks: int, group: torch.distributed.ProcessGroup) -> None:
    """Fill `flat` from the equal flat shares of all ranks of a group; this one, rank `number`, has its own."""
    ends = [rank * flat.numel() // ranks for rank in range(ranks + 1)]
    data = flat.view(torch.uint8)  # gloo gathers no bfloat16
    shares = [data[flat.itemsize * start : flat.itemsize * stop] for start, stop in pairwise(ends)]
    if flat.numel() % ranks == 0:
        torch.distributed.all_gather_into_tensor(data, shares[number].clone(), group=group)
        return
    for rank, share in enumerate(shares):
        torch.distributed.broadcast(share, torch.distributed.get_global_rank(group, rank), group=group)
