"""What each rank of a target would read from a checkpoint, told from its manifest and indices alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest, TensorEntry
from resume_kit.checkpoint.pages import filled
from resume_kit.checkpoint.sharing import MOST_READERS, MOST_WINDOWS
from resume_kit.planning.layouts.geometry import Geometry
from resume_kit.planning.layouts.layout import Layout
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology, Topology, ZeroTopology
from resume_kit.planning.layouts.zero import zero_layout
from resume_kit.planning.resharding import ReadCounts, count_reads, stored_table
from resume_kit.planning.table import BoxTable, Ints, table_of

_LAYER = re.compile(r"\blayers\.(\d+)\.")
#: Boxes of ZeRO-3 looked at in one go: there, every rank has a part of every tensor.
_PORTION = 1 << 21
_OWN_VERSION = re.compile(r"(.+)@rank(0|[1-9]\d*)")


@dataclass(frozen=True, eq=False)
class Forecast:
    """The reads of all ranks of a target, and the bytes of host memory that each takes for them at the most."""

    plan: ReadCounts
    peak_host_bytes: Ints


def model_geometry(manifest: Manifest) -> Geometry:
    """The geometry table of a Megatron checkpoint. ValueError where it has none, or one that does not fit."""
    document = canonical.decode(manifest.pinned).get("geometry")
    if not isinstance(document, Mapping):
        raise ValueError("the checkpoint has no geometry table")
    shapes = _shapes(manifest)
    try:
        return Geometry.from_document(document, shapes, frozen=shapes.keys() - _names(manifest, "master"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its geometry table is malformed: {error!r}") from None


def forecast(manifest: Manifest, indices: Sequence[RankIndex], topology: Topology) -> Forecast:
    """The reads that bring this checkpoint into `topology`, which must be one of the same engine that fits the model.

    As a resume does it, a rank reads every box that it holds, owned or copied, of every kind that has bytes in the
    files, through a few windows of one digest block into its live tensors.
    """
    world_size = topology.world_size
    plan = _no_reads(world_size)
    for table, kind, itemsize in _wanted(manifest, topology, manifest.tensors):
        stored = stored_table(indices, kind, dict(zip(table.names, table.shapes, strict=True)))
        plan += count_reads(stored, table, world_size, itemsize)
    block = max((min(index.data.block_bytes, index.data.size) for index in indices), default=0)
    windows = MOST_READERS + (MOST_WINDOWS if world_size > 1 else 0)
    return Forecast(plan, np.full(world_size, filled(block) * windows, np.int64))


def _wanted(
    manifest: Manifest, topology: Topology, entries: Sequence[TensorEntry]
) -> Iterator[tuple[BoxTable, str, int]]:
    """(boxes, kind, bytes per element) of all that the target's ranks want and the files hold."""
    groups: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    for entry in entries:
        if entry.stored:
            kind, name = entry.spec.key
            groups.setdefault((kind, entry.spec.itemsize), {})[name] = entry.spec.shape
    laid_out: set[str] = set()
    for layout in _layouts(manifest, topology):
        laid_out.update(layout.table.names)
        for (kind, itemsize), shapes in groups.items():
            if kind != "buffer":
                chosen = np.array([name in shapes for name in layout.table.names], np.bool_)
                yield layout.table.where(chosen[layout.table.tensor]), kind, itemsize
    whole = _held_whole(manifest, topology, entries, laid_out)
    for (kind, itemsize), shapes in groups.items():
        rows = [
            (name, rank, Box.whole(shape), False)
            for name, shape in shapes.items()
            for rank in whole.get((kind, name), ())
        ]
        if rows:
            yield table_of(shapes, rows), kind, itemsize


def _layouts(manifest: Manifest, topology: Topology) -> Iterator[Layout]:
    """The layout, in portions of tensors."""
    if isinstance(topology, MegatronTopology):
        yield megatron_layout(model_geometry(manifest), topology)
        return
    shapes = _shapes(manifest)
    size = {"stage": topology.stage, "world_size": topology.world_size}
    if topology.stage != 3:
        groups = [group["members"] for group in canonical.decode(manifest.pinned)["groups"]]
        yield zero_layout(shapes, groups, **size)
        return
    names, portion = list(shapes), max(1, _PORTION // topology.world_size)
    for first in range(0, len(names), portion):
        yield zero_layout({name: shapes[name] for name in names[first : first + portion]}, [], **size)


def _held_whole(
    manifest: Manifest, topology: Topology, entries: Sequence[TensorEntry], laid_out: set[str]
) -> dict[tuple[str, str], range | list[int]]:
    """(kind, name) → ranks that hold the tensor whole: buffers, and frozen weights that no layout shards.

    Where the ranks' versions of a buffer differed at the save each rank takes its own; one that the save did not have
    takes that of rank 0.
    """
    everyone = range(topology.world_size)
    found: dict[tuple[str, str], range | list[int]] = {}
    layers = model_geometry(manifest).layers if isinstance(topology, MegatronTopology) else 0
    for entry in entries:
        kind, name = entry.spec.key
        if kind == "param" and name not in laid_out:
            found[kind, name] = everyone
        elif kind == "buffer":
            own = _OWN_VERSION.fullmatch(name)
            if own is None:
                found[kind, name] = _stage_of(name, layers, topology)
            else:
                rank = int(own[2])
                later = range(manifest.world_size, topology.world_size) if rank == 0 else range(0)
                found[kind, name] = [*range(rank, min(rank + 1, topology.world_size)), *later]
    return found


def _stage_of(name: str, layers: int, topology: Topology) -> range:
    """The ranks of the pipeline stage that has the layer of a buffer; without a layer in its name, all."""
    layer = _LAYER.search(name)
    if isinstance(topology, ZeroTopology) or layer is None:
        return range(topology.world_size)
    chunks = topology.pipeline_parallel * topology.virtual_pipeline
    stage = int(layer[1]) // (layers // chunks) % topology.pipeline_parallel
    return range(stage * topology.stage_ranks, (stage + 1) * topology.stage_ranks)


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    return {entry.spec.key.name: entry.spec.shape for entry in manifest.tensors if entry.spec.key.kind == "param"}


def _names(manifest: Manifest, kind: str) -> set[str]:
    return {entry.spec.key.name for entry in manifest.tensors if entry.spec.key.kind == kind}


def _no_reads(world_size: int) -> ReadCounts:
    none = np.zeros(0, np.int64)
    zeros = np.zeros(world_size, np.int64)
    return ReadCounts(zeros, zeros, zeros, none, none)
