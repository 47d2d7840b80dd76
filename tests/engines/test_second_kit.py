"""A second kit on an engine that has trained, and a kit on an optimizer that has loaded a state by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import Job, build, live_digests, text_file
from tests.megatron_jobs import MegatronJob

STEPS = 3

#: Engine, loader, a step that returns the loss, the torch optimizers that do the updates.
Parts = tuple[Any, Any, Callable[[Iterator[Any]], Any], list[Any]]


def deepspeed_parts(rank: int, world_size: int, options: dict[str, Any]) -> Parts:
    engine, loader = build(rank, world_size, Job(**options))

    def step(batches: Iterator[Any]) -> Any:
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        engine.step()
        return loss

    return engine, loader, step, [engine.optimizer.optimizer]


def megatron_parts(rank: int, world_size: int, options: dict[str, Any]) -> Parts:
    from launch.megatron_training import build as build_training
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.megatron import MegatronEngine
    from resume_kit.engines.megatron.ownership import single_optimizers

    config = MegatronJob(**options).config()
    prepare_environment(config)
    training = build_training(config)
    engine = MegatronEngine(training.chunks, training.optimizer, training.scheduler)

    def step(batches: Iterator[Any]) -> Any:
        result = training.step(batches)
        engine.stepped(result.successful, result.grad_norm)
        return result.loss

    return engine, training.loader, step, [one.optimizer for one in single_optimizers(training.optimizer)]


def parts_of(rank: int, world_size: int, options: dict[str, Any]) -> Parts:
    parts = deepspeed_parts if "stage" in options else megatron_parts
    return parts(rank, world_size, options)


def kit_of(engine: Any, loader: Any, options: dict[str, Any]) -> Any:
    from resume_kit import ResumeKit

    return ResumeKit(engine, loader, run_dir=options["run_dir"], timeout=60.0, show=lambda _text: None)


def twice(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train, save, train on; then the same again from the checkpoint, with a second kit on the same engine."""
    engine, loader, step, _ = parts_of(rank, world_size, options)
    rounds = []
    for _ in range(2):
        kit = kit_of(engine, loader, options)
        resumed_at = kit.resume()
        batches = iter(loader)
        records = [kit.step(step(batches)) for _ in range(resumed_at, STEPS)]
        if not resumed_at:
            kit.save()
        state = live_digests(kit)
        records += [kit.step(step(batches)) for _ in range(2)]
        kit.close()
        rounds.append({"resumed_at": resumed_at, "state": state, "records": plain(records)[-2:]})
    loader.close()
    return {"first": rounds[0], "second": rounds[1]}


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: record[key] for key in ("step", "loss", "grad_norm", "lr")} for record in records]


TWICE = {
    "ZeRO-1": Job(run_dir="", stage=1, buffers=False),
    "ZeRO-2, another schedule": Job(run_dir="", stage=2, buffers=False, groups=2, scheduler="lambda"),
    "ZeRO-3": Job(run_dir="", stage=3, buffers=False),
    "Megatron": MegatronJob(),
    "Megatron, experts": MegatronJob(ep=2, experts=4, swiglu=True),
}


@pytest.mark.parametrize("job", TWICE.values(), ids=TWICE)
def test_a_second_kit_resumes_under_the_strict_policy(job: Job | MegatronJob, ranks: Ranks, tmp_path: Path) -> None:
    job = job.but(run_dir=str(tmp_path / "run"), data=text_file(tmp_path))
    for found in ranks.run(twice, 2, job.to_json()):
        assert found["first"]["resumed_at"] == 0
        assert found["second"] == {**found["first"], "resumed_at": STEPS}


def reloaded(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train with optimizers that load a copy of their own state at step 1; save at step 3, or resume there."""
    engine, loader, step, optimizers = parts_of(rank, world_size, options)
    kit = kit_of(engine, loader, options)
    resumed_at = kit.resume()
    batches = iter(loader)
    rates = []
    for number in range(resumed_at, STEPS):
        record = kit.step(step(batches))
        rates.append((record["lr"], optimizers[0].param_groups[0]["lr"]))
        if number == 0:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if not resumed_at:
        kit.save()
    state = live_digests(kit)
    kept = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    records = [kit.step(step(batches)) for _ in range(2)]
    kit.close()
    loader.close()
    return {"resumed_at": resumed_at, "rates": rates, "state": state, "kept": kept, "records": plain(records)}


RELOADED = {
    "ZeRO-1": Job(run_dir="", stage=1, buffers=False),
    "ZeRO-2": Job(run_dir="", stage=2, buffers=False, groups=2),
    "Megatron": MegatronJob(),
    "Megatron, whole optimizer": MegatronJob(tp=2, distributed_optimizer=False),
    "Megatron, fp32": MegatronJob(pp=2, distributed_optimizer=False, precision="fp32"),
    "Megatron, experts": MegatronJob(ep=2, experts=4, swiglu=True),
}


@pytest.mark.parametrize("job", RELOADED.values(), ids=RELOADED)
def test_a_save_holds_what_an_optimizer_has_loaded(job: Job | MegatronJob, ranks: Ranks, tmp_path: Path) -> None:
    job = job.but(run_dir=str(tmp_path / "run"), data=text_file(tmp_path))
    saved, resumed = ranks.run(reloaded, 2, job.to_json()), ranks.run(reloaded, 2, job.to_json())
    for before, after in zip(saved, resumed, strict=True):
        told, live = zip(*before["rates"], strict=True)
        assert told == live and len(set(live)) == STEPS
        assert after["resumed_at"] == STEPS
        assert {**after, "rates": 0} == {**before, "resumed_at": STEPS, "rates": 0}
