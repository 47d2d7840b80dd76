"""Training jobs of either engine, watched from near: what a policy did to the live state, and the LR really used."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import Job, build, live_digests
from tests.megatron_jobs import MegatronJob
from tests.ranks import RankFailure

Step = Callable[[Iterator[Any]], Any]


@dataclass(frozen=True)
class Watched:
    """One rank's view. `used`: LR of the first group in each update; `resumed` and `ended`: what `look` saw then."""

    resumed_at: int
    records: list[dict[str, Any]]
    used: list[float]
    resumed: dict[str, Any]
    ended: dict[str, Any]
    state: dict[str, str]
    changes: list[dict[str, Any]]
    warnings: list[str]

    def of(self, name: str, steps: range | None = None) -> list[Any]:
        """A figure of the records, of these steps only."""
        return [record[name] for record in self.records if steps is None or record["step"] in steps]

    def after(self, step: int) -> list[dict[str, Any]]:
        return [record for record in self.records if record["step"] > step]

    def parts(self) -> set[str]:
        return {change["part"] for change in self.changes}


def watch(
    rank: int,
    world_size: int,
    options: dict[str, Any],
    *,
    megatron: bool = False,
    save_at_once: bool = False,
    weight_decay: float | None = None,
    versions: dict[str, str] | None = None,
) -> Watched:
    """Resume a job, perhaps save before any step, train to its end. `versions` stand in for those installed."""
    import resume_kit.run.kit as kit_module
    from resume_kit import Policy, ResumeKit, Retention

    if versions:
        found = {**kit_module.software_versions(), **versions}
        kit_module.software_versions = lambda: found
    job: Any = (MegatronJob if megatron else Job)(**options)
    engine, loader, step, config = (_megatron if megatron else _deepspeed)(rank, world_size, job)
    if weight_decay is not None:
        engine.optimizer.param_groups[0]["weight_decay"] = weight_decay
    kit = ResumeKit(
        engine,
        loader,
        Policy.from_mapping(job.policy),
        run_dir=job.run_dir,
        save_every=job.save_every or None,
        retention=Retention(keep_last=job.keep_last),
        config=config,
        timeout=job.timeout,
        show=lambda _: None,
    )
    used: dict[int, float] = {}

    def note(groups: list[dict[str, Any]]) -> Callable[[], None]:
        used[kit.step_number] = float(groups[0]["lr"])
        return lambda: None

    kit._adapter.before_update(note)  # later than the kit's own hook, so it sees what the update sees
    resumed_at = kit.resume()
    resumed = look(kit)
    if save_at_once:
        kit.save()
    records = []
    batches = iter(loader)
    while kit.step_number < job.steps:
        record = kit.step(step(batches))
        if record:
            records.append(record)
    kit.close()
    loader.close()
    assert kit.report is not None
    return Watched(
        resumed_at,
        records,
        list(used.values()),
        resumed,
        look(kit),
        live_digests(kit),
        list(kit.report.changes),
        [f"{check.name}: {check.figure}" for check in kit.report.checks if check.verdict == "warn"],
    )


def _deepspeed(rank: int, world_size: int, job: Job) -> tuple[Any, Any, Step, dict[str, Any]]:
    from launch.entry import seed_everything

    if job.precision == "fp16":
        _admit_fp16()
    engine, loader = build(rank, world_size, job)
    seed_everything(job.seed + 100 + rank)

    def step(batches: Iterator[Any]) -> Any:
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        engine.step()
        return loss

    return engine, loader, step, {"seed": job.seed}


def _admit_fp16() -> None:
    """torch computes in fp16 on any CPU; DeepSpeed asks whether it would be fast."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]


def _megatron(rank: int, world_size: int, job: MegatronJob) -> tuple[Any, Any, Step, dict[str, Any]]:
    from launch.megatron_training import build as build_training
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.megatron import MegatronEngine

    config = job.config()
    prepare_environment(config)
    training = build_training(config)
    engine = MegatronEngine(training.chunks, training.optimizer, training.scheduler)

    def step(batches: Iterator[Any]) -> Any:
        result = training.step(batches)
        engine.stepped(result.successful, result.grad_norm)
        return result.loss

    return engine, training.loader, step, config.pinned()


def look(kit: Any) -> dict[str, Any]:
    """Live state that policies touch."""
    import torch

    from resume_kit.engines import rng
    from resume_kit.engines.casts import cast_mismatches

    adapter = kit._adapter
    pieces = adapter.pieces()
    state = adapter.state()
    generators = rng.capture(adapter.rng_trackers())
    return {
        "moments": max((float(p.data.abs().max()) for p in pieces if p.spec.key.kind[:7] == "exp_avg"), default=0.0),
        "adam steps": sorted({s["step"]["value"] for s in adapter.scalars().values() if "step" in s}),
        "group steps": [group.get("step") for group in state["groups"]],
        "weight decay": [group["weight_decay"] for group in state["groups"]],
        "scheduler": state["scheduler"],
        "scaler": state["scaler"],
        "position": kit._data.position,
        "dtypes": sorted({p.spec.dtype for p in pieces if p.spec.key.kind == "param"}),
        "casts": not cast_mismatches([(p.data, p.cast_of.data) for p in pieces if p.cast_of is not None]).any(),
        "rng": rng.digests(generators),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def copied(job: Any, folder: Path, **changes: Any) -> Any:
    """The job on a copy of its run, with changes."""
    run = folder / f"copy-{len(list(folder.glob('copy-*')))}"
    shutil.copytree(job.run_dir, run)
    return job.but(run_dir=str(run), **changes)


def watched(ranks: Ranks, world_size: int, job: Any, **given: Any) -> list[Watched]:
    """Run a job under `watch`. All ranks must report the same changes, and the journal those of the resume."""
    megatron = isinstance(job, MegatronJob)
    found: list[Watched] = ranks.run(functools.partial(watch, megatron=megatron, **given), world_size, job.to_json())
    assert all(one.changes == found[0].changes for one in found)
    if found[0].resumed_at:
        lines = (Path(job.run_dir) / "journal.jsonl").read_text().splitlines()
        event = [event for event in map(json.loads, lines) if event["event"] == "resume"][-1]
        assert event["report"]["changes"] == found[0].changes
    return found


def refusal(ranks: Ranks, world_size: int, job: Any, **given: Any) -> str:
    """The text of the error with which every rank refuses to resume a job."""
    with pytest.raises(RankFailure) as failure:
        watched(ranks, world_size, job, **given)
    assert {o.error_type for o in failure.value.outcomes} == {"resume_kit.errors.ResumeRefused"}, str(failure.value)
    return str(failure.value.outcomes[0].error)
