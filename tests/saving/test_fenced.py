"""A newer attempt comes while a save is under way: every rank raises `Fenced`, and nothing is committed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.integrity.verify import deep_problems
from resume_kit.recovery.attempts import Token, read_attempts
from resume_kit.run.journal import read_journal
from tests.checkpoints import left_in, settle
from tests.conftest import Ranks
from tests.jobs import Job, text_file
from tests.saving.loop import Loop, told


def taken_over_in_a_save(rank: int, world_size: int, options: dict[str, Any], where: str) -> list[str]:
    """Commits step 1; the save of step 2 meets a newer attempt. What each try to go on says."""
    from resume_kit.checkpoint import files
    from resume_kit.checkpoint.writing import ImageFile

    loop = Loop(rank, world_size, options, [])
    loop.steps(1)
    loop.kit.save()
    loop.steps(1)
    run = loop.kit.run_dir
    successor = run / "attempts" / "000002" / "fence-is-up"

    def take_over() -> None:
        ImageFile.finish, files.publish = finish, publish
        Token.take(run, world_size=1, run_id=None, take_over=True)
        successor.touch()

    finish, publish = ImageFile.finish, files.publish

    def finish_later(image: ImageFile) -> Any:
        if rank == 1:
            take_over()
        while not successor.exists():
            time.sleep(0.01)
        return finish(image)

    def publish_too_late(*arguments: Any) -> None:
        take_over()
        publish(*arguments)

    if where == "while all write":
        ImageFile.finish = finish_later
    else:
        files.publish = publish_too_late
    return [told(loop.kit.save), told(loop.kit.save), told(loop.kit.close)]


@pytest.mark.parametrize("where", ["while all write", "just before the commit"])
def test_all_ranks_are_fenced_and_nothing_is_committed(where: str, ranks: Ranks, tmp_path: Path) -> None:
    job = Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), stage=3, save_every=0)
    for said in ranks.run(taken_over_in_a_save, 2, job.to_json(), where):
        assert all(words.startswith("Fenced: attempt 1 no longer holds the run directory") for words in said)
        assert "attempt 2 took over (process" in said[0]
    run = Path(job.run_dir)
    assert names.committed_steps(run) == [1] and deep_problems(run / names.step_directory(1)) == []
    assert [event["step"] for event in read_journal(run) if event["event"] == "commit"] == [1]
    settle(run)
    assert left_in(run) == ["step-000000001"]
    assert [record.fenced_by for record in read_attempts(run)] == [2, 3, None]
