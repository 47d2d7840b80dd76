"""Bit-exact continuation: steps after a checkpoint, trained again from it in the same and in a new process group.

Algorithms are deterministic meanwhile. Compared are each step's record at full precision and, at the end, the
fingerprints of all tensors: weights, masters and moments.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.suite.account import Account, run_of_legs
from benchmarks.suite.ours import Trainer
from benchmarks.suite.results import Row
from benchmarks.suite.timing import SystemFailed
from benchmarks.suite.workloads import Workload
from resume_kit.algebra.fingerprint import to_hex
from resume_kit.engines.choose import adapter_for
from resume_kit.engines.fingerprint import fingerprints
from resume_kit.engines.totals import totals

STEPS = 4

#: In the run's directory, for a later process group.
_FILE = "continuation.json"


@dataclass(frozen=True)
class Course:
    """Records of the steps trained, and the fingerprint of each tensor after the last."""

    steps: list[dict[str, Any]]
    tensors: dict[str, str]

    @classmethod
    def train(cls, trainer: Trainer) -> Course:
        """Train `STEPS` steps. Collective."""
        steps = [trainer.step() for _ in range(STEPS)]
        return cls(steps, tensors_of(trainer.workload))


def begin_run(account: Account, workload: Workload, label: str) -> None:
    """The run that the legs resume: two steps and a checkpoint. Collective.

    Where a leg continues it, the steps after the checkpoint are trained twice, and the first course is kept beside it.
    It comes before all measurements: peers that load replace what the optimizer holds, unseen by a kit.
    """
    home, rank, continues = run_of_legs(account.job), account.clock.rank, account.job.spec.continues
    if rank == 0:
        shutil.rmtree(home, ignore_errors=True)
    account.clock.barrier()
    with _deterministic(workload, continues):
        trainer = Trainer(workload, home, replay="warn")
        for _ in range(2):
            trainer.step()
        trainer.kit.save()

        def again(row: Row) -> None:
            first = Course.train(trainer)
            if rank == 0:
                (home / _FILE).write_text(json.dumps(asdict(first)))
            row.add(account.clock.slowest_of(trainer.resume()))
            compare(row, first, Course.train(trainer))

        if continues:
            _attempt(account, label, "the same process group", again)
        trainer.close()


def continue_again(account: Account, trainer: Trainer, label: str) -> None:
    """Train what `begin_run` has, once more, from the checkpoint that this trainer has resumed. Collective."""

    def again(row: Row) -> None:
        first = Course(**json.loads((run_of_legs(account.job) / _FILE).read_text()))
        compare(row, first, Course.train(trainer))

    with _deterministic(trainer.workload, True):
        _attempt(account, label, "a new process group", again)


def compare(row: Row, first: Course, again: Course) -> None:
    """Say in `row` how many steps and tensors are the same; where not all are, as its failure."""
    keys = first.tensors.keys() | again.tensors.keys()
    tensors = [key for key in sorted(keys) if first.tensors.get(key) == again.tensors.get(key)]
    steps = [one["step"] for one, other in zip(first.steps, again.steps, strict=True) if one == other]
    said = f"{len(tensors)} of {len(keys)} tensors, {len(steps)} of {len(first.steps)} steps"
    row.figures |= {
        "tensors": len(keys),
        "tensors identical": len(tensors),
        "steps": len(first.steps),
        "steps identical": len(steps),
    }
    if (len(tensors), len(steps)) == (len(keys), len(first.steps)):
        row.note = f"identical: {said}"
        return
    odd = next(((a, b) for a, b in zip(first.steps, again.steps, strict=True) if a != b), None)
    row.failure = f"identical are only {said}" + (f"; first {odd[0]}, then {odd[1]}" if odd else "")


def tensors_of(workload: Workload) -> dict[str, str]:
    """Fingerprint of every tensor that the ranks hold together, by name. Collective."""
    adapter = adapter_for(workload.engine)
    adapter.settle()
    pieces = [piece for piece in adapter.pieces() if piece.owned]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {piece.spec.key for piece in pieces})
    keys = sorted(set[Any]().union(*of_ranks))
    values = fingerprints((piece.data, piece.spec.shape, piece.box) for piece in pieces)
    owned = totals(pieces, values, keys, 1, adapter.device).owned
    return {str(key): to_hex(value) for key, value in owned.items()}


def _attempt(account: Account, label: str, where: str, work: Callable[[Row], None]) -> None:
    row = Row(account.job.part, label, "continuation", where)
    account.rows.append(row)
    try:
        account.clock.attempt(lambda: work(row))
    except SystemFailed as failed:
        row.failure = str(failed)
    account.say(f"{where}: {row.failure or row.note}")
    account.publish()


@contextmanager
def _deterministic(workload: Workload, wanted: bool) -> Iterator[None]:
    """Only a workload that was configured to be deterministic can be: libraries read the environment at the start."""
    torch.use_deterministic_algorithms(wanted and workload.device.type == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
