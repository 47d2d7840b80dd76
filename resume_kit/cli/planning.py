"""``resume-kit plan CKPT --target …``: may it resume there, and what would every rank read?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.reading import read_index
from resume_kit.cli.listing import engine_text
from resume_kit.cli.opening import find_problems, open_checkpoint, open_manifest
from resume_kit.cli.output import (
    BAD,
    FINE,
    Outcome,
    facts,
    heading,
    printable,
    problem_block,
    problem_documents,
    size_text,
    table,
)
from resume_kit.cli.values import mapping
from resume_kit.errors import Problem, ResumeKitError
from resume_kit.integrity.verify import MALFORMED
from resume_kit.planning.forecast import Forecast, forecast, model_geometry
from resume_kit.planning.holders import format_ranks
from resume_kit.planning.layouts.target import ModelSizes, Target, batch_problems, parse_target, target_problems
from resume_kit.planning.layouts.topology import MegatronTopology, ZeroTopology
from resume_kit.policy.judgement import Judgement, RunFacts, judge
from resume_kit.policy.policy import PRESETS, Policy

#: Ranks that the text shows one by one before it shows the first ones and a summary.
_SHOWN = 8
_DEFAULT = "flexible"
#: Settings of the engine that its topology says too.
_SAID_TWICE = {
    "deepspeed.zero_optimization.stage",
    *(f"parallel.{name}" for name in MegatronTopology().to_settings().keys() - {"overlap_grad_reduce", "bucket_size"}),
}


@dataclass(frozen=True)
class Plan:
    """The answer: what changes, all that speaks against it, and the reads where they can be told."""

    target: Target
    judgement: Judgement
    refusals: tuple[Problem, ...]
    forecast: Forecast | None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CKPT", help="a checkpoint; of a run, its newest")
    parser.add_argument(
        "--target",
        required=True,
        metavar="KEY=VALUE,…",
        help="world=6 or world=16,tp=4,pp=2 and so on; what is not said stays as it was",
    )
    parser.add_argument(
        "--policy", default=_DEFAULT, metavar="NAME|FILE", help=f"{', '.join(PRESETS)} or a YAML file ({_DEFAULT})"
    )
    parser.epilog = (
        "keys: engine, world, micro_batch, accumulation; of deepspeed: stage; of megatron: tp, pp, vpp, ep, etp, "
        "sequence_parallel, distributed_optimizer, overlap, bucket_size. exit 1 when it may not resume there"
    )


def execute(arguments: argparse.Namespace) -> Outcome:
    policy = Policy.preset(arguments.policy) if arguments.policy in PRESETS else Policy.from_file(arguments.policy)
    directory = open_checkpoint(arguments.path)
    manifest = open_manifest(directory)
    try:
        plan = _plan(directory, manifest, arguments.target, policy)
    except ResumeKitError:
        raise
    except MALFORMED as error:
        raise canonical.damaged(directory / names.MANIFEST, f"a field of it is malformed: {error!r}") from None
    document = _document(directory, manifest, plan, arguments.policy)
    return Outcome(BAD if plan.refusals else FINE, document, [*_text(directory, manifest, plan, arguments.policy)])


def _plan(directory: Path, manifest: Manifest, text: str, policy: Policy) -> Plan:
    saved = RunFacts.of_manifest(manifest)
    target = parse_target(text, {**manifest.engine, **_buckets(saved)})
    damage = find_problems(directory)
    judgement = judge(saved, _live(saved, target), policy)
    same_engine = target.topology.to_engine()["engine"] == manifest.engine.get("engine")
    misfits = _misfits(manifest, target) if same_engine else []
    lacking: list[Problem] = []
    reads = None
    if same_engine and not damage and not misfits:
        indices = [read_index(directory, manifest, rank) for rank in range(manifest.world_size)]
        reads = forecast(manifest, indices, target.topology)
        lacking = missing_bytes(reads)
    if not misfits and policy.global_batch == "equal":
        misfits += _batch(target, saved.data.get("global_batch_size"))
    return Plan(target, judgement, (*damage, *lacking, *misfits, *judgement.refusals), reads)


def _buckets(saved: RunFacts) -> dict[str, Any]:
    """How a Megatron run cut its gradient buffer, which its topology does not say; what nobody chose is left out."""
    settings = mapping(saved.pinned.get("parallel"))
    if settings.get("overlap_grad_reduce") is not True:
        return {}
    size, without = settings.get("bucket_size"), MegatronTopology.from_engine({**saved.topology, "overlap": True})
    chosen = isinstance(size, int) and size != without.bucket_limit
    return {"overlap": True, **({"bucket_size": size} if chosen else {})}


def _batch(target: Target, global_batch: object) -> list[Problem]:
    """What of the global batch does not divide; where all of it is said, the policy judges the product."""
    said = None not in (target.micro_batch, target.accumulation)
    return [] if said or not isinstance(global_batch, int) else batch_problems(target, global_batch)


def _misfits(manifest: Manifest, target: Target) -> list[Problem]:
    if isinstance(target.topology, ZeroTopology):
        return target_problems(None, target.topology)
    try:
        geometry = model_geometry(manifest)
    except ValueError as error:
        remedy = "save it anew with this version of resume_kit"
        return [Problem("target", "geometry", str(error), remedy), *target_problems(None, target.topology)]
    return target_problems(ModelSizes.of_geometry(geometry), target.topology)


def missing_bytes(reads: Forecast) -> list[Problem]:
    """What ranks of the target need and no file holds, although every tensor is whole by its own account."""
    return [
        Problem("ownership", f"rank {rank}", f"{int(lacking):,} bytes that it needs are in no file", canonical.RESTORE)
        for rank, lacking in enumerate(reads.plan.missing.tolist())
        if lacking
    ]


def _live(saved: RunFacts, target: Target) -> RunFacts:
    """The run as it would be there: the same but for topology and what makes up the global batch."""
    pinned = canonical.decode(canonical.encode(dict(saved.pinned)))
    deepspeed, config = (pinned.get(name) for name in ("deepspeed", "config"))
    batch = {"micro_batch_size": target.micro_batch, "gradient_accumulation_steps": target.accumulation}
    if isinstance(target.topology, ZeroTopology) and isinstance(deepspeed, dict):
        _put(deepspeed.get("zero_optimization"), {"stage": target.topology.stage})
        _put(deepspeed, {**batch, "train_micro_batch_size_per_gpu": target.micro_batch})
    if isinstance(target.topology, MegatronTopology) and isinstance(settings := pinned.get("parallel"), dict):
        settings.update({key: value for key, value in target.topology.to_settings().items() if key in settings})
    _put(config, batch)
    data = dict(saved.data)
    if target.micro_batch is not None and target.accumulation is not None:
        data["global_batch_size"] = target.micro_batch * target.accumulation * target.topology.data_parallel
        _put(deepspeed, {"train_batch_size": data["global_batch_size"]})
        _put(config, {"global_batch_size": data["global_batch_size"]})
    return replace(saved, topology=target.topology.to_engine(), pinned=pinned, data=data)


def _put(section: object, values: Mapping[str, int | None]) -> None:
    """Set what the section states already."""
    if isinstance(section, dict):
        section.update({key: value for key, value in values.items() if key in section and value is not None})


def _document(directory: Path, manifest: Manifest, plan: Plan, policy: str) -> dict[str, Any]:
    return {
        "path": str(directory),
        "step": manifest.step,
        "ok": not plan.refusals,
        "policy": policy,
        "engine": manifest.engine,
        "target": plan.target.topology.to_engine(),
        "changes": [change.to_json() for change in plan.judgement.changes],
        "problems": problem_documents(plan.refusals),
        "warnings": problem_documents(plan.judgement.warnings),
        "reads": None if plan.forecast is None else _reads(plan.forecast),
    }


def _reads(reads: Forecast) -> dict[str, Any]:
    return {
        "bytes": int(reads.plan.read.sum()),
        "summary": {
            name: {"min": int(column.min()), "median": int(np.median(column)), "max": int(column.max())}
            for name, column in _columns(reads).items()
        },
        "ranks": [
            {
                "rank": rank,
                **{name: int(column[rank]) for name, column in _columns(reads).items()},
                "from_ranks": format_ranks(reads.plan.files_of(rank)),
            }
            for rank in range(len(reads.plan.read))
        ],
    }


def _columns(reads: Forecast) -> dict[str, Any]:
    return {
        "bytes": reads.plan.read,
        "files": reads.plan.files,
        "parts": reads.plan.parts,
        "peak_host_bytes": reads.peak_host_bytes,
    }


def _text(directory: Path, manifest: Manifest, plan: Plan, policy: str) -> Iterator[RenderableType]:
    name = printable(str(directory))
    if plan.refusals:
        count = "1 reason" if len(plan.refusals) == 1 else f"{len(plan.refusals)} reasons"
        yield Text(f"✗ {name} may not resume there: {count}", style="bold red")
        yield problem_block(plan.refusals)
    else:
        yield Text(f"✓ {name} may resume there", style="green")
    yield facts(_summary(manifest, plan, policy))
    if plan.judgement.changes:
        yield heading("what would change")
        yield table(("what", "before", "after", "what is done"), [*_changes(manifest, plan)])
    if plan.judgement.warnings:
        yield heading("warnings")
        yield problem_block(plan.judgement.warnings)
    if plan.forecast is not None:
        yield heading("reads")
        yield _read_table(plan.forecast)


def _changes(manifest: Manifest, plan: Plan) -> Iterator[tuple[object, ...]]:
    """What would change: all sizes of the topology in one row, and not again where the engine's settings say them."""
    saved, target = manifest.engine, plan.target.topology.to_engine()
    sizes = {key for key, value in target.items() if isinstance(value, int) and not isinstance(value, bool)}
    moved = [change for change in plan.judgement.changes if change.path in sizes]
    if moved:
        shown = [{key: value for key, value in one.items() if key in {"engine", *sizes}} for one in (saved, target)]
        yield "topology", *(f"{engine_text(one)}, {one.get('world_size')} ranks" for one in shown), moved[0].action
    for change in plan.judgement.changes:
        if change not in moved and change.path not in _SAID_TWICE:
            yield change.path, change.before, change.after, change.action


def _summary(manifest: Manifest, plan: Plan, policy: str) -> Iterator[tuple[str, object]]:
    topology = plan.target.topology.to_engine()
    default = ", the default" if policy == _DEFAULT else ""
    yield "step", manifest.step
    yield "saved on", f"{engine_text(manifest.engine)}, {manifest.world_size} ranks"
    yield "target", f"{engine_text(topology)}, {topology['world_size']} ranks"
    yield "policy", f"{policy}{default}"
    batch = mapping(canonical.decode(manifest.data)).get("global_batch_size")
    if batch is not None:
        ranks = plan.target.topology.data_parallel
        yield "global batch", f"{batch} samples, over {ranks} data parallel ranks"
    if plan.forecast is not None:
        total = int(plan.forecast.plan.read.sum())
        yield "read in all", f"{size_text(total)} ({total:,} bytes)"
        yield "surplus", "up to 5% more where whole digest blocks are read, and gaps of less than a page (4 KiB)"


def _read_table(reads: Forecast) -> RenderableType:
    columns = _columns(reads)
    world_size = len(reads.plan.read)

    def row(label: object, values: Mapping[str, int], files: str) -> tuple[object, ...]:
        sizes = size_text(values["bytes"]), size_text(values["peak_host_bytes"])
        return label, sizes[0], sizes[1], values["files"], values["parts"], files

    rows = []
    for rank in range(min(world_size, _SHOWN)):
        values = {name: int(column[rank]) for name, column in columns.items()}
        rows.append(row(rank, values, format_ranks(reads.plan.files_of(rank))))
    if world_size > _SHOWN:
        rows.append(("…", "", "", "", "", f"{world_size - _SHOWN} more; all are in --json"))
    for label, figure in (("min", np.min), ("median", np.median), ("max", np.max)) if world_size > 2 else ():
        rows.append(row(label, {name: int(figure(column)) for name, column in columns.items()}, ""))
    headings = ("rank", "reads", "peak host memory", "files", "parts", "of ranks")
    return table(headings, rows, right=headings[:5])
