"""The report of results made by hand: medians, ratios, reasons, charts, and the README's excerpt."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.suite.report import BEGIN, END, document, excerpt, write_report, write_to_readme
from benchmarks.suite.results import Row
from resume_kit.errors import UsageError
from tests.benchmarks.examples import results


def lines() -> list[str]:
    return list(document(results()))


def test_systems_stand_with_medians_and_ranges_and_the_first_save_apart() -> None:
    assert (
        "| resume_kit, overlapped | 4.00 | 0.02 (0.01–0.03) | 4.00 (4.00–5.00) | 1.00 |  | 7.00, 9.00,  |  |" in lines()
    )


def test_ratios_are_by_byte_to_the_floor_and_by_second_to_the_kits_best_way() -> None:
    # 6 GB in 12 s against 4 GB in 2 s; 6 GB in 6 s against 4 GB in 1 s; 9 / 0.02, 12 / 4 and 6 / 3 seconds
    assert "| Slow | 4.00 | 4.00 | 450.0 | 3.00 | 2.00 |" in lines()
    assert "| resume_kit, committed | 2.00 | 3.00 | 200.0 | 1.00 | 1.00 |" in lines()


def test_a_peer_that_did_not_run_says_why() -> None:
    assert "| Absent |  | did not run |  |  |  |  |  |" in lines()
    assert "- Absent: **did not run**: ImportError: no such thing" in lines()


def test_training_is_held_against_training_without_saves() -> None:
    assert "| resume_kit, overlapped, every 2 steps | 1.04 (1.02–1.06) | +4.0% | 1.50 |  |" in lines()


def test_rates_and_legs_have_tables() -> None:
    assert any(line.startswith("| fingerprints on the device | 2.00 |") and "2000.00" in line for line in lines())
    assert any(line.startswith("| zero3 → zero3-on-3 |") and "2.50 (2.50–2.50)" in line for line in lines())


def test_a_continuation_says_its_outcome_and_a_rehearsal_that_it_is_one() -> None:
    made = results()
    made.settings["about"] = "no measurement"
    made.rows.append(Row("zero3", "ext4", "continuation", "here", note="identical: 2 of 2 tensors, 4 of 4 steps"))
    made.rows.append(Row("zero3", "ext4", "continuation", "there", failure="identical are only 1 of 2 tensors"))
    text = list(document(made))
    assert "by-hand: no measurement." in text
    assert "| here | identical: 2 of 2 tensors, 4 of 4 steps |" in text
    assert "| there | identical are only 1 of 2 tensors |" in text


def test_a_leg_without_further_repeats_shows_its_first() -> None:
    made = results()
    made.rows.append(Row("zero3-on-3", "ext4", "reshard", "once", first={"preflight": 0.5, "load": 2.0, "prove": 0.25}))
    assert "| once |  | first: 0.50 | first: 2.00 | first: 0.25 |  |  |" in list(document(made))


def test_what_ended_early_or_failed_is_said() -> None:
    made = results()
    made.parts["zero3"] |= {"ended early": ["ext4: 2 of 5 repeats"], "failure": "ended with code 1"}
    text = "\n".join(document(made))
    assert "Ended early, the budget of time was used up: ext4: 2 of 5 repeats." in text
    assert "**The part ended with code 1**" in text


def test_report_and_charts_are_made_from_the_json_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results().write(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    for chart in ("zero3-ext4.png", "zero3-ext4-steps.png"):
        assert (tmp_path / chart).stat().st_size > 10_000
        assert f"({chart})" in text


def test_without_matplotlib_there_is_a_report_without_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_report(tmp_path, results())
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_the_readme_gets_the_excerpt_between_its_marks_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    results().write(tmp_path)
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_to_readme(tmp_path, readme)
    assert readme.read_text() == "\n".join(["before", BEGIN, *excerpt(results()), END, "after", ""])
    write_to_readme(tmp_path, readme)
    assert readme.read_text().count("Slow") == 1
    assert "| zero3, ext4 | Slow | 9.00 s | 12.0 s | 6.00 s | 4.00, 4.00 |" in readme.read_text()


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    results().write(tmp_path)
    readme.write_text("nothing\n")
    with pytest.raises(UsageError, match="these two lines"):
        write_to_readme(tmp_path, readme)
    assert readme.read_text() == "nothing\n"
