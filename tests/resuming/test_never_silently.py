"""Ways in which a wrong run could train on without a word, each found by trying, each refused since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.damage import resign
from tests.jobs import Job, build, text_file, train
from tests.ranks import RankFailure, run_ranks


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A ZeRO-3 run with checkpoints of steps 2 and 4, and a fifth step."""
    folder = tmp_path_factory.mktemp("saved")
    job = Job(run_dir=str(folder / "run"), data=text_file(folder), steps=5, save_every=2)
    run_ranks(train, 2, job.to_json())
    return job


@pytest.fixture
def copy(saved: Job, tmp_path: Path) -> Job:
    shutil.copytree(saved.run_dir, tmp_path / "run")
    return saved.but(run_dir=str(tmp_path / "run"), steps=6)


def refused(ranks: Ranks, job: Job, faults: list[str] | None = None) -> str:
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), faults or [])
    return failure.value.outcomes[0].error_type + ": " + failure.value.outcomes[0].error


def test_a_replay_mismatch_stops_every_further_attempt(ranks: Ranks, copy: Job) -> None:
    journal = Path(copy.run_dir) / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    next(e for e in lines if e["event"] == "step" and e["step"] == 5)["batch"] = "0" * 16
    journal.write_text("".join(json.dumps(event) + "\n" for event in lines))
    for _ in range(2):
        text = refused(ranks, copy.but(policy={"replay": "warn"}))
        assert "ReplayMismatch" in text
        assert "batch was 0000000000000000" in text


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(ranks: Ranks, copy: Job) -> None:
    for path in Path(copy.run_dir).glob("step-*"):
        shutil.rmtree(path)
    text = refused(ranks, copy)
    assert "all checkpoints are gone" in text
    assert "step 4 was committed" in text


def test_a_loader_that_does_not_seek_is_refused(ranks: Ranks, copy: Job) -> None:
    text = refused(ranks, copy, ["dead-seek"])
    assert "position: after seek() it is 0, saved 16" in text
    assert "next batch: after seek()" in text


def test_a_gate_without_its_record_is_refused(ranks: Ranks, copy: Job) -> None:
    resign(Path(copy.run_dir) / "step-000000004" / "manifest.json", lambda d: d.update(gate=None))
    text = refused(ranks, copy)
    assert "holds no record of it" in text
    assert "`gate: false`" in text


def misused(rank: int, world_size: int, options: dict[str, Any], other: str) -> dict[str, str]:
    """Make kits that must be refused at once, and resume with odd requests; the error of each."""
    from resume_kit import Policy, ResumableLoader, ResumeKit, ResumeKitError, TokenDataset

    class Forgetful:
        value = 7

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Takes nothing over."""

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    found: dict[str, str] = {}

    def attempt(name: str, act: Any) -> None:
        try:
            found[name] = f"no error: {act()}"
        except ResumeKitError as error:
            found[name] = f"{type(error).__name__}: {error}"

    def kit(data: Any = loader, **given: Any) -> Any:
        arguments = {"run_dir": job.run_dir, "config": {"seed": job.seed}, "show": lambda _: None, **given}
        return ResumeKit(engine, data, Policy(), **arguments)

    stranger = ResumableLoader(
        TokenDataset.from_path(other if rank else job.data, sequence_length=job.sequence_length),
        micro_batch_size=job.micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=job.seed,
    )
    attempt("other data on a rank", lambda: kit(data=stranger))
    attempt("other directory on a rank", lambda: kit(run_dir=f"{job.run_dir}-{rank}"))
    attempt("no such step", lambda: kit().resume(at=3))
    attempt("step before resume", lambda: kit().step(1.0))
    attempt("user state that was not saved", lambda: kit(state={"extra": Forgetful()}).resume())
    fresh = kit(run_dir=f"{job.run_dir}-fresh", state={"extra": Forgetful()})
    fresh.resume()
    fresh.save()
    Forgetful.value = 8
    attempt(
        "user state that does not load",
        lambda: kit(run_dir=f"{job.run_dir}-fresh", state={"extra": Forgetful()}).resume(),
    )
    return found


def test_misuse_is_refused_alike_on_all_ranks(ranks: Ranks, copy: Job, tmp_path: Path) -> None:
    other = text_file(tmp_path, flip=5)
    mine, others = ranks.run(misused, 2, copy.to_json(), other)
    assert mine == others
    expected = {
        "other data on a rank": "UsageError: the ranks were not given the same run\n  [agreement] rank 1, dataset",
        "other directory on a rank": "rank 1, run_dir",
        "no such step": "UsageError: there is no checkpoint of step 3; there are [4, 2]",
        "step before resume": "call resume() before",
        "user state that was not saved": "give the objects of the save",
        "user state that does not load": "after load_state_dict() its state_dict() is not the saved one",
    }
    for name, text in expected.items():
        assert text in mine[name], f"{name}: {mine[name]}"


def lenient(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Resume at step 2 with another weight decay and learning rate; the live group afterwards."""
    from resume_kit import Policy, ResumeKit

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    group = engine.optimizer.param_groups[0]
    group["weight_decay"] = 0.5
    policy = Policy.from_mapping({"hyperparameters": "live"})
    kit = ResumeKit(engine, loader, policy, run_dir=job.run_dir, config={"seed": job.seed}, show=lambda _: None)
    return {"step": kit.resume(at=2), "weight_decay": engine.optimizer.param_groups[0]["weight_decay"]}


def test_a_lenient_resume_takes_the_live_hyperparameters_at_the_step_asked_for(ranks: Ranks, copy: Job) -> None:
    for found in ranks.run(lenient, 2, copy.to_json()):
        assert found == {"step": 2, "weight_decay": 0.5}
    assert (Path(copy.run_dir) / "set-aside" / "step-000000004.attempt-2").is_dir()


def unsupported(rank: int, world_size: int, options: dict[str, Any]) -> str:
    from resume_kit import ResumeKit
    from resume_kit.errors import UsageError

    engine, loader = build(rank, world_size, Job(**options))
    with pytest.raises(UsageError) as refusal:
        ResumeKit(engine, loader, run_dir="never")
    return str(refusal.value)


def test_what_would_not_be_saved_whole_is_refused_at_once(ranks: Ranks, copy: Job) -> None:
    job = copy.but(stage=1, zero={"round_robin_gradients": True})
    assert "round_robin_gradients" in ranks.run(unsupported, 2, job.to_json())[0]
