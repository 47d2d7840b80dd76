"""Ways in which a wrong run could train on without a word, each found by trying, each refused since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import megatron_jobs
from tests.checkpoints import left_in
from tests.conftest import Ranks
from tests.damage import resign, resign_index
from tests.jobs import Job, build, text_file, train
from tests.megatron_jobs import MegatronJob
from tests.ranks import RankFailure, run_ranks
from tests.resharding.stays import stay


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


@pytest.mark.parametrize(("fault", "counted"), [("forgotten-step", 0), ("extra-step-counter", 2)])
def test_a_step_that_megatrons_engine_is_not_told_of_once_is_refused(
    fault: str, counted: int, ranks: Ranks, tmp_path: Path
) -> None:
    job = MegatronJob(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), tp=2, steps=3, save_every=1)
    with pytest.raises(RankFailure) as failure:
        ranks.run(megatron_jobs.train, 2, job.to_json(), [f"{fault}@0", f"{fault}@1"])
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.UsageError"
        assert "the kit is not told of every step" in outcome.error
        assert f"the engine has counted {counted} optimizer steps" in outcome.error
    assert left_in(Path(job.run_dir)) == []


RESHARD = {"topology": "reshard"}


@pytest.fixture(scope="module")
def sharded(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> MegatronJob:
    """A Megatron run on two data-parallel ranks with a checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("sharded")
    job = MegatronJob(run_dir=str(folder / "run"), data=text_file(folder), save_every=0)
    run_ranks(stay, 2, job, 1, 1)
    return job


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("extra-generator", "rank 1, engine:mine: this rank has the generator, the save has no record of its stream"),
        ("lost-generator", "rank 1, engine:data-parallel-rng: recorded, but this rank has no such generator"),
    ],
)
def test_a_stream_is_not_derived_where_records_are_to_be_restored(
    fault: str, expected: str, ranks: Ranks, sharded: MegatronJob, tmp_path: Path
) -> None:
    job = sharded.but(
        run_dir=str(shutil.copytree(sharded.run_dir, tmp_path / "run")), distributed_optimizer=False, policy=RESHARD
    )
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, 2, job, 1, None, [fault])
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.ResumeRefused"
        assert expected in outcome.error and "set the policy `rng: derive`" in outcome.error
        assert "rank 0" not in outcome.error
    assert ranks.run(stay, 2, job.but(policy={**RESHARD, "rng": "derive"}), 1, None, [fault])[1].resumed_at == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rng: rng.pop("numpy"), "rank 1, numpy: this rank has the generator, the save has no record"),
        (lambda rng: rng.update(mine=rng["torch"]), "rank 1, mine: recorded, but this rank has no such generator"),
    ],
    ids=["no record", "no generator"],
)
def test_another_zero_stage_alone_restores_every_stream_or_refuses(
    change: Any, expected: str, ranks: Ranks, copy: Job
) -> None:
    job = copy.but(stage=1, policy=RESHARD)
    resign_index(Path(copy.run_dir) / "step-000000004", 1, lambda index: change(index["rng"]))
    text = refused(ranks, job)
    assert text.startswith("resume_kit.errors.ResumeRefused") and expected in text
    assert "rank 0" not in text


def test_there_and_back_restores_the_streams_that_were_carried_along(
    ranks: Ranks, sharded: MegatronJob, tmp_path: Path
) -> None:
    here = sharded.but(run_dir=str(shutil.copytree(sharded.run_dir, tmp_path / "run")), policy=RESHARD)
    records = [found.records[-1] for found in ranks.run(stay, 2, sharded, 2)]
    with pytest.raises(RankFailure, match="there is no RNG record"):
        ranks.run(stay, 1, here, 1)
    ranks.run(stay, 1, here.but(policy={"preset": "flexible"}), 1, 1)
    back = ranks.run(stay, 2, here, 2)
    assert [found.resumed_at for found in back] == [1, 1]
    assert [{**found.records[-1], "grad_norm": 0} for found in back] == [{**r, "grad_norm": 0} for r in records]


def reconfigured(
    rank: int, world_size: int, options: dict[str, Any], config: dict[str, Any], faults: list[str]
) -> list[str]:
    """Resume at step 4 with a configuration of the run's own; the report's warnings about the gate."""
    from resume_kit import Policy, ResumeKit
    from tests.faults import Faults

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    policy = Policy.from_mapping(job.policy)
    kit = ResumeKit(engine, loader, policy, run_dir=job.run_dir, config=config, show=lambda _: None)
    Faults(faults, rank).before_resume(engine, kit)
    assert kit.resume() == 4
    assert kit.report is not None
    return [str(check.figure) for check in kit.report.checks if check.verdict == "warn" and check.stage == "gate"]


def test_a_gate_stays_strict_where_only_the_runs_own_configuration_differs(ranks: Ranks, copy: Job) -> None:
    lenient = copy.but(policy={"configuration": "warn"})
    config = {"seed": copy.seed, "note": "another cluster"}
    with pytest.raises(RankFailure) as failure:
        ranks.run(reconfigured, 2, lenient.to_json(), config, ["other-forward"])
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.ResumeRefused"
        assert "the state is as saved, so the computation differs" in outcome.error
    moved = lenient.but(model={"layer_norm_epsilon": 0.1})
    for warnings in ranks.run(reconfigured, 2, moved.to_json(), config, []):
        assert warnings and any("at the save" in text for text in warnings)


def test_a_reset_that_leaves_state_behind_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), steps=2, save_every=2)
    ranks.run(train, 2, job.to_json())
    reset = job.but(steps=3, policy={"optimizer_state": "reset"})
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, reset.to_json(), ["kept-moments"])
    text = failure.value.outcomes[0].error
    assert "rank 1, exp_avg/" in text and "live after its reset" in text
    assert "[optimizer scalars] rank 1, " in text
    assert ranks.run(train, 2, reset.to_json())[0]["resumed_at"] == 2
