"""The topology that somebody asks for: read from a text, and checked against the model before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from resume_kit.errors import Problem, UsageError
from resume_kit.planning.layouts.geometry import Geometry
from resume_kit.planning.layouts.topology import MegatronTopology, Topology, ZeroTopology

_ENGINES = ("deepspeed", "megatron")
#: Key of the text → field of the topology.
_MEGATRON_KEYS = {
    "world": "world_size",
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
    "distributed_optimizer": "distributed_optimizer",
    "overlap": "overlap",
    "bucket_size": "bucket_size",
    "sequence_parallel": "sequence_parallel",
}
_DEEPSPEED_KEYS = {"world": "world_size", "stage": "stage"}
_BATCH_KEYS = ("micro_batch", "accumulation")
_SWITCHES = {"distributed_optimizer", "overlap", "sequence_parallel"}
#: Worlds larger than this are not planned.
MOST_RANKS = 1 << 16
_ON_OFF = {"on": True, "off": False}


@dataclass(frozen=True)
class Target:
    """A topology, and how the global batch is made up there, as far as that was said."""

    topology: Topology
    micro_batch: int | None = None
    accumulation: int | None = None


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of a Megatron model that parallel sizes must divide; 0 experts for a dense model.

    `split` and `expert_split` name further extents that tensor and expert tensor parallelism cut, such as
    ``{"hidden size": 4096}``. `vocabulary` is the padded one.
    """

    layers: int
    attention_heads: int
    query_groups: int
    experts: int
    vocabulary: int
    split: Mapping[str, int] = field(default_factory=dict)
    expert_split: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_geometry(cls, geometry: Geometry) -> ModelSizes:
        split: dict[str, int] = {}
        expert_split: dict[str, int] = {}
        seen: set[tuple[bool, int]] = set()
        for name, weight in geometry.weights.items():
            if weight.axis is None or name.startswith(("embedding.word_embeddings.", "output_layer.")):
                continue
            extent, is_expert = weight.shape[weight.axis], weight.expert is not None
            if (is_expert, extent) not in seen:  # one weight stands for all of the same extent
                seen.add((is_expert, extent))
                (expert_split if is_expert else split)[f"axis {weight.axis} of {name}"] = extent
        return cls(
            geometry.layers,
            geometry.attention_heads,
            geometry.query_groups,
            geometry.experts,
            geometry.vocabulary,
            split,
            expert_split,
        )


def parse_target(text: str, engine: Mapping[str, Any]) -> Target:
    """``tp=2,pp=2,world=8`` as a target; what is not said stays as in `engine`, a manifest's topology.

    With another ``engine=`` it stays at that engine's default. An expert tensor parallel size that is not said follows
    the tensor parallel size where it did so before. Raises `UsageError` with all that is wrong with the text, and
    ValueError for an `engine` that is none.
    """
    given, problems = _split(text)
    saved = engine.get("engine")
    if saved not in _ENGINES:
        raise ValueError(f"the saved topology has engine {saved!r}")
    wanted = given.pop("engine", saved)
    if wanted not in _ENGINES:
        near = get_close_matches(wanted, _ENGINES, n=1, cutoff=0.0)[0]
        raise UsageError(f"--target has engine={wanted!r}; did you mean {near!r}?")
    keys = _MEGATRON_KEYS if wanted == "megatron" else _DEEPSPEED_KEYS
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in keys and key not in _BATCH_KEYS:
            near = get_close_matches(key, [*keys, *_BATCH_KEYS, "engine"], n=1, cutoff=0.0)[0]
            problems.append(f"{wanted} has no {key!r}; did you mean {near!r}?")
        elif key in _SWITCHES:
            if value not in _ON_OFF:
                problems.append(f"{key} is {value!r}; say on or off")
            values[key] = _ON_OFF.get(value)
        elif not (value.isascii() and value.isdigit() and int(value) > 0):
            problems.append(f"{key} is {value!r}; give a whole number of 1 or more")
        else:
            values[key] = int(value)
    if problems:
        raise UsageError("--target cannot be read", [Problem("target", "", what) for what in problems])
    micro_batch, accumulation = (values.pop(key, None) for key in _BATCH_KEYS)
    said = {keys[key]: value for key, value in values.items()}
    if wanted != saved and "world_size" not in said:
        said["world_size"] = engine["world_size"]
    if wanted == "megatron":
        before = MegatronTopology.from_engine(engine) if wanted == saved else MegatronTopology()
        base = {name: getattr(before, name) for name in MegatronTopology.__dataclass_fields__}
        if before.expert_tensor_parallel == before.tensor_parallel:
            base["expert_tensor_parallel"] = 0
        return Target(MegatronTopology(**{**base, **said}), micro_batch, accumulation)
    zero = ZeroTopology.from_engine(engine) if wanted == saved else ZeroTopology()
    return Target(
        ZeroTopology(**{"stage": zero.stage, "world_size": zero.world_size, **said}), micro_batch, accumulation
    )


def _split(text: str) -> tuple[dict[str, str], list[str]]:
    given: dict[str, str] = {}
    problems = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            problems.append(f"{part.strip()!r} is not KEY=VALUE")
        elif key in given:
            problems.append(f"{key} is said twice")
        else:
            given[key] = value
    return given, problems


def target_problems(sizes: ModelSizes | None, topology: Topology) -> list[Problem]:
    """Every reason for which this model cannot run in this topology. `sizes` only matter to Megatron."""
    if topology.world_size > MOST_RANKS:
        return [_problem("world", f"{topology.world_size:,} ranks are more than {MOST_RANKS:,}", "choose fewer")]
    if isinstance(topology, ZeroTopology):
        return list(_zero_problems(topology))
    found = list(_grid_problems(topology))
    return found + list(_model_problems(sizes, topology)) if sizes is not None else found


def _zero_problems(topology: ZeroTopology) -> Iterator[Problem]:
    if topology.stage not in (1, 2, 3):
        yield _problem(f"ZeRO stage {topology.stage}", "the stages are 1, 2 and 3", "choose one of them")
    if topology.world_size < 1:
        yield _problem("world", f"{topology.world_size} ranks", "give at least 1")


def _grid_problems(topology: MegatronTopology) -> Iterator[Problem]:
    sizes = {
        "world": topology.world_size,
        "tp": topology.tensor_parallel,
        "pp": topology.pipeline_parallel,
        "vpp": topology.virtual_pipeline,
        "ep": topology.expert_parallel,
        "etp": topology.expert_tensor_parallel,
    }
    for name, size in sizes.items():
        if size < 1:
            yield _problem(f"{name} {size}", "a parallel size is at least 1", "give 1 or more")
    if min(sizes.values()) < 1:
        return
    world, pp = topology.world_size, topology.pipeline_parallel
    model_ranks = topology.tensor_parallel * pp
    if world % model_ranks:
        what = f"tp {topology.tensor_parallel} × pp {pp} = {model_ranks} does not divide the world of {world} ranks"
        yield _problem("world", what, f"start a multiple of {model_ranks} ranks, or choose other sizes")
    expert_ranks = topology.expert_tensor_parallel * topology.expert_parallel * pp
    if expert_ranks != model_ranks and world % expert_ranks:
        what = (
            f"etp {topology.expert_tensor_parallel} × ep {topology.expert_parallel} × pp {pp} = {expert_ranks} "
            f"does not divide the world of {world} ranks"
        )
        yield _problem("world", what, f"start a multiple of {expert_ranks} ranks, or choose other sizes")
    if topology.virtual_pipeline > 1 and pp == 1:
        what = f"vpp {topology.virtual_pipeline} interleaves the stages of a pipeline, and pp is 1"
        yield _problem("vpp", what, "set vpp to 1, or pp to 2 or more")
    if topology.sequence_parallel and topology.tensor_parallel == 1:
        what = "sequence parallelism splits over tensor parallel ranks, and tp is 1"
        yield _problem("sequence_parallel", what, "turn it off, or set tp to 2 or more")


def _model_problems(sizes: ModelSizes, topology: MegatronTopology) -> Iterator[Problem]:
    tp, ep, etp = topology.tensor_parallel, topology.expert_parallel, topology.expert_tensor_parallel
    chunks = topology.pipeline_parallel * topology.virtual_pipeline
    if min(tp, chunks, ep, etp) < 1:
        return
    if sizes.attention_heads % tp:
        what = f"{sizes.attention_heads} attention heads do not divide by tp {tp}"
        yield _problem("tp", what, _divisor("tp", sizes.attention_heads))
    if sizes.query_groups % tp and tp % sizes.query_groups:
        what = f"{sizes.query_groups} query groups neither divide by tp {tp} nor divide it"
        yield _problem("tp", what, f"choose a tp that divides {sizes.query_groups} or is a multiple of it")
    if sizes.layers % chunks:
        names = "pp" if topology.virtual_pipeline == 1 else "pp × vpp"
        sized = (
            f"pp {topology.pipeline_parallel}"
            if topology.virtual_pipeline == 1
            else f"pp {topology.pipeline_parallel} × vpp {topology.virtual_pipeline} = {chunks}"
        )
        yield _problem("pp", f"{sizes.layers} layers do not divide by {sized}", _divisor(names, sizes.layers))
    if sizes.vocabulary % tp:
        padded = -(-sizes.vocabulary // tp) * tp
        what = (
            f"the vocabulary is padded to {sizes.vocabulary:,} rows, which do not divide by tp {tp}; this target would "
            f"need a padding to at least {padded:,}, so its embedding would be another tensor than the saved one"
        )
        yield _problem("tp", what, _divisor("tp", sizes.vocabulary))
    for name, extent in sizes.split.items():
        if extent % tp:
            yield _problem("tp", f"{name}, {extent:,}, does not divide by tp {tp}", _divisor("tp", extent))
    yield from _expert_problems(sizes, topology)


def _expert_problems(sizes: ModelSizes, topology: MegatronTopology) -> Iterator[Problem]:
    ep, etp, tp = topology.expert_parallel, topology.expert_tensor_parallel, topology.tensor_parallel
    if not sizes.experts:
        if ep > 1:
            yield _problem("ep", f"ep {ep} spreads experts, and the model has none", "set ep to 1")
        return
    if sizes.experts % ep:
        yield _problem("ep", f"{sizes.experts} experts do not divide by ep {ep}", _divisor("ep", sizes.experts))
    if ep == 1 and etp != tp:
        what = (
            f"etp {etp} with tp {tp} and ep 1: without expert parallelism Megatron reduces the experts' gradients "
            "over the dense data parallel ranks, and copies of an expert would drift apart"
        )
        yield _problem("etp", what, "set etp to tp, or ep to 2 or more")
    if tp > 1 and not topology.sequence_parallel:
        what = f"experts with tp {tp} need sequence parallelism"
        yield _problem("sequence_parallel", what, "set sequence_parallel=on")
    for name, extent in sizes.expert_split.items():
        if extent % etp:
            yield _problem("etp", f"{name}, {extent:,}, does not divide by etp {etp}", _divisor("etp", extent))


def batch_problems(target: Target, global_batch: int) -> list[Problem]:
    """Whether the target's data parallel ranks can make up the global batch of the save."""
    ranks = target.topology.data_parallel
    said = {"micro_batch": target.micro_batch, "accumulation": target.accumulation}
    known = math.prod(size for size in said.values() if size is not None) * ranks
    parts = [f"{key} {size}" for key, size in said.items() if size is not None]
    factors = " × ".join([*parts, f"{ranks} data parallel ranks"])
    if None not in said.values():
        if known == global_batch:
            return []
        what = f"{factors} make a global batch of {known}; it was {global_batch}"
        return [_problem("global batch", what, f"choose micro_batch × accumulation = {global_batch / ranks:g}")]
    if global_batch % known == 0:
        return []
    what = f"the global batch of {global_batch} does not divide by {factors}"
    return [_problem("global batch", what, "choose sizes that do, or allow another global batch in the policy")]


def _divisor(name: str, number: int) -> str:
    return f"choose {name} as a divisor of {number:,}"


def _problem(where: str, what: str, remedy: str) -> Problem:
    return Problem("target", where, what, remedy)
