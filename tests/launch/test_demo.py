"""The demo's judgement: what it compares, what it calls a FAIL, what it shows. The demo itself is `make demo`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.demo import folder, tables
from launch.demo.__main__ import main, parse_arguments
from launch.demo.judging import FIGURES, Findings, Kill, attempts_of, compare_checkpoints, judge
from launch.demo.processes import Launched, Machine
from launch.demo.story import read_report
from launch.demo.watching import SaveTrap, StepTrap, save_seconds, step_seconds
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.names import ground, step_directory
from resume_kit.resuming.report import Report
from tests.checkpoints import commit

STEPS = 18
SAVE_EVERY = 3

Event = dict[str, Any]


def step_event(attempt: int, step: int) -> Event:
    return {
        "event": "step",
        "attempt": attempt,
        "time": 100.0 * attempt + step,
        "step": step,
        "loss": 5.0 - step / 7,
        "grad_norm": 1.0 + step / 3,
        "lr": 0.001 * step,
        "samples": 4 * step,
        "batch": f"{step:016x}",
    }


def attempt_events(attempt: int, first: int, last: int, *, torn_save: bool = False, ended: bool = False) -> list[Event]:
    """A start of a run that trains steps `first` to `last` and saves on schedule."""
    events: list[Event] = [{"event": "start", "attempt": attempt, "time": 0.0}]
    if first > 1:
        events.append({"event": "resume", "attempt": attempt, "time": 0.0, "step": first - 1})
    for step in range(first, last + 1):
        events.append(step_event(attempt, step))
        if step % SAVE_EVERY == 0:
            events.append({"event": "save", "attempt": attempt, "time": 0.0, "step": step})
            if not (torn_save and step == last):
                events.append({"event": "commit", "attempt": attempt, "time": 0.0, "step": step})
    if ended:
        events.append({"event": "end", "attempt": attempt, "time": 0.0, "step": last})
    return events


def story() -> dict[str, Any]:
    """The arguments of `judge` for a demo that went as it should."""
    return {
        "steps": STEPS,
        "reference_events": attempt_events(1, 1, STEPS, ended=True),
        "resumed_events": [
            *attempt_events(1, 1, 7),
            *attempt_events(2, 7, 12, torn_save=True),
            *attempt_events(3, 10, STEPS, ended=True),
        ],
        "kills": [Kill(1, 6, 7, 0.1), Kill(2, 6, 12, 0.02, 12, (("rank-00000.safetensors", 1000),))],
        "checkpoints": [],
    }


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    def manifest(**recipe: Any) -> Any:
        return read_manifest(commit(tmp_path_factory.mktemp("run"), STEPS, **recipe))

    return manifest


@pytest.fixture
def parts(manifests: Callable[..., Any]) -> dict[str, Any]:
    """`story()` with the comparison of two genuine checkpoints that hold the same."""
    pair = compare_checkpoints(manifests(), manifests(run_id="ba9876543210", attempt=3, created=1.8e9))
    return {**story(), "checkpoints": [pair]}


def findings_of(parts: dict[str, Any]) -> Findings:
    return judge(**parts)


def find(events: list[Event], attempt: int, step: int, event: str = "step") -> Event:
    return next(e for e in events if (e["event"], e["attempt"], e.get("step")) == (event, attempt, step))


def test_equal_runs_pass(parts):
    findings = findings_of(parts)
    assert findings.passed, findings.problems
    assert len(findings.pairs) == 7 + 6 + 9
    assert findings.trained_twice == 7 + 6 + 9 - STEPS


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("where", [(1, 7), (2, 8), (3, STEPS)])
def test_one_unequal_figure_in_any_attempt_fails(parts, figure, where):
    record = find(parts["resumed_events"], *where)
    record[figure] = "0" * 16 if figure == "batch" else record[figure] + 1e-15 * record[figure] + (figure == "samples")
    findings = findings_of(parts)
    assert len(findings.problems) == 1
    assert findings.problems[0].startswith(f"{figure} of step {where[1]} is ")
    assert "1 of 22 step records differ" in findings.problems[0]


def test_the_sign_of_zero_counts(parts):
    for events, attempt in ((parts["reference_events"], 1), (parts["resumed_events"], 3)):
        find(events, attempt, STEPS)["lr"] = 0.0
    assert findings_of(parts).passed
    find(parts["resumed_events"], 3, STEPS)["lr"] = -0.0
    assert not findings_of(parts).passed


def test_a_missing_figure_fails(parts):
    del find(parts["resumed_events"], 2, 8)["grad_norm"]
    assert findings_of(parts).problems[0].startswith("grad_norm of step 8 is None in attempt 2")


@pytest.mark.parametrize(("attempt", "step"), [(3, 11), (3, STEPS), (1, 2)])
def test_a_missing_step_fails(parts, attempt, step):
    parts["resumed_events"].remove(find(parts["resumed_events"], attempt, step))
    assert not findings_of(parts).passed


def test_a_step_that_no_attempt_has_is_named(parts):
    parts["resumed_events"].remove(find(parts["resumed_events"], 3, 14))
    assert "the resumed run's journal lacks step 14" in findings_of(parts).problems


@pytest.mark.parametrize("step", [1, 9, STEPS])
def test_a_step_missing_from_the_reference_fails(parts, step):
    parts["reference_events"].remove(find(parts["reference_events"], 1, step))
    assert "the reference run's journal does not hold steps 1 to 18 once each" in findings_of(parts).problems


def test_a_reference_in_two_starts_fails(parts):
    parts["reference_events"] = [*attempt_events(1, 1, 9), *attempt_events(2, 10, STEPS, ended=True)]
    assert "the reference run did not go through in one start" in findings_of(parts).problems


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", None])
def test_figures_that_are_no_numbers_fail_though_equal(parts, name, value):
    for events in (parts["reference_events"], parts["resumed_events"]):
        for event in events:
            if event["event"] == "step":
                event[name] = value
    assert findings_of(parts).problems == (f"the reference run's {name} of step 1 is {value}, not a finite number",)


def test_fewer_than_two_kills_fail(parts):
    parts["kills"] = parts["kills"][1:]
    problems = findings_of(parts).problems
    assert "1 kills, not 2" in problems
    assert "no kill fell within a step" in problems


def test_no_kill_in_a_save_fails(parts):
    parts["kills"][1] = Kill(2, 6, 12, 0.02)
    assert findings_of(parts).problems == ("no kill fell into the middle of a save",)


def test_a_save_that_was_committed_was_not_cut_off(parts):
    save = find(parts["resumed_events"], 2, 12, "save")
    place = parts["resumed_events"].index(save) + 1
    parts["resumed_events"].insert(place, {"event": "commit", "attempt": 2, "time": 0.0, "step": 12})
    assert "the journal does not say that the save of step 12 was cut off" in findings_of(parts).problems


def test_an_attempt_that_ended_by_itself_was_not_killed(parts):
    parts["resumed_events"].append({"event": "end", "attempt": 2, "time": 0.0, "step": 12})
    assert "attempt 2 was not cut off by its kill" in findings_of(parts).problems


def test_no_resume_from_a_checkpoint_fails(parts):
    parts["resumed_events"] = [
        *attempt_events(1, 1, 2),
        *attempt_events(2, 1, 3, torn_save=True),
        *attempt_events(3, 1, STEPS, ended=True),
    ]
    parts["kills"] = [Kill(1, 6, 2, 0.1), Kill(2, 6, 3, 0.02, 3)]
    assert findings_of(parts).problems == ("no attempt resumed from a checkpoint",)


def test_a_resume_from_an_older_checkpoint_fails(parts):
    parts["resumed_events"] = [
        *attempt_events(1, 1, 7),
        *attempt_events(2, 4, 12, torn_save=True),
        *attempt_events(3, 10, STEPS, ended=True),
    ]
    expected = "attempt 2 began with the checkpoint of step 3, not with the checkpoint of step 6"
    assert expected in findings_of(parts).problems


def test_a_start_from_nothing_after_a_commit_fails(parts):
    parts["resumed_events"] = [
        *attempt_events(1, 1, 7),
        *attempt_events(2, 1, 12, torn_save=True),
        *attempt_events(3, 10, STEPS, ended=True),
    ]
    assert "attempt 2 began with nothing, not with the checkpoint of step 6" in findings_of(parts).problems


def test_a_refused_attempt_fails(parts):
    parts["resumed_events"].append({"event": "refuse", "attempt": 3, "time": 0.0, "reason": "the gate says no"})
    problems = findings_of(parts).problems
    assert "attempt 3 refused to go on: the gate says no" in problems
    assert "the resumed run did not come to its end" in problems


def test_steps_beyond_the_end_fail(parts):
    parts["resumed_events"].insert(-1, step_event(3, STEPS + 1))
    assert f"the resumed run's journal has step {STEPS + 1}, which the reference lacks" in findings_of(parts).problems


@pytest.mark.parametrize("missing", ["reference_events", "resumed_events"])
def test_an_empty_journal_fails(parts, missing):
    parts[missing] = []
    assert not findings_of(parts).passed


@pytest.mark.parametrize(
    ("recipe", "named"), [({"seed": 1}, "norm.running_mean"), ({"rng_seed": 1}, "rng"), ({"position": 5}, "data")]
)
def test_checkpoints_that_differ_fail(parts, manifests, recipe, named):
    parts["checkpoints"] = [compare_checkpoints(manifests(), manifests(attempt=3, **recipe))]
    (problem,) = findings_of(parts).problems
    assert problem.startswith(f"the checkpoints of step {STEPS} differ in ")
    assert named in problem


def test_no_common_checkpoint_fails(parts):
    parts["checkpoints"] = []
    assert findings_of(parts).problems == ("the two runs have no checkpoint of the same step to compare",)


def test_the_last_checkpoint_must_be_of_the_last_attempt(parts, manifests):
    parts["checkpoints"] = [compare_checkpoints(manifests(), manifests(attempt=2))]
    assert "is not the last that the run committed" in findings_of(parts).problems[0]


def test_tables_show_the_steps_around_each_kill(parts):
    first, second = tables.kill_tables(findings_of(parts)).split("\n\n")
    assert first.splitlines()[0] == "around kill 1, 100 ms into step 8"
    assert second.splitlines()[0] == "around kill 2, 20 ms into the save of step 12"
    rows = {line.split()[0]: line for line in first.splitlines()[2:]}
    assert list(rows) == ["6", "7", "8", "9"]
    assert rows["7"].split()[1:4] == [repr(5.0 - 1), repr(5.0 - 1), "yes"]
    assert "the checkpoint resumed from" in rows["6"]
    assert "first step after the resume" in rows["7"]
    assert "the kill fell here" in rows["8"]
    assert "killed in its save" in second


def test_tables_name_what_is_not_equal(parts):
    find(parts["resumed_events"], 2, 8)["grad_norm"] = 9.0
    text = tables.kill_tables(findings_of(parts))
    (line,) = [line for line in text.splitlines() if line.startswith("     8 ")]
    assert line.split()[3] == "NO"
    assert "grad_norm differs" in line


def test_tables_fold_the_steps_between(parts):
    parts["resumed_events"] = [
        *attempt_events(1, 1, 14, torn_save=True)[:-5],
        *attempt_events(2, 4, 15, torn_save=True),
        *attempt_events(3, 13, STEPS, ended=True),
    ]
    parts["kills"] = [Kill(1, 6, 12, 0.1), Kill(2, 6, 15, 0.02, 15)]
    assert "steps 6–10" in tables.kill_tables(findings_of(parts))
    find(parts["resumed_events"], 2, 8)["loss"] = 0.0
    assert "NOT all equal" in tables.kill_tables(findings_of(parts))


def test_totals(parts):
    text = tables.totals(findings_of(parts))
    assert "22 step records: 18 steps, 4 of them trained twice; 15 after a resume" in text
    assert text.count("22 of 22 equal, bit for bit") == len(FIGURES)
    assert "1 of 1 identical (steps 18)" in text
    find(parts["resumed_events"], 2, 8)["loss"] = 0.0
    assert "losses          21 of 22 equal\n" in tables.totals(findings_of(parts))


def test_tables_of_a_demo_that_got_nowhere():
    findings = judge(STEPS, [], [], [Kill(1, 3, 0, 0.1)], [])
    assert "no step there was compared" in tables.kill_tables(findings)
    assert "0 step records" in tables.totals(findings)


@pytest.mark.parametrize("equal", [True, False])
def test_the_picture_is_drawn(parts, tmp_path, equal):
    pytest.importorskip("matplotlib")
    from launch.demo import picture

    if not equal:
        find(parts["resumed_events"], 3, 14)["loss"] = 1.0
    path = tmp_path / "curves.png"
    picture.draw(findings_of(parts), attempts_of(parts["reference_events"])[0], path, subtitle="a test")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_strangers_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "thesis.txt").write_text("mine")
    with pytest.raises(folder.FolderRefused, match="not a demo's"):
        folder.claim(tmp_path)
    assert (tmp_path / "reference" / "thesis.txt").read_text() == "mine"


def test_a_demos_own_folder_is_cleared_of_what_a_demo_makes(tmp_path):
    folder.claim(tmp_path / "demo").close()
    (tmp_path / "demo" / "reference").mkdir()
    (tmp_path / "demo" / "resumed-attempt-1.log").touch()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    folder.claim(tmp_path / "demo").close()
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [folder.MARK, "notes.txt"]


def test_a_linked_run_is_unlinked_not_emptied(tmp_path):
    folder.claim(tmp_path / "demo").close()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "demo" / "resumed").symlink_to(tmp_path / "elsewhere")
    folder.claim(tmp_path / "demo").close()
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert not (tmp_path / "demo" / "resumed").exists()


def test_two_demos_do_not_share_a_folder(tmp_path):
    with folder.claim(tmp_path), pytest.raises(folder.FolderRefused, match="another demo is running"):
        folder.claim(tmp_path)


def test_the_step_trap_waits_for_its_step():
    trap = StepTrap(4, 0.01, random.Random(0))
    assert not trap.sprung([])
    assert not trap.sprung([step_event(1, 3)])
    assert trap.sprung([step_event(1, 3), step_event(1, 4)])


def test_the_save_trap_needs_a_staging_directory_with_files(tmp_path):
    trap = SaveTrap(tmp_path, 3, 0.0, random.Random(0))
    saving = [{"event": "save", "attempt": 2, "step": 3}]
    assert not trap.sprung(saving)
    staging = ground(tmp_path, 2) / step_directory(3)
    staging.mkdir(parents=True)
    assert not trap.sprung(saving)
    (staging / "rank-00000.safetensors").touch()
    assert not trap.sprung([{"event": "save", "attempt": 2, "step": 2}])
    assert trap.sprung(saving)
    assert trap.missed == []


def test_the_save_trap_notes_a_save_that_was_too_fast(tmp_path):
    trap = SaveTrap(tmp_path, 3, 0.0, random.Random(0))
    assert not trap.sprung([{"event": "save", "attempt": 2, "step": 3}])
    events = [{"event": "save", "attempt": 2, "step": 3}, {"event": "commit", "attempt": 2, "step": 3}]
    assert not trap.sprung(events)
    assert trap.missed == [3]


def test_durations_come_from_the_journal():
    events = [step_event(1, 1), step_event(1, 2), {"event": "save", "time": 110.0}, step_event(1, 3)]
    events.append({"event": "commit", "time": 0, "seconds": {"agree": 9, "stage": 0.1, "write": 0.2, "commit": 0.3}})
    assert step_seconds(events) == 1.0
    assert save_seconds(events) == pytest.approx(0.5)


def test_a_kill_ends_the_launcher_and_all_its_descendants(tmp_path):
    child = "import time; time.sleep(600)"
    script = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', {child!r}])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    log = tmp_path / "log"
    with Launched([sys.executable, "-S", "-c", script], {}, log) as launched:
        deadline = time.monotonic() + 30
        while not log.read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.01)
        grandchild = int(log.read_text())
        launched.note_family()
        assert launched.exit_code is None
        assert launched.kill() == 2
        assert launched.exit_code == -9
    assert _gone(grandchild)


def test_children_die_with_a_demo_that_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from launch.demo.processes import Launched\n"
        "sleeper = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "with Launched([sys.executable, '-S', '-c', sleeper], {}, Path(sys.argv[1])): time.sleep(600)"
    )
    log = tmp_path / "log"
    demo = subprocess.Popen([sys.executable, "-c", script, str(log)], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.01)
        sleeper = int(log.read_text())
        time.sleep(0.2)
    finally:
        demo.kill()
        demo.wait()
    deadline = time.monotonic() + 30
    while not _gone(sleeper) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _gone(sleeper)


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_command_is_the_deepspeed_launcher_and_local():
    command = Machine(cuda=False, ranks=3).command(23456, Path("configs/x.yaml"), {"run.steps": "18"})
    assert "--hostfile=/dev/null" in command
    assert command[command.index("--num_gpus") + 1] == "3"
    assert command[-5:] == ["launch/train_zero3.py", "--config", "configs/x.yaml", "--set", "run.steps=18"]


def test_picked_gpus_stay_picked(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    machine = Machine(cuda=True, ranks=1, visible=("2",))
    assert machine.environment()["CUDA_VISIBLE_DEVICES"] == "2"
    assert "--num_gpus" not in machine.command(1, Path("c"), {})


def test_the_environment_of_another_job_is_left_out(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    environment = Machine(cuda=False, ranks=2).environment()
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert "RANK" not in environment
    assert "CUDA_VISIBLE_DEVICES" not in environment


@pytest.mark.parametrize("words", [["--steps", "17"], ["--ranks", "0"], ["--data", "no/such/file"]])
def test_wrong_usage_ends_before_anything_starts(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(words)
    assert words[0] in capsys.readouterr().err


def test_a_refused_folder_is_wrong_usage(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(["--out", str(tmp_path)]) == 2
    assert "not a demo's" in capsys.readouterr().err


def test_a_report_is_read_back_and_rendered(tmp_path):
    report = Report(run="runs/x", attempt=2, checkpoint="step-000000010", step=10, decision="resume")
    report.passed("prove", "tensors", "104 of 104")
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_json()))
    assert read_report(path).render() == report.render()
