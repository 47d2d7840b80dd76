"""Megatron-core: which rank holds which box of each weight, for any parallel sizes.

A weight lies on a pipeline stage, is sliced by tensor parallelism, and its slice is shared out over the data
parallel ranks: by the distributed optimizer's gradient buffers, in which the parameters of a model chunk lie one
behind the other in reverse order of traversal and each bucket is cut into equal parts; without it, by us.
Where several ranks hold an element, the first tensor parallel rank and the first stage own it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from resume_kit.planning.layouts.geometry import Geometry, Weight
from resume_kit.planning.layouts.layout import Layout, table_of_ranges
from resume_kit.planning.layouts.topology import MegatronTopology
from resume_kit.planning.table import Ints, cut, numel_of, padded_shapes, run_numbers

# Elements, as megatron.core.distributed.param_and_grad_buffer aligns them.
_PARAMETER_START = 64
_BUCKET_END = 128


@dataclass(frozen=True, slots=True)
class _Share:
    """One logical weight on the ranks of one stage (and one expert rank), before the data parallel cut.

    `within` is its first element in the physical parameter of `physical` elements, which lies at `offset` of a
    bucket of `bucket` elements; a bucket of 0 stands for a parameter that is in no distributed optimizer.
    """

    tensor: int
    weight: Weight
    slice: tuple[int, ...]
    owner: bool
    first_rank: int
    expert: bool
    within: int
    physical: int
    offset: int
    bucket: int


def megatron_layout(geometry: Geometry, topology: MegatronTopology) -> Layout:
    """The layout. The topology must fit the model: `target.target_problems` says whether it does."""
    names = tuple(geometry.weights)
    shares = list(_shares(geometry, topology))
    dense = (topology.tensor_parallel, topology.data_parallel, topology.tensor_parallel)
    expert = (
        topology.expert_tensor_parallel,
        topology.expert_data_parallel,
        topology.expert_tensor_parallel * topology.expert_parallel,
    )
    sizes = np.array([expert if share.expert else dense for share in shares], np.int64).reshape(len(shares), 3)
    tensor_ranks, data_ranks, data_stride = sizes.T
    by_data_rank = _data_parallel(shares, data_ranks)
    copies = tensor_ranks[by_data_rank.share]
    tensor_rank = run_numbers(copies)
    ranges = by_data_rank.take(np.repeat(np.arange(len(copies)), copies))
    row = ranges.share
    shapes = tuple(weight.shape for weight in geometry.weights.values())
    slices = padded_shapes([share.slice for share in shares])
    split = np.array([-1 if share.weight.axis is None else share.weight.axis for share in shares], np.int64)
    origin = np.zeros((len(row), slices.shape[1]), np.int64)
    sliced = np.flatnonzero(split[row] >= 0)
    axis = split[row[sliced]]
    origin[sliced, axis] = tensor_rank[sliced] * slices[row[sliced], axis]
    first_rank = np.array([share.first_rank for share in shares], np.int64)
    owner = np.array([share.owner for share in shares], np.bool_)
    table = table_of_ranges(
        names,
        shapes,
        slices=slices[row],
        tensor=np.array([share.tensor for share in shares], np.int64)[row],
        rank=first_rank[row] + tensor_rank + data_stride[row] * ranges.data_rank,
        start=ranges.start,
        stop=ranges.stop,
        origin=origin,
        owned=owner[row] & ((split[row] >= 0) | (tensor_rank == 0)),
    )
    return Layout(topology.world_size, table)


@dataclass(frozen=True, eq=False)
class _Ranges:
    """Flat ranges [start, stop) of shares, as columns, with the data parallel rank that holds each."""

    share: Ints
    data_rank: Ints
    start: Ints
    stop: Ints

    def take(self, rows: Ints) -> _Ranges:
        return _Ranges(self.share[rows], self.data_rank[rows], self.start[rows], self.stop[rows])

    def __add__(self, other: _Ranges) -> _Ranges:
        return _Ranges(
            np.concatenate([self.share, other.share]),
            np.concatenate([self.data_rank, other.data_rank]),
            np.concatenate([self.start, other.start]),
            np.concatenate([self.stop, other.stop]),
        )


def _data_parallel(shares: list[_Share], data_ranks: Ints) -> _Ranges:
    """What each data parallel rank owns of each share."""
    offset = np.array([share.offset + share.within for share in shares], np.int64)
    numel = np.array([numel_of(share.slice) for share in shares], np.int64)
    bucket = np.array([share.bucket for share in shares], np.int64)
    within = np.array([share.within for share in shares], np.int64)
    physical = np.array([share.physical for share in shares], np.int64)

    sharded = np.flatnonzero(bucket)
    row, part, start, stop = cut(offset[sharded], numel[sharded], bucket[sharded] // data_ranks[sharded])
    cuts = _Ranges(sharded[row], part, start, stop)

    # The others are whole on each of their data ranks, which own an even part each, and get the rest from each other.
    whole = np.flatnonzero(bucket == 0)
    row, part = np.repeat(whole, data_ranks[whole]), run_numbers(data_ranks[whole])
    first = np.clip(part * physical[row] // data_ranks[row] - within[row], 0, numel[row])
    last = np.clip((part + 1) * physical[row] // data_ranks[row] - within[row], 0, numel[row])
    return cuts + _Ranges(row, part, first, last)


def _shares(geometry: Geometry, topology: MegatronTopology) -> Iterator[_Share]:
    tensor = {name: i for i, name in enumerate(geometry.weights)}
    for (stage, chunk, expert_rank), members in _sections(geometry, topology).items():
        expert = expert_rank is not None
        first_rank = stage * topology.stage_ranks + (expert_rank or 0) * topology.expert_tensor_parallel
        ways = topology.expert_tensor_parallel if expert else topology.tensor_parallel
        data_ranks = topology.expert_data_parallel if expert else topology.data_parallel
        parameters = [
            [(name, weight, owner, _slice(weight, ways)) for name, weight, owner in parameter]
            for parameter in _parameters(members)
        ]
        sizes = [sum(numel_of(part) for *_, part in parameter) for parameter in parameters]
        shared = [topology.pipeline_parallel > 1 and parameter[0][1].place == "both" for parameter in parameters]
        limit = topology.bucket_limit if stage == chunk == 0 else None
        trainable = [parameter[0][1].trainable and topology.distributed_optimizer for parameter in parameters]
        sharded = [pair for pair, is_in in zip(zip(sizes, shared, strict=True), trainable, strict=True) if is_in]
        buffer = gradient_buffer(sharded[::-1], data_ranks, limit)
        for parameter, physical, is_in in zip(parameters, sizes, trainable, strict=True):
            offset, bucket = buffer.pop() if is_in else (0, 0)
            within = 0
            for name, weight, owner, part in parameter:
                yield _Share(tensor[name], weight, part, owner, first_rank, expert, within, physical, offset, bucket)
                within += numel_of(part)


@dataclass(frozen=True, slots=True, order=True)
class _Position:
    """Where a parameter comes in the traversal of a model chunk.

    Orders of experts are told apart within an expert only, as each expert parallel rank numbers its own. All of a
    layer's experts lie together.
    """

    order: int
    expert: int = -1
    within: int = 0


_Member = tuple[str, Weight, bool]
_Section = tuple[int, int, int | None]


def _sections(geometry: Geometry, topology: MegatronTopology) -> dict[_Section, list[tuple[_Position, _Member]]]:
    """(stage, chunk, expert rank) → (position, (name, weight, owner)) of what its gradient buffer holds.

    The expert rank is None for the dense buffer, which without expert parallelism has the experts too.
    """
    sections: dict[_Section, list[tuple[_Position, _Member]]] = {}
    last = (topology.pipeline_parallel - 1, topology.virtual_pipeline - 1)
    chunk_layers = geometry.layers // (topology.pipeline_parallel * topology.virtual_pipeline)
    positions = _positions(geometry)
    behind = _Position(max((position.order for position in positions.values()), default=0) + 1)
    for name, weight in geometry.weights.items():
        expert_rank = None
        if weight.expert is not None and topology.expert_parallel > 1:
            expert_rank = weight.expert // (geometry.experts // topology.expert_parallel)
        stage, chunk = (0, 0) if weight.place in ("first", "both") else last
        if weight.place == "layer":
            assert weight.layer is not None
            number = weight.layer // chunk_layers
            stage, chunk = number % topology.pipeline_parallel, number // topology.pipeline_parallel
        sections.setdefault((stage, chunk, expert_rank), []).append((positions[name], (name, weight, True)))
        if weight.place == "both" and topology.pipeline_parallel > 1:
            # The last stage's copy is its output layer: behind everything else in the order of traversal.
            sections.setdefault((*last, expert_rank), []).append((behind, (name, weight, False)))
    return sections


def _positions(geometry: Geometry) -> dict[str, _Position]:
    first_expert: dict[int | None, int] = {}
    for weight in geometry.weights.values():
        if weight.expert is not None:
            first_expert[weight.layer] = min(weight.order, first_expert.get(weight.layer, weight.order))
    return {
        name: _Position(weight.order)
        if weight.expert is None
        else _Position(first_expert[weight.layer], weight.expert, weight.order)
        for name, weight in geometry.weights.items()
    }


def _parameters(members: Iterable[tuple[_Position, _Member]]) -> list[list[_Member]]:
    """The physical parameters in ascending order: one logical weight each, or the gate and the up half of an fc1."""
    found: dict[_Position, list[_Member]] = {}
    for position, member in sorted(members, key=lambda entry: (entry[0], entry[1][1].gated == "up")):
        found.setdefault(position, []).append(member)
    return list(found.values())


def _slice(weight: Weight, ways: int) -> tuple[int, ...]:
    """Shape of the part of a weight that one of `ways` tensor parallel ranks holds."""
    return tuple(n // ways if axis == weight.axis else n for axis, n in enumerate(weight.shape))


def gradient_buffer(
    parameters: Iterable[tuple[int, bool]], data_ranks: int, bucket_size: int | None
) -> list[tuple[int, int]]:
    """(offset in its bucket, size of the bucket) of each parameter, for parameters in the order of the buffer.

    A parameter is (elements, whether it is an embedding that two stages share); that one gets a bucket of its own.
    """
    align = math.lcm(data_ranks, _BUCKET_END)
    offsets: list[tuple[int, int]] = []  # (bucket, offset in it)
    ends: list[int] = []  # of the buckets
    begin = position = 0
    pending = False
    for numel, shared in parameters:
        position = _aligned(position, _PARAMETER_START)
        if shared and pending:
            ends.append(_aligned(position, align))
            begin = position = ends[-1]
        offsets.append((len(ends), position - begin))
        position += numel
        pending = True
        if shared or (bucket_size is not None and position - begin >= bucket_size):
            ends.append(_aligned(position, align))
            begin = position = ends[-1]
            pending = False
    if pending:
        ends.append(_aligned(position, align))
    starts = [0, *ends]
    return [(offset, ends[bucket] - starts[bucket]) for bucket, offset in offsets]


def _aligned(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
