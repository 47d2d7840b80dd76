"""The report: the same account for people, for JSON and for the journal."""

from __future__ import annotations

import json
import time

import pytest

from resume_kit.checkpoint import canonical
from resume_kit.errors import Problem
from resume_kit.resuming.report import Check, Report

DAMAGE = Problem("integrity", "step-000000020/rank-00001.index.json", "the file is missing", "restore it")


def resumed() -> Report:
    report = Report(run="runs/x", attempt=3)
    report.passed("elect", "newest", "step-000000020")
    report.reject("step-000000020", (DAMAGE,))
    report.passed("preflight", "tensors", "14 tensors, 2 ranks")
    report.warned("preflight", "versions", "torch: saved with 2.9, live 2.10")
    report.passed("prove", "fingerprints", "28 of 28")
    report.seconds = {"preflight": 0.125, "load": 1.0}
    report.checkpoint, report.step, report.decision = "step-000000010", 10, "training goes on with step 11"
    return report


def test_the_text_tells_every_check_under_its_stage_with_mark_and_time() -> None:
    assert resumed().render().splitlines() == [
        "resume of runs/x, attempt 3",
        "  ✗ step-000000020 is damaged and was left aside:",
        "      step-000000020/rank-00001.index.json: the file is missing",
        "  preflight (0.12 s)",
        "    ✓ tensors                14 tensors, 2 ranks",
        "    ! versions               torch: saved with 2.9, live 2.10",
        "  prove",
        "    ✓ fingerprints           28 of 28",
        "  → training goes on with step 11",
    ]


def test_a_refusal_is_marked_with_each_problem() -> None:
    report = Report(run="r", attempt=1)
    report.failed("preflight", (Problem("topology", "world_size", "saved with 2, live 4"), DAMAGE))
    report.decision = "refused"
    assert [check.verdict for check in report.checks] == ["fail", "fail"]
    text = report.render()
    assert "✗ topology" in text and "world_size: saved with 2, live 4" in text and "→ refused" in text
    assert text.count("  preflight") == 1


def test_the_json_holds_all_of_it_and_survives_the_signed_form() -> None:
    report = resumed()
    document = report.to_json()
    assert json.loads(json.dumps(document)) == document == json.loads(canonical.dumps(document))
    assert document["checks"] == [
        {"stage": "preflight", "name": "tensors", "verdict": "pass", "figure": "14 tensors, 2 ranks"},
        {"stage": "preflight", "name": "versions", "verdict": "warn", "figure": "torch: saved with 2.9, live 2.10"},
        {"stage": "prove", "name": "fingerprints", "verdict": "pass", "figure": "28 of 28"},
    ]
    (rejected,) = document["rejected"]
    assert rejected["checkpoint"] == "step-000000020"
    assert rejected["problems"] == [
        {"check": "integrity", "where": DAMAGE.where, "what": "the file is missing", "remedy": "restore it"}
    ]
    others = {key: value for key, value in document.items() if key not in ("checks", "rejected")}
    assert others == {
        "run": "runs/x",
        "attempt": 3,
        "checkpoint": "step-000000010",
        "step": 10,
        "decision": "training goes on with step 11",
        "seconds": {"preflight": 0.125, "load": 1.0},
        "changes": [],
        "read": {},
    }


def test_a_rejection_drops_its_own_checks_and_keeps_earlier_rejections() -> None:
    report = Report(run="r", attempt=1)
    for name in ("step-000000030", "step-000000020"):
        report.passed("preflight", "tensors", name)
        report.reject(name, (DAMAGE,))
    report.passed("preflight", "tensors", "step-000000010")
    assert report.checks == [Check("preflight", "tensors", "pass", "step-000000010")]
    assert [entry["checkpoint"] for entry in report.rejected] == ["step-000000030", "step-000000020"]


def test_reports_do_not_share_their_lists() -> None:
    one, other = Report(run="r", attempt=1), Report(run="r", attempt=1)
    one.passed("a", "b", "c")
    one.reject("x", ())
    one.seconds["a"] = 1.0
    assert other == Report(run="r", attempt=1) and other.checks == [] and other.rejected == [] and other.seconds == {}


def test_times_of_a_stage_add_up_even_when_it_fails() -> None:
    report = Report(run="r", attempt=1)

    def failing() -> None:
        with report.timed("load"):
            time.sleep(0.02)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    first = report.seconds["load"]
    assert first >= 0.02
    with report.timed("load"):
        time.sleep(0.01)
    assert report.seconds["load"] >= first + 0.01 and list(report.seconds) == ["load"]
