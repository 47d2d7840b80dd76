"""What a part finds on the file systems: its own workload's run, and nothing that only fills them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suite.account import Job, place_of
from benchmarks.suite.presets import Leg, Preset, WorkloadSpec
from benchmarks.suite.results import Results
from benchmarks.suite.worker import MEASURED, sweep

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
