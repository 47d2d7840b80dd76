"""An attempt's journal: a line that could not be written is told to all ranks by the next event that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import SaveFailed
from resume_kit.run.attempt import Attempt
from resume_kit.run.journal import Journal, read_journal
from tests.conftest import Ranks


def test_a_kept_failure_is_raised_by_the_next_event_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, Coordinator.of_default_group(timeout=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", lambda *_, **__: fail())
        attempt.record_soon("step", {"step": 1})
    with pytest.raises(SaveFailed, match="no space left"):
        attempt.record("end", {})
    attempt.record("end", {})
    assert attempt.take_failure() is None
    assert [event["event"] for event in read_journal(tmp_path)] == ["end"]


def fail() -> None:
    raise SaveFailed("no space left")


def last_line_lost(rank: int, world_size: int, run: str) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    attempt = Attempt(Path(run), Coordinator.of_default_group(timeout=20.0))
    write: Any = Journal.write
    Journal.write = lambda *_, **__: fail()
    attempt.record_soon("step", {"step": 1})
    Journal.write = write
    with pytest.raises(SaveFailed) as failure:
        attempt.record("end", {})
    return failure.value.headline


def test_all_ranks_hear_of_it(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(last_line_lost, 2, str(tmp_path)) == ["no space left"] * 2
