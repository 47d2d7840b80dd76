from __future__ import annotations

from pathlib import Path

import pytest

from resume_kit.recovery.intervals import best_interval, expected_loss
from tests.cli.conftest import Cli
from tests.recovery.runs import attempt


def test_from_what_a_run_has_shown(cli: Cli, tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(14).ended("failed", "x")
    attempt(tmp_path, 2, at=100).resume(10).train(35).ended("finished")
    document = cli("interval", tmp_path, "--json").json
    assert document["ranks"] == 4
    assert document["cost"] == {"seconds": pytest.approx(0.4), "source": "measured: the run's median"}
    assert document["durable"]["seconds"] == 1.0
    assert document["restart"]["seconds"] == 100 + 2 - 28
    rows = {row["name"]: row for row in document["intervals"]}
    mtbf = document["mtbf"]["seconds"]
    assert rows["best"]["seconds"] == pytest.approx(best_interval(0.4, mtbf))
    assert rows["in use"]["seconds"] == 20 and rows["in use"]["steps"] == 10
    assert rows["best"]["lost"] == pytest.approx(expected_loss(rows["best"]["seconds"], 0.4, mtbf, 75))
    assert rows["best"]["lost"] < min(rows["half"]["lost"], rows["double"]["lost"], rows["in use"]["lost"])
    text = cli("interval", tmp_path).out
    assert "1 in 50,677 GPU-hours; the run's own record: 1 in " in text
    assert [line.split()[2] for line in text.splitlines() if "%" in line] == [
        "in", "half", "best", "double", "four", "eight",
    ]  # fmt: skip


def test_from_figures(cli: Cli) -> None:
    document = cli("interval", "--cost", 2, "--mtbf", 3, "--ranks", 1000, "--restart", 60, "--json").json
    best = next(row for row in document["intervals"] if row["name"] == "best")
    assert best["seconds"] == pytest.approx(best_interval(2, 3 * 3600))
    assert best["gpu_hours"] == pytest.approx(best["lost"] * 24 * 1000)
    assert document["mtbf"] == {"seconds": 10_800, "source": "given"}
    assert "prior" in cli("interval", "--cost", 2, "--ranks", 1000).out


def test_no_save_follows_another_before_it_is_durable(cli: Cli) -> None:
    document = cli("interval", "--cost", 0, "--durable", 40, "--mtbf", 3, "--json").json
    assert next(row for row in document["intervals"] if row["name"] == "best")["seconds"] == 40


def test_a_run_without_a_commit(cli: Cli, tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(5)
    result = cli("interval", tmp_path)
    assert result.code == 1 and "give --cost" in result.err
    assert cli("interval", tmp_path, "--cost", 1).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--cost", 1),
        ("--ranks", 8),
        ("--cost", "-1", "--ranks", 8),
        ("--cost", 1, "--ranks", 0),
        ("--cost", "nan", "--mtbf", 1),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple) -> None:
    result = cli("interval", *arguments)
    assert (result.code, result.out) == (2, "")
