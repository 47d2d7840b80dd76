from __future__ import annotations

import shutil
from pathlib import Path

from tests.checkpoints import Recipe, commit, flip, stage
from tests.cli.conftest import Cli


def states(document: dict) -> dict[str, str]:
    return {row["name"]: row["state"] for row in document["checkpoints"]}


def test_all_good_newest_last(cli: Cli, run: Path) -> None:
    result = cli("ls", run)
    assert result.code == 0
    assert result.err == ""
    rows = [line.split() for line in result.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["10", "20", "30"]
    assert all("good" in row and "zero_stage" in row for row in rows)
    document = cli("ls", run, "--json").json
    assert document["newest_good"] == 30
    newest = document["checkpoints"][-1]
    assert newest["name"] == "step-000000030"
    assert (newest["ranks"], newest["attempt"], newest["created"]) == (2, 1, 1_700_000_000.0)
    assert newest["engine"] == {"engine": "deepspeed", "zero_stage": 3, "world_size": 2}
    assert newest["size"] == sum(f.stat().st_size for f in (run / "step-000000030").iterdir())


def test_every_state_has_its_word(cli: Cli, run: Path) -> None:
    (run / "step-000000020" / "rank-00001.safetensors").unlink()
    (run / "step-000000030" / "manifest.json").unlink()
    torn = stage(run, Recipe(40))
    (torn / "manifest.json").unlink()
    shutil.copytree(run / "step-000000010", run / ".replaced-step-000000010-attempt-2")
    shutil.copytree(run / "step-000000010", run / ".removed-step-000000010")
    (run / "set-aside").mkdir()
    shutil.copytree(run / "step-000000010", run / "set-aside" / "step-000000010.attempt-3")
    (run / "set-aside" / "notes").mkdir()
    (run / "step-000000010.bak").mkdir()
    result = cli("ls", run, "--json")
    assert result.code == 0
    assert states(result.json) == {
        "set-aside/step-000000010.attempt-3": "good",
        ".removed-step-000000010": "half-deleted",
        ".replaced-step-000000010-attempt-2": "replaced",
        "step-000000010": "good",
        "step-000000020": "damaged",
        "step-000000030": "no manifest",
        "attempts/000001/ground/step-000000040": "torn",
    }
    text = cli("ls", run).out
    assert text.splitlines()[0].split()[-2:] == ["state", "name"]
    assert text.count("set-aside/step-000000010.attempt-3") == 1
    assert "damaged: rank-00001.safetensors: the file is missing" in text
    assert "torn: a save died before its commit" in text


def test_none_good_is_exit_1(cli: Cli, checkpoint: Path) -> None:
    flip(checkpoint / "manifest.json", 100, 3)
    result = cli("ls", checkpoint.parent)
    assert result.code == 1
    assert "none of the checkpoints is good" in result.out
    assert cli("ls", checkpoint.parent, "--json").json["newest_good"] is None


def test_a_set_aside_one_does_not_make_a_run_good(cli: Cli, run: Path) -> None:
    (run / "set-aside").mkdir()
    (run / "step-000000030").rename(run / "set-aside" / "step-000000030.attempt-2")
    assert cli("ls", run).code == 0
    for step in (10, 20):
        (run / f"step-{step:09d}" / "manifest.json").unlink()
    assert cli("ls", run).code == 1


def test_empty_and_torn_only_runs_are_readable(cli: Cli, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (cli("ls", empty).code, cli("ls", empty).out) == (0, f"no checkpoints in {empty}\n")
    assert cli("ls", empty, "--json").json["checkpoints"] == []
    stage(tmp_path / "torn", Recipe(10))
    result = cli("ls", tmp_path / "torn", "--json")
    assert (result.code, list(states(result.json).values())) == (0, ["torn"])


def test_a_strange_checkpoint_of_a_newer_version_is_shown(cli: Cli, tmp_path: Path) -> None:
    commit(tmp_path, 10)
    manifest = tmp_path / "step-000000010" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema":2', b'"schema":7'))
    assert "schema version 7" in str(cli("ls", tmp_path, "--json").json["checkpoints"][0]["problems"])
