from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.recovery.runs import START, attempt, beating


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


def test_a_job_without_an_attempt_of_its_own(cli: Cli, tmp_path: Path) -> None:
    assert cli("next", tmp_path).out == "stop\n"
    attempt(tmp_path, 1).train(12).ended("preempted", "SIGTERM")
    assert cli("next", tmp_path, "--since", START - 5).out == "restart\n"
    result = cli("next", tmp_path, "--since", START + 60)
    assert result.out == "stop\n" and "older than this job" in result.err


def test_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    assert cli("next", tmp_path / "nowhere").code == 2
    assert cli("next", tmp_path, "--give-up-after", 0).code == 2
