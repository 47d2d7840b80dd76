"""A run that is told to stop saves on all ranks at one step, says so, and goes on bit-exactly when started again."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from resume_kit.run.journal import read_journal
from tests import jobs
from tests.conftest import Ranks
from tests.run.stopped import train

STEPS = 12


def job(tmp_path: Path, **changes: Any) -> jobs.Job:
    data = jobs.text_file(tmp_path)
    return jobs.Job(run_dir=str(tmp_path / "run"), data=data, steps=STEPS, save_every=5, dropout=0.1).but(**changes)


def events(run: jobs.Job, name: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(Path(run.run_dir)) if event["event"] == name]


def ended(run: jobs.Job, attempt: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run.run_dir) / f"attempts/{attempt:06d}/ended.json").read_bytes())
    return found


@pytest.mark.parametrize(
    ("accumulation", "at", "by", "step"),
    [
        (1, [3, 0, 1, "SIGTERM"], "SIGTERM on rank 1", 4),
        (3, [3, 1, 0, "SIGUSR1"], "SIGUSR1 on rank 0", 4),
        (1, [5, 0, 0, "new data"], "request: anna: new data", 6),  # the save of step 5 is under way
    ],
)
def test_all_ranks_save_at_one_step_and_go_on_bit_exactly(
    accumulation: int, at: list[Any], by: str, step: int, ranks: Ranks, tmp_path: Path
) -> None:
    reference = job(tmp_path, accumulation=accumulation, run_dir=str(tmp_path / "reference"))
    whole = ranks.run(train, 2, reference.to_json(), timeout=60)
    run = job(tmp_path, accumulation=accumulation)
    stopped = ranks.run(train, 2, run.to_json(), {"at": at}, timeout=60)
    assert [(rank["code"], rank["stopped_at"], rank["by"]) for rank in stopped] == [(75, step, by)] * 2
    assert events(run, "commit")[-1]["step"] == step and not events(run, "end")
    (preempt,) = events(run, "preempt")
    assert preempt["step"] == step and preempt["by"] == by and 0 < preempt["seconds"] < 10
    assert {key: ended(run)[key] for key in ("reason", "step", "by")} == {"reason": "preempted", "step": step, "by": by}
    assert not list(Path(run.run_dir).glob("attempts/*/rank-*"))

    resumed = ranks.run(train, 2, run.to_json(), timeout=60)
    for first, second, unbroken in zip(stopped, resumed, whole, strict=True):
        assert second["resumed_at"] == step
        assert first["records"] + second["records"] == [r for r in unbroken["records"] if r["step"] != step]
        assert second["state"] == unbroken["state"]
    assert ended(run, 2)["reason"] == "finished"


def test_a_stop_that_comes_before_the_first_step_is_heard_at_the_end_of_the_resume(
    ranks: Ranks, tmp_path: Path
) -> None:
    run = job(tmp_path)
    stopped = ranks.run(train, 2, run.to_json(), {"early": [1, "SIGTERM"]}, timeout=60)
    assert [(rank["code"], rank["stopped_at"], rank["records"]) for rank in stopped] == [(75, 0, [])] * 2
    assert not events(run, "save") and not events(run, "step")
    assert ended(run)["reason"] == "preempted" and ended(run)["step"] == 0


def test_the_deadline_stops_in_time(ranks: Ranks, tmp_path: Path) -> None:
    from resume_kit.run.stopping import Deadline

    run = job(tmp_path, steps=100_000, save_every=3)
    deadline = time.time() + Deadline.UNMEASURED + 1  # until the first save is measured it is said to take a minute
    stopped = ranks.run(train, 2, run.to_json(), {"deadline": deadline}, timeout=60)
    assert time.time() < deadline
    assert [rank["code"] for rank in stopped] == [75, 75]
    assert ended(run)["by"] == "deadline"
    assert events(run, "commit")[-1]["step"] == stopped[0]["stopped_at"] == stopped[1]["stopped_at"]


def test_under_torchrun_the_exit_code_is_0(ranks: Ranks, tmp_path: Path) -> None:
    run, do = job(tmp_path), {"at": [2, 0, 0, "SIGUSR2"]}
    stopped = ranks.run(train, 2, run.to_json(), do, timeout=60, env={"TORCHELASTIC_RUN_ID": "none"})
    assert [rank["code"] for rank in stopped] == [0, 0]


def test_a_save_that_fails_is_raised_as_ever(ranks: Ranks, tmp_path: Path) -> None:
    from tests.ranks import RankFailure

    run = job(tmp_path, save_every=0)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_on_a_full_disk, 2, run.to_json(), timeout=60)
    assert set(failure.value.error_types.values()) == {"resume_kit.errors.SaveFailed"}
    assert not events(run, "preempt")


def train_on_a_full_disk(rank: int, world_size: int, options: dict[str, Any]) -> None:
    from resume_kit.checkpoint import files
    from resume_kit.errors import SaveFailed

    def full(*_: Any) -> None:
        raise SaveFailed("no space left")

    files.require_space = full
    train(rank, world_size, options, {"at": [2, 0, 0, "SIGTERM"]})


def test_a_second_signal_kills_at_once_and_the_last_commit_stands(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, steps=100_000, save_every=4)
    group = ranks.start(train_slow_to_save, 2, run.to_json())
    group.wait_for("step 6", timeout=60)
    group.kill(signum=signal.SIGTERM)
    group.wait_for("saving slowly", timeout=30)
    time.sleep(3.2)
    began = time.monotonic()
    group.kill(signum=signal.SIGTERM)
    assert group.wait(timeout=10) == [128 + signal.SIGTERM] * 2
    assert time.monotonic() - began < 5
    resumed = ranks.run(train, 2, run.but(steps=8).to_json(), timeout=60)
    assert [rank["resumed_at"] for rank in resumed] == [4, 4]


def train_slow_to_save(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """The save of the stop never ends."""
    from resume_kit.saving import save

    finish = save.ImageFile.finish

    def slow(image: Any) -> Any:
        if image._path.suffix == ".safetensors" and "000004" not in str(image._path):
            print("saving slowly", flush=True)
            time.sleep(60)
        return finish(image)

    save.ImageFile.finish = slow  # type: ignore[method-assign]
    train(rank, world_size, options)


# -- when to save, and who may


def test_by_time_saves_at_the_same_steps_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, steps=60)
    ranks.run(train, 2, run.to_json(), {"save_every": "0.3s"}, timeout=60)
    commits = [event["step"] for event in events(run, "commit")]
    assert 2 <= len(commits) < 30 and commits == sorted(set(commits))


def test_auto_saves_early_and_says_what_it_chose(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, steps=30)
    group = ranks.start(train, 2, run.to_json(), {"save_every": "auto", "mtbf_hours": 100.0})
    group.results(60)
    assert [event["step"] for event in events(run, "commit")] == [10]
    assert "saves every " in group.log(0) and "saves every " not in group.log(1)
    assert "a failure is expected every 100.0 h" in group.log(0)


def train_counting(rank: int, world_size: int, options: dict[str, Any]) -> list[tuple[bool, int]]:
    """Of each reading of the journal from its begin to its end: whether steps came with figures, and after which."""
    from resume_kit.recovery.events import JournalLines

    readings, read = [], JournalLines.__iter__

    def counted(lines: JournalLines) -> Any:
        yield from read(lines)
        if lines.only is None:
            readings.append((lines.figures, lines.steps_after))

    JournalLines.__iter__ = counted  # type: ignore[method-assign]
    train(rank, world_size, options, {"save_every": "auto"})
    return readings


def test_a_start_reads_all_steps_once_and_no_figures_but_of_those_to_compare(ranks: Ranks, tmp_path: Path) -> None:
    """However long the journal is: whether there is hope, and the failures to expect, are judged in one reading."""
    run = job(tmp_path)
    ranks.run(train, 2, run.to_json(), timeout=60)
    group = ranks.start(train_counting, 2, run.but(steps=STEPS + 12).to_json())
    assert group.results(60) == [[(False, -1), (True, 10)], []]
    assert "a failure is expected every 25,338." in group.log(0), "the prior, for two ranks that never failed"


def test_an_attempt_that_is_superseded_ends_on_all_ranks_at_the_next_boundary(ranks: Ranks, tmp_path: Path) -> None:
    from tests.ranks import RankFailure

    run = job(tmp_path, save_every=0)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, run.to_json(), {"at": [3, 0, 0, "supersede"]}, timeout=60)
    assert set(failure.value.error_types.values()) == {"resume_kit.errors.Fenced"}
    assert len({outcome.error for outcome in failure.value.outcomes}) == 1
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3]
