"""DeepSpeed ZeRO: what each rank owns of each weight, by stage and world size.

ZeRO-3 cuts every weight by itself; ZeRO-1 and ZeRO-2 cut the concatenation of a group's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from resume_kit.planning.layouts.layout import Layout, table_of_ranges
from resume_kit.planning.table import cut, numel_of, padded_shapes

_START_ALIGNMENT = 2  # elements; DeepSpeed's nccl_start_alignment_factor


def zero_layout(
    shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Sequence[str]], *, stage: int, world_size: int
) -> Layout:
    """The layout of the weights of `groups`, each with its members in the optimizer's order.

    Weights outside of the groups are frozen: partitioned like the others under stage 3, else on no rank of the
    layout, since every rank holds them whole and owns nothing.
    """
    members = [name for group in groups for name in group]
    if stage == 3:
        grouped = set(members)
        members += [name for name in shapes if name not in grouped]
        groups = [[name] for name in members]
    names = tuple(members)
    numel = np.array([numel_of(shapes[name]) for name in names], np.int64)
    offset, chunk = np.zeros_like(numel), np.ones_like(numel)
    first = 0
    for group in groups:
        rows = slice(first, first + len(group))
        first = rows.stop
        ends = np.cumsum(numel[rows])
        offset[rows] = ends - numel[rows]
        total = int(ends[-1]) if len(group) else 0
        alignment = world_size if stage == 3 else world_size * _START_ALIGNMENT
        chunk[rows] = max(1, -(-total // alignment) * alignment // world_size)
    row, rank, start, stop = cut(offset, numel, chunk)
    slices = padded_shapes([shapes[name] for name in names])[row]
    table = table_of_ranges(
        names,
        tuple(tuple(shapes[name]) for name in names),
        slices=slices,
        tensor=row,
        rank=rank,
        start=start,
        stop=stop,
        origin=np.zeros_like(slices),
        owned=np.ones(len(row), np.bool_),
    )
    return Layout(world_size, table)
