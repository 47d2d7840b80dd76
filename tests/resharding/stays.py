"""What a rank does in one topology: resume, save where told, train on, and tell what it saw. Both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from tests.faults import Faults
from tests.jobs import Job, build, live_digests
from tests.megatron_jobs import MegatronJob
from tests.resharding.trips import AnyJob


@dataclass(frozen=True)
class Stay:
    """Of one rank: records of the steps trained, digests of its final state, and how its resume went.

    `samples` has for each step the digests of the samples that the rank of the data-parallel number `data_rank`
    took; `read` is the report's account of the bytes, of all ranks.
    """

    resumed_at: int
    records: tuple[Mapping[str, Any], ...]
    state: Mapping[str, str]
    data_rank: int
    samples: tuple[tuple[str, ...], ...]
    read: Mapping[str, Any]
    rejected: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, eq=False)
class _Running:
    """A built engine: `train_step` takes the batches of one optimizer step, tells the kit, returns its record."""

    engine: Any
    loader: Any
    data_rank: int
    config: Mapping[str, Any]
    train_step: Callable[[Iterator[Any], Any], Mapping[str, Any]]


@dataclass(eq=False)
class _Watched(Iterator[Any]):
    """Batches as they come, the samples in them noted by content."""

    batches: Iterator[Any]
    taken: list[str] = field(default_factory=list)

    def __next__(self) -> Any:
        batch = next(self.batches)
        self.taken += [xxhash.xxh3_64_hexdigest(row.numpy().tobytes()) for row in batch["input_ids"]]
        return batch

    def take(self) -> tuple[str, ...]:
        taken, self.taken = self.taken, []
        return tuple(taken)


def stay(
    rank: int, world_size: int, job: AnyJob, until: int, save_at: int | None = None, faults: Sequence[str] = ()
) -> Stay:
    """Resume, train to step `until`, and take a checkpoint at step `save_at`: at once where the resume ends there."""
    from resume_kit import Policy, ResumeKit

    running = _megatron(job) if isinstance(job, MegatronJob) else _deepspeed(rank, world_size, job)
    hold = Faults([*faults], rank)
    kit = ResumeKit(
        running.engine,
        running.loader,
        Policy.from_mapping(job.policy),
        run_dir=job.run_dir,
        config=running.config,
        timeout=job.timeout,
        show=lambda text: print(text, flush=True),
    )
    hold.before_resume(running.engine, kit)
    resumed_at = step = kit.resume()
    hold.after_resume(running.engine)
    if step == save_at:
        kit.save()
    batches = _Watched(iter(running.loader))
    records, samples = [], []
    while step < until:
        record = running.train_step(batches, kit)
        records.append(record)
        samples.append(batches.take())
        step = record["step"]
        if step == save_at:
            kit.save()
    kit.close()
    running.loader.close()
    assert kit.report is not None
    return Stay(
        resumed_at,
        tuple(records),
        live_digests(kit),
        running.data_rank,
        tuple(samples),
        kit.report.read,
        tuple(kit.report.rejected),
    )


def _deepspeed(rank: int, world_size: int, job: Job) -> _Running:
    from launch.entry import seed_everything

    engine, loader = build(rank, world_size, job)
    seed_everything(job.seed + 100 + rank)

    def train_step(batches: Iterator[Any], kit: Any) -> Mapping[str, Any]:
        while True:
            loss = engine(**next(batches)).loss
            engine.backward(loss)
            engine.step()
            record: Mapping[str, Any] | None = kit.step(loss)
            if record is not None:
                return record

    return _Running(engine, loader, rank, {"seed": job.seed}, train_step)


def _megatron(job: MegatronJob) -> _Running:
    from launch.megatron_training import build
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.megatron import MegatronEngine

    config = job.config()
    prepare_environment(config)
    training = build(config)
    engine = MegatronEngine(training.chunks, training.optimizer, training.scheduler)

    def train_step(batches: Iterator[Any], kit: Any) -> Mapping[str, Any]:
        result = training.step(batches)
        engine.stepped(result.successful, result.grad_norm)
        record: Mapping[str, Any] = kit.step(result.loss)
        return record

    from megatron.core import parallel_state

    return _Running(engine, training.loader, parallel_state.get_data_parallel_rank(), config.pinned(), train_step)
