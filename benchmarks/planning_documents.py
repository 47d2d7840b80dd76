"""The documents of a checkpoint of thousands of ranks: the real manifest, and real indices of a sample of ranks."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import BLOCK_BYTES, FileDigest
from resume_kit.checkpoint.index import RankIndex, StoredPiece, parse_index
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.manifest import Manifest, RankEntry, TensorEntry, read_manifest
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.environment import software_versions
from resume_kit.planning.holders import format_ranks, parse_ranks
from resume_kit.planning.layouts.geometry import Geometry
from resume_kit.planning.layouts.layout import Layout
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology

KINDS = ("master", "exp_avg", "exp_avg_sq")
BYTES_PER_ELEMENT = 4 * len(KINDS)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def documents(geometry: Geometry, source: MegatronTopology, target: MegatronTopology, sample: int) -> dict[str, Any]:
    """The real manifest of a checkpoint of all ranks, real indices of a sample of ranks, and who reads which."""
    before, after = megatron_layout(geometry, source), megatron_layout(geometry, target)
    generator = random.Random(0)
    ranks = sorted({0, source.world_size - 1, *generator.sample(range(source.world_size), sample - 2)})
    indices = {rank: index_of(geometry, before, rank, generator) for rank in ranks}
    raw = {rank: index.to_bytes() for rank, index in indices.items()}
    holders, holding = _timed(lambda: holders_of_layout(before))
    manifest = manifest_of(geometry, source, before, holders, generator)
    written, writing = _timed(manifest.to_bytes)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / names.step_directory(manifest.step)
        directory.mkdir()
        (directory / names.MANIFEST).write_bytes(written)
        reading = [_timed(lambda: read_manifest(directory))[1] for _ in range(3)]
    parsing = [_timed(lambda rank=rank: parse_index(raw[rank], Path("x")))[1] for rank in ranks]  # type: ignore[misc]
    sizes = [len(text) for text in raw.values()]
    wanted = {name: set(parse_ranks(text)) for name, text in holders.items()}
    readers = generator.sample(range(target.world_size), sample)
    per_rank = [len(set().union(*(wanted[held.name] for held in after.held(rank)))) for rank in readers]
    return {
        "ranks": source.world_size,
        "tensors": len(manifest.tensors),
        "manifest bytes": len(written),
        "of them holders": len(canonical.dumps(holders)),
        "of them ranks": sum(len(canonical.dumps(asdict(entry))) for entry in manifest.ranks),
        "manifest write seconds": writing,
        "manifest read seconds": spread(reading),
        "holders seconds": holding,
        "indices sampled": len(ranks),
        "index bytes": spread([float(size) for size in sizes]),
        "index parse seconds": spread(parsing),
        "all indices bytes, extrapolated": int(statistics.mean(sizes) * source.world_size),
        "all indices parse seconds, extrapolated": statistics.mean(parsing) * source.world_size,
        "one rank of the target reads": {
            "sampled ranks": len(readers),
            "indices": spread([float(count) for count in per_rank]),
            "bytes of manifest and indices": int(len(written) + statistics.median(per_rank) * statistics.mean(sizes)),
        },
    }


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    value = call()
    return value, time.perf_counter() - begin


def holders_of_layout(layout: Layout) -> dict[str, str]:
    """What `planning.holders.holders_of` says of the indices of all ranks."""
    owned = layout.table.where(layout.table.owned)
    pairs = np.unique(np.stack([owned.tensor, owned.rank], axis=1), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(owned.names) + 1))
    return {
        name: format_ranks(pairs[starts[i] : starts[i + 1], 1].tolist()) for i, name in enumerate(layout.table.names)
    }


def index_of(geometry: Geometry, layout: Layout, rank: int, generator: random.Random) -> RankIndex:
    """The index as a save would write it: real offsets, an RNG record of the usual generators, made-up digests."""
    owned = [held for held in layout.held(rank) if held.owned]
    shapes = {name: weight.shape for name, weight in geometry.weights.items()}
    stored: list[tuple[TensorSpec, Box]] = [
        (TensorSpec(TensorKey(kind, held.name), "float32", shapes[held.name]), held.box)
        for kind in KINDS
        for held in owned
    ]
    plan = plan_file(stored, {"format": "resume_kit", "rank": str(rank)})
    pieces = [
        StoredPiece(slot.spec, slot.box, f"{generator.getrandbits(64):016x}", slot.offset, slot.nbytes)
        for slot in plan.slots
    ]
    pieces += [
        StoredPiece(
            TensorSpec(TensorKey("param", held.name), "bfloat16", shapes[held.name]),
            held.box,
            f"{generator.getrandbits(64):016x}",
            None,
            0,
        )
        for held in owned
    ]
    blocks = tuple(f"{generator.getrandbits(128):032x}" for _ in range(-(-plan.size // BLOCK_BYTES)))
    step = {"step": {"device": "cpu", "dtype": "float32", "value": 1000.0}}
    state = {
        "python": random.getstate(),
        "numpy": {"name": "MT19937", "keys": bytes(2496), "position": 0, "has_gauss": 0, "gauss": 0.0},
        "torch": bytes(5056),
        "cuda:0": bytes(16),
        "engine:model-parallel-rng": bytes(16),
    }
    return RankIndex(
        run_id="0123456789ab",
        attempt=1,
        step=1000,
        rank=rank,
        world_size=layout.world_size,
        data=FileDigest(plan.size, BLOCK_BYTES, blocks),
        pieces=tuple(pieces),
        scalars={held.name: step for held in owned},
        rng=canonical.encode(state),
    )


def manifest_of(
    geometry: Geometry,
    topology: MegatronTopology,
    layout: Layout,
    holders: dict[str, str],
    generator: random.Random,
) -> Manifest:
    specs = [
        TensorSpec(TensorKey(kind, name), "bfloat16" if kind == "param" else "float32", weight.shape)
        for kind in ("param", *KINDS)
        for name, weight in geometry.weights.items()
    ]
    settings = {"lr": 8e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    digests = [f"{generator.getrandbits(128):032x}" for _ in range(3)]
    owned = np.bincount(
        layout.table.rank[layout.table.owned],
        layout.table.numel[layout.table.owned].astype(np.float64),
        minlength=layout.world_size,
    )
    return Manifest(
        run_id="0123456789ab",
        attempt=1,
        step=1000,
        created=1_700_000_000.0,
        engine=topology.to_engine(),
        tensors=tuple(
            TensorEntry(spec, f"{generator.getrandbits(64):016x}", spec.key.kind != "param")
            for spec in sorted(specs, key=lambda spec: spec.key)
        ),
        ranks=tuple(
            RankEntry(rank, int(owned[rank]) * BYTES_PER_ELEMENT, digests[0], 20_000, digests[1], digests[2])
            for rank in range(topology.world_size)
        ),
        aliases={},
        state=canonical.encode({"groups": [settings], "counters": {"steps": 1000}}),
        data=canonical.encode({"global_batch_size": 2048, "position": 2_048_000}),
        pinned=canonical.encode(
            {
                "geometry": geometry.to_document(),
                "groups": [{**settings, "members": list(geometry.weights)}],
                "versions": software_versions(),
            }
        ),
        gate=None,
        holders=holders,
    )
