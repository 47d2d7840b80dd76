"""Bit-exact continuation on two real ranks, and what is said where a step or a tensor is not the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite.continuation import STEPS, Course, compare
from benchmarks.suite.presets import PRESETS
from benchmarks.suite.results import Results, Row
from tests.conftest import Ranks

COURSE = Course(
    [{"step": 3, "loss": 0.5, "grad_norm": 1.0}, {"step": 4, "loss": 0.25, "grad_norm": 2.0}], {"a": "01", "b": "02"}
)


def told(again: Course) -> Row:
    row = Row("part", "ext4", "continuation", "here")
    compare(row, COURSE, again)
    return row


def test_all_the_same_is_identical() -> None:
    row = told(COURSE)
    assert row.note == "identical: 2 of 2 tensors, 2 of 2 steps"
    assert row.failure == ""


@pytest.mark.parametrize("loss", [0.25 + math.ulp(0.25), math.nan])
def test_a_step_that_differs_in_the_last_bit_is_a_failure(loss: float) -> None:
    steps = [COURSE.steps[0], {**COURSE.steps[1], "loss": loss}]
    row = told(replace(COURSE, steps=steps))
    assert row.failure.startswith("identical are only 2 of 2 tensors, 1 of 2 steps; first {'step': 4, 'loss': 0.25,")
    assert row.note == ""
    assert row.figures == {"tensors": 2, "tensors identical": 2, "steps": 2, "steps identical": 1}


@pytest.mark.parametrize("tensors", [{"a": "01", "b": "03"}, {"a": "01"}, {"a": "01", "b": "02", "c": "03"}])
def test_a_tensor_that_differs_or_is_missing_is_a_failure(tensors: dict[str, str]) -> None:
    row = told(replace(COURSE, tensors=tensors))
    assert row.failure == f"identical are only {len(tensors.keys() & {'a', 'b'}) - (tensors.get('b') == '03')} of " + (
        f"{len(tensors.keys() | {'a', 'b'})} tensors, 2 of 2 steps"
    )


def account_of(root: str, engine: str) -> tuple[Any, Any]:
    """Account and workload of a part of the rehearsal, with fewer layers. Joins the process group."""
    from benchmarks.suite.account import Account, Job
    from benchmarks.suite.timing import Clock
    from benchmarks.suite.workloads import build

    spec = next(spec for spec in PRESETS["cpu-2x"].workloads if spec.engine == engine)
    work, out = Path(root) / "work", Path(root) / "out"
    fewer = {"deepspeed": ["model.num_hidden_layers=2"], "megatron": ["model.layers=2", "global_batch_size=2"]}
    workload = build(spec.engine, spec.config, [*spec.settings, *fewer[engine], f"run.dir={work}"])
    return Account(Job(PRESETS["cpu-2x"], spec, [work], out, Results("")), Clock(workload.device), {}), workload


def told_by(account: Any) -> list[dict[str, Any]]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return [{"where": row.system, "note": row.note, "failure": row.failure, **row.figures} for row in account.rows]


def begun(rank: int, world_size: int, root: str, engine: str) -> list[dict[str, Any]]:
    from benchmarks.suite.continuation import begin_run

    account, workload = account_of(root, engine)
    begin_run(account, workload, "ext4")
    return told_by(account)


def continued(rank: int, world_size: int, root: str, engine: str) -> list[dict[str, Any]]:
    """As a leg does; then against a course that was altered, and without one."""
    from benchmarks.suite.account import run_of_legs
    from benchmarks.suite.continuation import continue_again
    from benchmarks.suite.ours import Trainer

    account, workload = account_of(root, engine)
    file = run_of_legs(account.job) / "continuation.json"
    trainer = Trainer(workload, file.parent, replay="warn")
    continue_again(account, trainer, "ext4")
    trainer.resume()
    if rank == 0:
        course = json.loads(file.read_text())
        course["tensors"][next(iter(course["tensors"]))] = "0" * 16
        course["steps"][0]["loss"] += 1e-12
        file.write_text(json.dumps(course))
    account.clock.barrier()
    continue_again(account, trainer, "ext4")
    if rank == 0:
        file.unlink()
    account.clock.barrier()
    continue_again(account, trainer, "ext4")
    trainer.close()
    return told_by(account)


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_two_ranks_go_on_bit_exactly_and_an_altered_course_is_noticed(
    ranks: Ranks, tmp_path: Path, engine: str
) -> None:
    first, second = ranks.run(begun, 2, str(tmp_path), engine)
    assert first == second, "both ranks must say the same"
    (here,) = first
    number = here["tensors"]
    assert number > 50
    again, altered, missing = ranks.run(continued, 2, str(tmp_path), engine)[0]
    assert [here["where"], again["where"]] == ["the same process group", "a new process group"]
    for row in (here, again):
        assert row["note"] == f"identical: {number} of {number} tensors, {STEPS} of {STEPS} steps"
        assert row["failure"] == ""
    said = f"identical are only {number - 1} of {number} tensors, {STEPS - 1} of {STEPS} steps; first {{'step': 3"
    assert altered["failure"].startswith(said)
    assert missing["failure"].startswith("FileNotFoundError")
