"""Results: written and read back whole, refused where they are something else, compared row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.suite.compare import comparison
from benchmarks.suite.results import SCHEMA, Row, Spread, read_results
from resume_kit.errors import UsageError
from tests.benchmarks.examples import results


def test_what_is_written_is_read(tmp_path: Path) -> None:
    results().write(tmp_path)
    assert read_results(tmp_path) == results()
    assert read_results(tmp_path / "results.json") == results()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "no results"),
        (json.dumps({"format": "resume_kit.benchmarks", "schema": SCHEMA + 1}), f"has schema {SCHEMA + 1}"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=reason):
        read_results(tmp_path)


def test_a_part_measured_again_replaces_itself_only() -> None:
    made = results()
    made.replace_part("zero3-on-3", {"ranks": 3}, [Row("zero3-on-3", "ext4", "reshard", "new")])
    assert [row.system for row in made.rows if row.part == "zero3-on-3"] == ["new"]
    assert len(made.rows) == len(results().rows)
    assert made.parts["zero3-on-3"] == {"ranks": 3}


def test_the_first_repeat_is_in_no_median() -> None:
    row = Row("p", "t", "ours", "s", nbytes=100)
    row.add({"durable": 50.0}, first=True)
    assert row.spread("durable") is None
    assert row.rate("durable") is None
    for seconds in (1.0, 4.0, 2.0):
        row.add({"durable": seconds})
    assert row.spread("durable") == Spread(2.0, 1.0, 4.0)
    assert row.rate("durable") == 50.0
    assert row.first == {"durable": 50.0}


def test_the_largest_figure_is_kept() -> None:
    row = Row("p", "t", "ours", "s")
    row.most({"resident growth": 5.0})
    row.most({"resident growth": 3.0, "pinned": 1.0})
    assert row.figures == {"resident growth": 5.0, "pinned": 1.0}


def test_a_comparison_says_the_ratio_and_what_is_missing() -> None:
    before, after = results(), results()
    after.rows = [row for row in after.rows if row.system != "raw read"]
    next(row for row in after.rows if row.system == "Slow").samples["durable"] = [6.0]
    lines = list(comparison(before, after))
    assert "| zero3 | ext4 | Slow | durable | 12.0 | 6.00 | 0.50 |" in lines
    assert "| zero3 | ext4 | Slow | load | 6.00 | 6.00 | 1.00 |" in lines
    assert "only before: zero3, ext4, raw read" in lines


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results().write(tmp_path)
    assert main(["compare", str(tmp_path), str(tmp_path / "results.json")]) == 0
    assert "| zero3 | ext4 | Slow | blocking | 9.00 | 9.00 | 1.00 |" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), str(tmp_path / "nothing")]) == 2
    assert "cannot read" in capsys.readouterr().err
