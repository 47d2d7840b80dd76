"""What the training entries make of an error: an exit code, a readable block, last words."""

from __future__ import annotations

import pytest

from launch import entry
from resume_kit.errors import CheckpointDamaged, Fenced, GivenUp, ResumeKitError, ResumeRefused, RunTaken, UsageError
from resume_kit.run import last_words
from resume_kit.run.stopping import Preempted


def ends(error: BaseException | None) -> int:
    def train(_config: object) -> None:
        if error is not None:
            raise error

    return entry.run(lambda: None, lambda _config: None, train)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ResumeRefused("no"), 1),
        (CheckpointDamaged("torn"), 1),
        (UsageError("what?"), 2),
        (Fenced("attempt 3 took over"), 76),
        (RunTaken("attempt 2 is alive"), 76),
        (GivenUp("three times at step 5"), 78),
    ],
)
def test_every_error_has_its_exit_code(
    error: ResumeKitError | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: list[BaseException | str] = []
    monkeypatch.setattr(last_words, "record", recorded.append)
    assert ends(error) == code
    assert recorded == ([] if error is None else [error])
    assert ("ERROR: " in capsys.readouterr().err) == (error is not None)


def test_a_run_that_is_to_stop_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as stop:
        ends(Preempted(7, "SIGTERM"))
    assert stop.value.code == 75
