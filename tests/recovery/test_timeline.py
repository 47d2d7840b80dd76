"""The picture of a run: whatever the run was like, it is drawn, and nothing warns."""

from __future__ import annotations

from pathlib import Path

import pytest

from resume_kit.errors import UsageError
from resume_kit.recovery import timeline
from resume_kit.recovery.history import read_story
from tests.recovery.runs import attempt

pytest.importorskip("matplotlib")


def never_trained(run: Path) -> None:
    for number in (1, 2):
        attempt(run, number, at=number * 10).ended("refused", "no")


def one_step(run: Path) -> None:
    attempt(run, 1).train(1)


def only_a_journal(run: Path) -> None:
    attempt(run, 1, folder=False).train(12)
    attempt(run, 2, at=100, folder=False).resume(10).train(15)


def many(run: Path) -> None:
    for number in range(1, 14):
        attempt(run, number, at=number * 1000).resume(10 * number).train(10 * number + 14, save_every=1).words(
            0, "x$_^"
        )


@pytest.mark.parametrize("shape", [never_trained, one_step, only_a_journal, many])
def test_every_run_has_a_picture(tmp_path: Path, shape: object) -> None:
    assert callable(shape)
    run = tmp_path / "run"
    shape(run)
    timeline.draw(read_story(run), tmp_path / "run.png", title="$\\no{math$", subtitle="")
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize(("seconds", "unit"), [(100, "seconds"), (600, "minutes"), (9000, "hours"), (1e6, "days")])
def test_time_is_told_in_the_unit_that_reads_best(seconds: float, unit: str) -> None:
    assert timeline.Axis.of(0.0, seconds).unit == unit


def test_a_kind_of_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    one_step(run)
    with pytest.raises(UsageError, match="the picture cannot be written"):
        timeline.draw(read_story(run), tmp_path / "run.xyz", title="", subtitle="")
