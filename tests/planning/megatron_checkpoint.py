"""Genuine committed checkpoints of a Megatron job without torch or an engine: the boxes are those of its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical, files, names
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest, RankEntry
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.integrity.assembly import assemble
from resume_kit.planning.holders import holders_of
from resume_kit.planning.layouts.geometry import Geometry
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology
from tests.checkpoints import SETTINGS, Pieces, Recipe, publish, to_bfloat16, write_rank

#: A buffer of the first stage, which its first rank owns.
ROUTER_BIAS = "decoder.layers.1.mlp.router.expert_bias"


def commit(run: Path, geometry: Geometry, topology: MegatronTopology, *, step: int = 10, **pinned: Any) -> Path:
    """Save and commit a checkpoint of `step` in `run`; returns its directory."""
    recipe = Recipe(step, ranks=topology.world_size, weights={n: w.shape for n, w in geometry.weights.items()})
    staging = names.ground(run, 1) / names.step_directory(step)
    staging.mkdir(parents=True)
    indices: list[RankIndex] = []
    entries = []
    for rank, owned in enumerate(_owned(geometry, topology)):
        index = write_rank(staging, recipe, rank, owned)
        raw = index.to_bytes()
        files.write_durably(staging / names.index_file(rank), raw)
        indices.append(index)
        digests = canonical.digest(raw), canonical.digest(canonical.dumps(index.rng))
        entries.append(RankEntry(rank, index.data.size, index.data.whole, len(raw), *digests))
    assembly = assemble(indices, set())
    assert not assembly.problems, assembly.problems
    manifest = Manifest(
        run_id=recipe.run_id,
        attempt=1,
        step=step,
        created=recipe.created,
        engine=topology.to_engine(),
        tensors=assembly.tensors,
        ranks=tuple(entries),
        aliases={},
        state=canonical.encode({"groups": [SETTINGS], "counters": {"steps": step}, "scalars": {}}),
        data=canonical.encode({"fingerprint": {"content": "x"}, "global_batch_size": 8, "position": 8 * step}),
        pinned=canonical.encode(
            {
                "geometry": geometry.to_document(),
                "groups": [{**SETTINGS, "members": sorted(geometry.weights)}],
                "versions": {"python": "3.11.7"},
                **pinned,
            }
        ),
        gate=None,
        holders=holders_of(indices),
    )
    files.write_durably(staging / names.MANIFEST, manifest.to_bytes())
    return publish(run, staging)


def _owned(geometry: Geometry, topology: MegatronTopology) -> list[Pieces]:
    layout = megatron_layout(geometry, topology)
    generator = np.random.default_rng(0)
    whole = {
        TensorSpec(TensorKey(kind, name), "float32", weight.shape): generator.standard_normal(weight.shape, np.float32)
        for name, weight in geometry.weights.items()
        for kind in ("master", "exp_avg")
    }
    owned: list[Pieces] = []
    for rank in range(topology.world_size):
        pieces: Pieces = []
        for held in layout.held(rank):
            for spec, data in whole.items() if held.owned else ():
                if spec.key.name == held.name:
                    pieces.append((spec, held.box, data[held.box.slices].reshape(-1), True))
                    if spec.key.kind == "master":
                        low = TensorSpec(TensorKey("param", held.name), "bfloat16", spec.shape)
                        pieces.append((low, held.box, to_bfloat16(data)[held.box.slices].reshape(-1), False))
        owned.append(pieces)
    bias = TensorSpec(TensorKey("buffer", ROUTER_BIAS), "float32", (4,))
    owned[0].append((bias, Box.whole((4,)), np.ones(4, np.float32), True))
    return owned
