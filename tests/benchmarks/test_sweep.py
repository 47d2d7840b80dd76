"""What a part finds on the file systems: its own workload's run, and nothing that only fills them."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import __main__ as command
from benchmarks.suite import worker
from benchmarks.suite.account import Account, Job, place_of, run_of_legs
from benchmarks.suite.legs import measure_leg
from benchmarks.suite.parts import parts_of
from benchmarks.suite.presets import PRESETS, Leg, Preset, WorkloadSpec
from benchmarks.suite.results import Results
from benchmarks.suite.worker import MEASURED, sweep
from resume_kit.errors import UsageError

LEG = Leg("again", 1)
FIRST, SECOND = (WorkloadSpec(name, "deepspeed", "", 1, legs=(LEG,)) for name in ("first", "second"))
EVERYTHING = {"first/run", "first/measured", "second/run", "second/measured"}


@pytest.mark.parametrize(
    ("spec", "leg", "left"),
    [
        (FIRST, LEG, {"first/run", "second/run"}),
        (SECOND, LEG, {"first/run", "second/run"}),
        (SECOND, None, {"second/run"}),
    ],
)
def test_what_a_killed_part_left_goes_and_a_run_once_its_legs_are_over(
    spec: WorkloadSpec, leg: Leg | None, left: set[str], tmp_path: Path
) -> None:
    job = Job(Preset("both", "", (FIRST, SECOND)), spec, [tmp_path], tmp_path, Results("both"), leg)
    above = place_of(job, tmp_path).parent
    for name in EVERYTHING:
        (above / name).mkdir(parents=True)
    (above / "somebody's").mkdir()
    sweep(job)
    assert {f"{path.parent.name}/{path.name}" for path in above.glob("*/*")} == left
    assert (above / "somebody's").is_dir() and MEASURED == "measured"


def test_a_checkpoint_lies_until_the_last_leg_that_a_launcher_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(job: Job) -> None:
        job.results.write(job.out)
        if job.leg is None:
            run_of_legs(job).mkdir(parents=True)
        lay.append(run_of_legs(job).exists())

    lay: list[bool] = []
    monkeypatch.setattr(worker, "run", measure)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    preset = PRESETS["cpu-2x"]
    for name, _ in parts_of(preset):
        assert command.main(["run", "--preset", preset.name, "--out", str(tmp_path), "--only", name]) == 0
    assert lay == [True] * len(parts_of(preset))
    assert not [*(tmp_path / "work").glob("*/*")]


def test_a_leg_without_its_workloads_checkpoint_says_what_comes_first(tmp_path: Path) -> None:
    job = Job(Preset("one", "", (FIRST,)), FIRST, [tmp_path], tmp_path, Results("one"), LEG)
    account = Account(job, Mock(), {"targets": {}})
    with pytest.raises(UsageError, match=r"first/run holds no checkpoint for again: measure first before"):
        measure_leg(account, Mock(), LEG)
