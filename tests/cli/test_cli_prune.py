from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from resume_kit.recovery.attempts import Token
from tests.checkpoints import Recipe, commit, stage
from tests.cli.conftest import Cli

LOOK_ALIKES = (
    "step-1",
    "step-000000010.bak",
    "xstep-000000010",
    "step-0000000010",
    "STEP-000000010",
    "notes",
)


def entries(run: Path) -> set[str]:
    return {entry.name for entry in run.iterdir()}


def steps(*numbers: int) -> set[str]:
    return {f"step-{number:09d}" for number in numbers}


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for step in range(10, 70, 10):
        commit(run, step)
    return run


def test_keeps_the_newest(cli: Cli, long_run: Path) -> None:
    result = cli("prune", long_run, "--keep-last", 2)
    assert result.code == 0
    assert entries(long_run) == steps(50, 60)
    assert "deleted step-000000010" in result.out
    assert "deleted 4 of 6 checkpoints" in result.out
    assert cli("prune", long_run, "--keep-last", 2).out == "nothing to delete; kept: 50, 60\n"


def test_keeps_every(cli: Cli, long_run: Path) -> None:
    result = cli("prune", long_run, "--keep-last", 2, "--keep-every", 20, "--json")
    assert (result.json["deleted"], result.json["kept"]) == ([10, 30], [20, 40, 50, 60])
    assert entries(long_run) == steps(20, 40, 50, 60)


def test_a_dry_run_deletes_nothing(cli: Cli, long_run: Path) -> None:
    result = cli("prune", long_run, "--keep-last", 3, "--dry-run", "--json")
    assert result.json["deleted"] == [10, 20, 30]
    assert result.json["dry_run"] is True
    assert result.json["bytes"] > 0
    assert "would delete step-000000010" in cli("prune", long_run, "--keep-last", 3, "--dry-run").out
    assert entries(long_run) == steps(*range(10, 70, 10))


def test_never_deletes_the_last_good_one(cli: Cli, long_run: Path) -> None:
    for step in (30, 40, 50, 60):
        (long_run / f"step-{step:09d}" / "rank-00000.safetensors").unlink()
    result = cli("prune", long_run, "--keep-last", 2, "--json")
    assert result.json["deleted"] == [10, 30, 40]
    assert entries(long_run) == steps(20, 50, 60)
    assert cli("verify", long_run / "step-000000020", "--deep").code == 0


def test_ignores_look_alikes_leftovers_and_what_lost_its_manifest(cli: Cli, long_run: Path) -> None:
    for name in LOOK_ALIKES:
        shutil.copytree(long_run / "step-000000010", long_run / name)
    (long_run / "step-000000005").write_text("a file")
    stage(long_run, Recipe(70))
    (long_run / "set-aside").mkdir()
    (long_run / "step-000000020").rename(long_run / "set-aside" / "step-000000020.attempt-1")
    (long_run / "step-000000030" / "manifest.json").unlink()
    others = entries(long_run) - steps(10, 40, 50, 60)
    assert cli("prune", long_run, "--keep-last", 2).code == 0
    assert entries(long_run) == others | steps(50, 60)
    assert (long_run / "set-aside" / "step-000000020.attempt-1" / "manifest.json").is_file()


def test_refuses_while_the_run_is_trained(cli: Cli, long_run: Path) -> None:
    token = Token.take(long_run, world_size=1, run_id=None, take_over=False)
    over = threading.Event()
    thread = threading.Thread(target=lambda: [token.beat() for _ in iter(lambda: over.wait(0.05), True)])
    thread.start()
    try:
        refused = cli("prune", long_run, "--keep-last", 2)
        assert refused.code == 1 and "attempt 1 is training (process" in refused.err and "--force" in refused.err
        assert entries(long_run) >= steps(10, 20, 30, 40, 50, 60)
        assert cli("prune", long_run, "--keep-last", 2, "--dry-run", "--json").json["deleted"] == [10, 20, 30, 40]
        assert cli("prune", long_run, "--keep-last", 4, "--force", "--json").json["deleted"] == [10, 20]
    finally:
        over.set()
        thread.join()
    token.ended("finished", step=60)
    assert cli("prune", long_run, "--keep-last", 2, "--json").json["deleted"] == [30, 40]
    assert entries(long_run) == steps(50, 60) | {"attempts"}


def test_an_attempt_that_starts_ends_a_prune_that_is_under_way(
    cli: Cli, long_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def act(old: Path, new: Path) -> None:
        if Path(old).name == "step-000000020":
            monkeypatch.setattr(os, "rename", rename)
            Token.take(long_run, world_size=1, run_id=None, take_over=False)
        rename(old, new)

    monkeypatch.setattr(os, "rename", act)
    result = cli("prune", long_run, "--keep-last", 2)
    assert result.code == 1 and "an attempt of the run has begun meanwhile" in result.err
    assert "deleted before that: 10" in result.err
    assert entries(long_run) == steps(20, 30, 40, 50, 60) | {"attempts"}


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_an_attempt_that_begins_just_before_the_prune_does_is_seen(
    cli: Cli, long_run: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """It found no ground of a prune to take away, and may be reading an older checkpoint."""
    mkdir = Path.mkdir

    def make(path: Path, **arguments: Any) -> None:
        if path.name == "pruning":
            monkeypatch.setattr(Path, "mkdir", mkdir)
            Token.take(long_run, world_size=1, run_id=None, take_over=False)
        mkdir(path, **arguments)

    monkeypatch.setattr(Path, "mkdir", make)
    result = cli("prune", long_run, "--keep-last", 2, *options)
    assert result.code == 1 and "nothing was deleted" in result.err and "attempt 1 has begun meanwhile" in result.err
    assert entries(long_run) == steps(10, 20, 30, 40, 50, 60) | {"attempts"}


def test_a_failing_deletion_says_what_is_gone(cli: Cli, long_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if "000000030" in Path(path).name:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, **options)

    monkeypatch.setattr("resume_kit.checkpoint.files.shutil.rmtree", rmtree)
    result = cli("prune", long_run, "--keep-last", 2)
    assert result.code == 1
    assert "Permission denied; deleted before that: 10, 20" in result.err
    assert entries(long_run) >= steps(40, 50, 60)


@pytest.mark.parametrize(
    "arguments",
    [(), ("--keep-last", 1), ("--keep-last", 0), ("--keep-last", "x"), ("--keep-last", 2, "--keep-every", 0)],
)
def test_wrong_numbers(cli: Cli, long_run: Path, arguments: tuple) -> None:
    result = cli("prune", long_run, *arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert entries(long_run) == steps(*range(10, 70, 10))


def test_a_checkpoint_is_not_a_run(cli: Cli, checkpoint: Path) -> None:
    result = cli("prune", checkpoint, "--keep-last", 2)
    assert result.code == 2
    assert "is a checkpoint, not a run directory" in result.err


def test_a_run_without_checkpoints(cli: Cli, tmp_path: Path) -> None:
    assert cli("prune", tmp_path, "--keep-last", 2).out == "nothing to delete; kept: none\n"
