"""Planning at scale, on one core: layouts of all ranks, exact-once coverage, and the reads of a topology change.

    python -m benchmarks.planning --out benchmarks/results/NAME

A 405B-like model stays as it is, tensor and pipeline parallel sizes too, and the data parallel size grows. Nothing is
read or written but documents: how large manifest and indices are at that scale is measured on real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import hardware
from benchmarks.planning_documents import BYTES_PER_ELEMENT, documents, spread
from benchmarks.planning_report import draw, markdown
from resume_kit.environment import software_versions
from resume_kit.planning.layouts.geometry import Geometry, Weight
from resume_kit.planning.layouts.layout import Layout
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.target import ModelSizes, target_problems
from resume_kit.planning.layouts.topology import MegatronTopology, Topology, ZeroTopology
from resume_kit.planning.layouts.zero import zero_layout
from resume_kit.planning.ownership import uncovered
from resume_kit.planning.resharding import ReadCounts, count_reads

WORLDS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LARGEST = max(WORLDS)
ZERO_WORLDS = (64, 256, 1024, 4096)


@dataclass(frozen=True)
class Sizes:
    """Llama 3 405B, with 128 layers in place of 126: these divide by the pipeline sizes."""

    layers: int = 128
    hidden: int = 16384
    ffn: int = 53248
    heads: int = 128
    groups: int = 8
    vocabulary: int = 128256


def llama(sizes: Sizes) -> Geometry:
    """The geometry table, with Megatron's names."""
    hidden, ffn = sizes.hidden, sizes.ffn
    qkv = hidden + 2 * hidden // sizes.heads * sizes.groups
    layer: list[tuple[str, tuple[int, ...], int | None]] = [
        ("input_layernorm.weight", (hidden,), None),
        ("self_attention.linear_proj.weight", (hidden, hidden), 1),
        ("self_attention.linear_qkv.weight", (qkv, hidden), 0),
        ("pre_mlp_layernorm.weight", (hidden,), None),
        ("mlp.linear_fc1.weight.gate", (ffn, hidden), 0),
        ("mlp.linear_fc1.weight.up", (ffn, hidden), 0),
        ("mlp.linear_fc2.weight", (hidden, ffn), 1),
    ]
    weights = {"embedding.word_embeddings.weight": Weight((sizes.vocabulary, hidden), 0, 0, "first")}
    for number in range(sizes.layers):
        for order, (name, shape, axis) in enumerate(layer, 1 + number * len(layer)):
            gated: Any = name.rpartition(".")[2] if ".linear_fc1." in name else None
            place = order - (gated == "up")
            weights[f"decoder.layers.{number}.{name}"] = Weight(shape, place, axis, layer=number, gated=gated)
    last = 1 + sizes.layers * len(layer)
    weights["decoder.final_layernorm.weight"] = Weight((hidden,), last, None, "last")
    weights["output_layer.weight"] = Weight((sizes.vocabulary, hidden), last + 1, 0, "last")
    return Geometry(sizes.layers, sizes.heads, sizes.groups, 0, sizes.vocabulary, False, weights)


@dataclass(frozen=True)
class Timing:
    """Seconds of one repetition."""

    layouts: float
    coverage: float
    plan: float

    @property
    def total(self) -> float:
        return self.layouts + self.coverage + self.plan


def topology(world_size: int, tp: int, pp: int) -> MegatronTopology:
    return MegatronTopology(world_size=world_size, tensor_parallel=tp, pipeline_parallel=pp)


def measure(geometry: Geometry, source: Topology, target: Topology, repeats: int) -> dict[str, Any]:
    """Plan one change of topology some times over; one more run before is not counted."""
    timings = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        before, after = layout(geometry, source), layout(geometry, target)
        built = time.perf_counter()
        faults = uncovered(before.table) | uncovered(after.table)
        checked = time.perf_counter()
        plan = count_reads(before.table, after.table, target.world_size, BYTES_PER_ELEMENT)
        timings.append(Timing(built - begin, checked - built, time.perf_counter() - checked))
        assert not faults and not plan.missing.any()
    return {
        "ranks": target.world_size,
        "from": _sizes(source),
        "to": _sizes(target),
        "boxes": [len(before.table), len(after.table)],
        "seconds": {
            part: spread([getattr(timing, part) for timing in timings[1:]])
            for part in ("total", "layouts", "coverage", "plan")
        },
        "reads": _reads(plan),
    }


def layout(geometry: Geometry, topology: Topology) -> Layout:
    """The layout of all ranks; for ZeRO with all weights in one group."""
    assert not target_problems(ModelSizes.of_geometry(geometry), topology)
    if isinstance(topology, MegatronTopology):
        return megatron_layout(geometry, topology)
    shapes = {name: weight.shape for name, weight in geometry.weights.items()}
    return zero_layout(shapes, [list(shapes)], stage=topology.stage, world_size=topology.world_size)


def _sizes(topology: Topology) -> str:
    if isinstance(topology, ZeroTopology):
        return f"ZeRO-{topology.stage} on {topology.world_size:,}"
    return f"TP{topology.tensor_parallel}×PP{topology.pipeline_parallel}×DP{topology.data_parallel}"


def _reads(plan: ReadCounts) -> dict[str, Any]:
    columns = {"bytes": plan.read, "files": plan.files, "parts": plan.parts}
    per_rank = {name: spread([float(n) for n in column]) for name, column in columns.items()}
    return {"bytes in all": int(plan.read.sum()), "per rank": per_rank}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--zero-ranks", type=int, nargs="+", default=list(ZERO_WORLDS))
    parser.add_argument("--sample", type=int, default=32, help="ranks whose documents are made")
    options = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    load = os.getloadavg()[0]
    sizes = Sizes()
    geometry = llama(sizes)
    scaling = [
        measure(geometry, topology(ranks, 8, 8), topology(ranks, 4, 8), options.repeats) for ranks in options.ranks
    ]
    headline = [
        measure(geometry, topology(LARGEST, 8, 16), topology(ranks, tp, pp), options.repeats)
        for ranks, tp, pp in ((LARGEST, 4, 16), (LARGEST, 8, 8), (LARGEST // 2, 8, 16))
    ]
    zero = [
        measure(geometry, ZeroTopology(world_size=ranks), ZeroTopology(world_size=3 * ranks // 4), options.repeats)
        for ranks in options.zero_ranks
    ]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.planning",
        "hardware": {**hardware(), "cores used": 1, "processor": processor(), "load before": load},
        "versions": software_versions(),
        "model": {**asdict(sizes), "parameters": sum(int(np.prod(w.shape)) for w in geometry.weights.values())},
        "repeats": options.repeats,
        "scaling": scaling,
        "headline": headline,
        "ZeRO-3": zero,
        "documents": [
            documents(geometry, topology(ranks, 8, 8), topology(ranks, 4, 8), min(options.sample, ranks))
            for ranks in sorted({min(options.ranks), max(options.ranks)})
        ],
        "peak memory bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planning.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (options.out / "README.md").write_text(markdown(result))
    draw(result, options.out / "planning.png")
    print(markdown(result))
    return 0


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
