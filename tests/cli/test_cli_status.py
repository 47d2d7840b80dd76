from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.recovery import runs
from tests.recovery.runs import BATCH, attempt, beating


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """Killed at 14, preempted at 33, and died at 47 for good."""
    run = tmp_path / "run"
    attempt(run, 1).train(14).words(2, "RuntimeError: CUDA error", host="n2").ended("failed", "x")
    attempt(run, 2, at=100).resume(10).train(33).commit(33).ended("preempted", "SIGTERM")
    third = attempt(run, 3, at=300, host="n3", process_started=runs.START + 280)
    third.time += 10
    third.resume(33, report={"seconds": {"load": 4.0}}).train(47).words(0, "ValueError: bad").ended("failed", "x")
    return run


def test_one_screen(cli: Cli, story: Path) -> None:
    result = cli("status", story)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines[lines.index("attempts") :])) <= 100
    text = result.out
    assert f"abc in {story}" in text
    assert "down since" in text and "goes on from the checkpoint of step 40" in text
    assert "47, " in text and "2 s a step" in text
    assert "step 40, " in text and "1.0 kB, durable after 1 s" in text
    assert "every 10 steps, 20 s" in text
    assert f"11 steps, {11 * BATCH} samples; 2 failures" in text
    assert "gap " in text and "load 4 s" in text
    rows = [line.split() for line in lines[lines.index("attempts") + 4 :]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][3:] == ["n1", "41", "4", "0", "→", "14", "failed:", "rank", "2", "on", "n2:", "R…", "32", "–"]
    assert rows[1][-5:] == ["by", "SIGTERM", "0", "74", "s"]


def test_json_has_everything(cli: Cli, story: Path) -> None:
    document = cli("status", story, "--json").json
    assert document["next"]["word"] == "restart"
    assert [past["kind"] for past in document["attempts"]] == ["failed", "preempted", "failed"]
    assert [past["lost_steps"] for past in document["attempts"]] == [4, 0, 7]
    assert document["attempts"][0]["last_step"] == {"step": 14, "time": runs.START + 28}
    assert document["attempts"][2]["phases"] == {"gap": 134, "start": 20, "load": 4.0, "first step": 2}
    assert document["account"]["goodput"] == pytest.approx(2 * 40 / (300 + 10 + 28))
    assert document["newest_checkpoint"] == 40 and document["watch_outs"] == []


def test_a_run_that_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "START", time.time() - 40)
    with beating(attempt(tmp_path / "run", 1).train(18)):
        text = cli("status", tmp_path / "run").out
    assert "running since" in text
    assert f"8 steps, {8 * BATCH} samples, 16 s of training would a crash now cost" in text
    assert "watch out" not in text


def test_what_one_should_look_at(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(runs, "START", time.time() - 7200)
    old = attempt(run, 1).train(28)
    new = attempt(run, 2, at=100).resume(20).train(40)
    old.train(30)
    new.note("skip", step=50, pending=40)
    new.train(49)
    (run / "step-000000040").rename(run / "elsewhere")
    new._put("stop", {"reason": "node n1 is repaired", "time": 1.0, "by": "n9, process 7"})
    with beating(new):
        outs = cli("status", run, "--json").json["watch_outs"]
    assert len(outs) == 6
    assert outs[0].startswith("no step for 117 min, and one takes 2 s")
    assert outs[1].startswith("no commit for 118 min, and there was one every 20 s")
    assert outs[2] == "it was asked to stop: node n1 is repaired, by n9, process 7"
    assert outs[3] == "the journal's newest commit is of step 40, the newest checkpoint on disk that of step 30"
    assert outs[4].endswith("still being written: 1")
    assert outs[5].endswith("do not count: 3")


def test_of_many_attempts_the_newest_are_shown(cli: Cli, tmp_path: Path) -> None:
    for number in range(1, 31):
        attempt(tmp_path, number, at=number * 100).train(2).ended("preempted", "SIGTERM")
    result = cli("status", tmp_path)
    assert len(result.out.splitlines()) <= 40
    assert "and 18 before" in result.out
    assert len(cli("status", tmp_path, "--json").json["attempts"]) == 30


def test_nothing_has_run(cli: Cli, tmp_path: Path) -> None:
    result = cli("status", tmp_path)
    assert (result.code, result.out) == (1, "")
    assert "nothing has run there" in result.err
    assert cli("status", tmp_path / "nowhere").code == 2


def test_an_old_run_without_folders(cli: Cli, tmp_path: Path) -> None:
    attempt(tmp_path, 1, folder=False).train(12)
    attempt(tmp_path, 2, at=100, folder=False).resume(10).train(20).note("end", step=20)
    result = cli("status", tmp_path)
    assert result.code == 0
    assert "finished since" in result.out and "died without a word" in result.out


def test_a_picture(cli: Cli, story: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "run.png"
    assert cli("status", story, "--picture", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = cli("status", story, "--picture", tmp_path / "nowhere" / "run.png")
    assert result.code == 2 and "the picture cannot be written" in result.err


def test_a_picture_without_matplotlib(cli: Cli, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("status", story, "--picture", tmp_path / "run.png")
    assert result.code == 2
    assert "pip install 'sharded-resume-kit[plots]'" in result.err


STRANGE = (None, True, -1, 10**30, 1e300, "text", [], {}, [1], {"a": 1})


@pytest.mark.parametrize("command", ["status", "next", "interval"])
@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_strange_values_on_disk_are_no_traceback(cli: Cli, tmp_path: Path, command: str, strange: object) -> None:
    written = attempt(tmp_path, 1).train(12).words(1, "x")
    kinds = {
        "start": ("run_id", "host", "world_size", "global_batch_size", "topology", "process_started"),
        "step": ("step", "time"),
        "commit": ("step", "bytes", "seconds", "time"),
        "resume": ("step", "report", "seconds"),
        "refuse": ("reason",),
        "preempt": ("by", "step"),
    }
    whole = {"step": 13, "seconds": {"gate": strange, "durable": strange}, "report": {"seconds": {"load": strange}}}
    for event, fields in kinds.items():
        for name in fields:
            written.note(event, **{**whole, name: strange})
    assert written.folder is not None
    for name, fields in {
        "attempt.json": ("run_id", "started", "world_size", "took_over", "identity"),
        "ended.json": ("reason", "step", "time", "by"),
        "rank-00001.json": ("rank", "step", "kind", "error", "time", "host"),
        "alive": ("beat", "time"),
        "stop": ("reason", "time", "by"),
    }.items():
        written._put(name, dict.fromkeys(fields, strange))
    assert cli(command, tmp_path).code in (0, 1)
    assert cli(command, tmp_path, "--json").code in (0, 1)
