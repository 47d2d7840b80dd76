"""Each check of the staged proof fires on the fault that it exists for, and names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import Job, text_file, train
from tests.ranks import RankFailure


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Job]:
    """A run of each stage that stopped after step 4, with checkpoints at 2 and 4."""
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("saved")
    data = text_file(folder)
    jobs = {}
    for stage in (2, 3):
        jobs[stage] = Job(run_dir=str(folder / f"zero{stage}"), data=data, stage=stage, steps=4, save_every=2)
        run_ranks(train, 2, jobs[stage].to_json())
    return jobs


def resume(ranks: Ranks, job: Job, tmp_path: Path, faults: list[str], **changes: Any) -> str:
    """Resume a copy of a saved run that must be refused; return the error's text on rank 0."""
    copy = tmp_path / "copy"
    shutil.copytree(job.run_dir, copy)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.but(run_dir=str(copy), steps=6, **changes).to_json(), faults)
    texts = [outcome.error for outcome in failure.value.outcomes if outcome.error_type]
    assert all(o.error_type.startswith("resume_kit.errors.") for o in failure.value.outcomes if o.error_type)
    events = [json.loads(line) for line in (copy / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "refuse"
    assert not any(e["event"] == "step" and e["attempt"] == 2 for e in events)
    return texts[0]


@pytest.mark.parametrize(
    ("fault", "stage", "expected"),
    [
        ("flip-moment", 3, "rank 1, exp_avg/"),
        ("flip-master", 2, "rank 1, master/"),
        ("flip-weight", 3, "rank 1, param/"),
        ("flip-copy", 2, "rank 1, param/"),
        ("zero-moments", 3, "rank 1, exp_avg"),
        ("wrong-step", 3, "step.value: live 1.0, saved 4.0"),
        ("other-forward", 3, "[gate]"),
        ("other-forward", 2, "grad_norm"),
        ("reseed-torch", 3, "rank 1, torch: changed between resume() and the first batch"),
        ("reseed-python", 2, "rank 1, python: changed"),
    ],
)
def test_a_wrong_live_state_is_refused(
    fault: str, stage: int, expected: str, ranks: Ranks, saved: dict[int, Job], tmp_path: Path
) -> None:
    text = resume(ranks, saved[stage], tmp_path, [fault])
    assert expected in text


def test_an_iterator_from_before_the_load_is_refused(ranks: Ranks, saved: dict[int, Job], tmp_path: Path) -> None:
    copy = saved[3].but(run_dir=str(tmp_path / "run"), steps=6)
    shutil.copytree(saved[3].run_dir, copy.run_dir)
    with pytest.raises(RankFailure, match="iter"):
        ranks.run(train, 2, copy.to_json(), ["iter-before-resume@0", "iter-before-resume@1"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 0.001}, ["deepspeed.optimizer.params.lr: saved with 0.003, live 0.001", "warmup_max_lr"]),
        ({"layers": 1}, ["missing in the live model", "transformer.h.1."]),
        ({"layers": 3}, ["additional in the live model", "transformer.h.2."]),
        ({"model": {"n_embd": 16}}, ["saved as float32[96], live float32[48]"]),
        ({"model": {"activation_function": "relu"}}, ["model.activation_function: saved with 'gelu_new', live 'relu'"]),
        ({"dropout": 0.2}, ["model.resid_pdrop: saved with 0.1, live 0.2"]),
        ({"groups": 2}, ["1 parameter groups were saved, 2 are live"]),
        ({"frozen": True}, ["master/transformer.wpe.weight"]),
        ({"sequence_length": 16}, ["fingerprint.sequence_length: saved with 32, live 16"]),
        ({"seed": 8}, ["fingerprint.seed: saved with 7, live 8", "config.seed"]),
        ({"accumulation": 2}, ["global_batch_size: saved with 4, live 8"]),
    ],
)
def test_another_run_is_refused_with_all_differences(
    changes: dict[str, Any], expected: list[str], ranks: Ranks, saved: dict[int, Job], tmp_path: Path
) -> None:
    text = resume(ranks, saved[3], tmp_path, [], **changes)
    for part in expected:
        assert part in text


def test_a_dataset_changed_by_one_byte_is_refused(ranks: Ranks, saved: dict[int, Job], tmp_path: Path) -> None:
    text = resume(ranks, saved[3], tmp_path, [], data=text_file(tmp_path, flip=30_000))
    assert "[data]" in text
    assert "fingerprint.content" in text


def test_another_world_size_is_refused_with_the_remedy(ranks: Ranks, saved: dict[int, Job]) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 1, saved[3].but(steps=6).to_json())
    text = failure.value.outcomes[0].error
    assert "world_size: saved with 2, live 1" in text
    assert "start the job on 2 ranks" in text


def test_a_lenient_policy_takes_the_live_configuration(ranks: Ranks, saved: dict[int, Job], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved[3].run_dir, copy)
    job = saved[3].but(run_dir=str(copy), steps=6, dropout=0.1, policy={"learning_rate": "override"}, lr=0.001)
    results = ranks.run(train, 2, job.to_json())
    assert results[0]["resumed_at"] == 4
    events = [json.loads(line) for line in (copy / "journal.jsonl").read_text().splitlines()]
    report = next(event["report"] for event in events if event["event"] == "resume")
    changed = {change["path"]: (change["before"], change["after"]) for change in report["changes"]}
    assert changed["deepspeed.scheduler.params.warmup_max_lr"] == (3e-3, 1e-3)
    replayed = {record["step"]: record["lr"] for record in results[0]["records"]}
    assert max(replayed.values()) <= 1e-3


def test_a_step_trained_again_must_be_the_step_of_the_journal(
    ranks: Ranks, saved: dict[int, Job], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved[3].run_dir, copy)
    shutil.rmtree(copy / "step-000000004")
    journal = copy / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in lines:
        if event["event"] == "step" and event["step"] == 4:
            event["loss"] += 1e-7
    journal.write_text("".join(json.dumps(event) + "\n" for event in lines))
    job = saved[3].but(run_dir=str(copy), steps=6)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json())
    assert "step 4, trained again, is not the step of the journal" in failure.value.outcomes[0].error
    assert {o.error_type for o in failure.value.outcomes} == {"resume_kit.errors.ReplayMismatch"}
    ranks.run(train, 2, job.but(policy={"replay": "warn"}).to_json())
