from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.recovery.runs import attempt, beating


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("resume_kit.cli.next_word.PATIENCE", 0.1)


@pytest.mark.parametrize(
    ("reason", "word"), [("finished", "finished"), ("preempted", "restart"), ("failed", "restart"), ("refused", "stop")]
)
def test_one_word_on_stdout_and_the_reason_on_stderr(cli: Cli, tmp_path: Path, reason: str, word: str) -> None:
    attempt(tmp_path, 1).train(12).ended(reason, "this and that")
    result = cli("next", tmp_path)
    assert (result.code, result.out) == (0, f"{word}\n")
    assert result.err.startswith("resume-kit: attempt 1")
    result = cli("next", tmp_path, "--json")
    assert (result.json["word"], result.err) == (word, "")
    assert "attempt 1" in result.json["reason"]


def test_running(cli: Cli, tmp_path: Path) -> None:
    with beating(attempt(tmp_path, 1).train(12)):
        assert cli("next", tmp_path).out == "running\n"


def test_given_up(cli: Cli, tmp_path: Path) -> None:
    for number in (1, 2):
        attempt(tmp_path, number, at=100 * number).train(3).words(1, "bad", host="n7").ended("failed", "bad")
    assert cli("next", tmp_path).out == "restart\n"
    result = cli("next", tmp_path, "--give-up-after", 2)
    assert (result.code, result.out) == (0, "stop\n")
    assert "host n7 (2 of 2)" in result.err and f"resume-kit retry {tmp_path}" in result.err


def test_the_number_of_failures_is_the_runs_own(cli: Cli, tmp_path: Path) -> None:
    for number in (1, 2):
        attempt(tmp_path, number, at=100 * number, give_up_after=2).train(3).words(1, "bad").ended("failed", "bad")
    assert cli("next", tmp_path).out == "stop\n"
    assert cli("status", tmp_path, "--json").json["next"]["word"] == "stop"
    assert cli("next", tmp_path, "--give-up-after", 3).out == "restart\n"


def test_a_start_of_a_job_without_an_attempt_of_its_own(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("next", tmp_path).out == "stop\n"
    attempt(tmp_path, 1, job=("42", 0)).train(12).ended("finished")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert cli("next", tmp_path).out == "finished\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert cli("next", tmp_path).out == "restart\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    result = cli("next", tmp_path)
    assert result.out == "stop\n" and "3 starts of this job have ended without opening the run" in result.err


def test_a_run_directory_that_is_not_there_has_a_word_too(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cli("next", tmp_path / "nowhere")
    assert (result.code, result.out) == (0, "stop\n") and "no attempt has been made" in result.err
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert cli("next", tmp_path / "nowhere").out == "restart\n"


@pytest.mark.parametrize("times", [1, 10**6])
def test_a_file_system_that_hiccups_is_asked_again(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    attempt(tmp_path, 1).train(12).ended("finished")
    opened, left = Path.open, iter(range(times))

    def stale(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "journal.jsonl" and next(left, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", stale)
    result = cli("next", tmp_path)
    assert (result.code, result.out) == (0, "finished\n" if times == 1 else "stop\n")
    assert times == 1 or "the run cannot be read: the journal cannot be read" in result.err


def test_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    assert cli("next", tmp_path, "--give-up-after", 0).code == 2
    assert cli("next", tmp_path, "--since", 1).code == 2
    (tmp_path / "file").touch()
    assert cli("next", tmp_path / "file").code == cli("next", "").code == 2
