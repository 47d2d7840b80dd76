from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.recovery.runs import Written, attempt, beating


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resume_kit.cli.stopping.LOOK_SECONDS", 0.3)


def test_the_request_lies_in_the_newest_attempt(cli: Cli, tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(3).ended("failed", "x")
    running = attempt(tmp_path, 2, at=100)
    with beating(running):
        result = cli("stop", tmp_path, "--reason", "the node is repaired")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("attempt 2 was asked to save and end")
    assert running.folder is not None
    request = json.loads((running.folder / "stop").read_text())
    assert request["reason"] == "the node is repaired" and "process" in request["by"] and request["time"] > 0
    assert [entry.name for entry in running.folder.iterdir() if entry.name.startswith(".")] == []
    assert not (tmp_path / "attempts" / "000001" / "stop").exists()


def end_once_asked(running: Written) -> None:
    assert running.folder is not None
    while not (running.folder / "stop").exists():
        pass
    running.ended("preempted", "a request to stop")


def test_waiting_until_it_has_ended(cli: Cli, tmp_path: Path) -> None:
    running = attempt(tmp_path, 1).train(7)
    thread = threading.Thread(target=end_once_asked, args=(running,))
    thread.start()
    with beating(running):
        result = cli("stop", tmp_path, "--wait", 30, "--json")
    thread.join()
    assert result.code == 0
    assert (result.json["ended"]["reason"], result.json["ended"]["step"]) == ("preempted", 7)


def test_it_does_not_end_in_time(cli: Cli, tmp_path: Path) -> None:
    with beating(attempt(tmp_path, 1)):
        result = cli("stop", tmp_path, "--wait", 0.3)
    assert result.code == 1 and "has not ended within 0.3 s" in result.out


def test_nothing_runs(cli: Cli, tmp_path: Path) -> None:
    result = cli("stop", tmp_path)
    assert result.code == 1 and "nothing to stop" in result.err and "no attempts" in result.err
    silent = attempt(tmp_path, 1)
    assert "shows no sign of life" in cli("stop", tmp_path).err
    silent.ended("finished")
    assert "attempt 1 has ended (finished)" in cli("stop", tmp_path).err
    assert silent.folder is not None and not (silent.folder / "stop").exists()


def test_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    assert cli("stop", tmp_path, "--wait", "-1").code == 2
    assert cli("stop", tmp_path / "nowhere").code == 2
