"""The matrix as a command: its rows, its documents, and its exit code when a trip fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import topologies
from benchmarks.topologies_report import line, markdown
from tests.resharding.trips import TRIPS


def test_a_trip_that_fails_is_told_and_makes_the_command_fail(
    fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = TRIPS["zero-stage-1-2"]
    other_model = replace(good.goal, job=good.goal.job.but(layers=1))
    table = {"good": replace(good, name="good"), "bad": replace(good, name="bad", goal=other_model)}
    monkeypatch.setattr(topologies, "TRIPS", table)
    assert topologies.main(["--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "exact  good" in printed and "FAILED bad" in printed
    assert "missing in the live model" in printed
    assert "1 of 2 trips exact" in printed
    result = json.loads((tmp_path / "out" / "topologies.json").read_text())
    assert result["failed"] == ["bad"]
    row = result["trips"][0]
    assert row["fingerprints equal"] and row["back bit-identical"] and row["problems"] == []
    assert row["forward"]["steps"] == 20 and row["forward"]["samples equal"] and row["forward"]["within tolerance"]
    wanted, read, _ = (sum(column) for column in zip(*row["read"]["by rank: wanted, read, verified"], strict=True))
    assert (wanted, read) == (row["read"]["wanted_bytes"], row["read"]["read_bytes"])
    assert row["jobs"][1]["stage"] == 2
    assert "| ZeRO-1 on 2 | ZeRO-2 on 2 | failed | failed | failed | |" in (tmp_path / "out/topologies.md").read_text()


def row(**changes: object) -> dict[str, object]:
    forward = {"max relative loss difference": 1.5e-4, "within tolerance": True, "samples equal": True}
    exact = {
        "name": "there",
        "engine": "Megatron",
        "from": "TP2",
        "to": "PP2",
        "note": "fp32",
        "tensors": 112,
        "fingerprints equal": True,
        "back bit-identical": True,
        "forward": forward,
        "read": {"wanted_bytes": 1000, "read_bytes": 1025},
        "seconds": 3.0,
        "problems": [],
    }
    return {**exact, **changes}


def test_what_is_not_exact_stands_out() -> None:
    expected = "exact there TP2, fp32 → PP2: 112 tensors, Δloss 1.5e-04, read 1.025, 3.0 s"
    assert " ".join(line(row()).split()) == expected
    rows = [
        row(),
        row(**{"fingerprints equal": False, "back bit-identical": False}),
        row(forward={"max relative loss difference": 0.1, "within tolerance": False, "samples equal": True}),
    ]
    result = {
        "date": "2026-11-24",
        "command": "python -m benchmarks.topologies",
        "hardware": {"host cores": 2},
        "versions": {"torch": "1", "deepspeed": "2", "megatron-core": "3"},
        "method": {"checkpoint of A": "after step 2"},
        "seconds": 300.0,
        "trips": rows,
    }
    table = [text for text in markdown(result).splitlines() if text.startswith("| TP2")]
    assert table == [
        "| TP2, fp32 | PP2 | 112 | yes | 1.5e-04 | 1.025 |",
        "| TP2, fp32 | PP2 | **no** | **no** | 1.5e-04 | 1.025 |",
        "| TP2, fp32 | PP2 | 112 | yes | **1.0e-01** | 1.025 |",
    ]
