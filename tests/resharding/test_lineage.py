"""What steps trained in one topology are held against when they are trained again in another, or back in the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import Job, text_file
from tests.ranks import RankFailure
from tests.resharding.stays import stay
from tests.resharding.trips import zero

TWO, THREE = (zero(n, batch=6, accumulation=6 // n).job for n in (2, 3))


def events(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "journal.jsonl").read_text().splitlines()]


def compared(run: str) -> tuple[str, int]:
    """What the newest attempt had to compare, and how many steps it did."""
    resumed, ended = ([e for e in events(run) if e["event"] == kind][-1] for kind in ("resume", "end"))
    (figure,) = [check["figure"] for check in resumed["report"]["checks"] if check["name"] == "steps to compare"]
    return figure, ended["steps_replayed"]


def forge(run: str, attempt: int, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    found = events(run)
    for event in found:
        if event["event"] == "step" and (event["attempt"], event["step"]) == (attempt, step):
            change(event)
    (Path(run) / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in found))


@pytest.fixture
def two(tmp_path: Path) -> Job:
    return TWO.but(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), policy={"preset": "flexible"})


@pytest.fixture
def three(two: Job) -> Job:
    return THREE.but(run_dir=two.run_dir, data=two.data, policy=two.policy)


def mismatch(ranks: Ranks, world_size: int, job: Job, until: int) -> str:
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, world_size, job, until)
    assert {o.error_type for o in failure.value.outcomes} == {"resume_kit.errors.ReplayMismatch"}, str(failure.value)
    return failure.value.outcomes[0].error


def test_steps_of_a_shrunken_run_that_died_unsaved_count_by_their_samples(ranks: Ranks, two: Job, three: Job) -> None:
    ranks.run(stay, 2, two, 2, 2)
    (elsewhere, *_) = ranks.run(stay, 3, three, 5)
    (back, *_) = ranks.run(stay, 2, two, 5)
    assert compared(two.run_dir) == ("0 with all figures, tolerance exact; 3 with their samples only", 3)
    figures = ([record["loss"] for record in found.records] for found in (elsewhere, back))
    assert len({*map(tuple, figures)}) == 2  # the topology does move the loss: dropout is drawn otherwise
    assert [record["batch"] for record in elsewhere.records] == [record["batch"] for record in back.records]


def test_other_samples_stop_across_topologies_too(ranks: Ranks, two: Job, three: Job) -> None:
    ranks.run(stay, 2, two, 2, 2)
    ranks.run(stay, 3, three, 4)
    forge(two.run_dir, 2, 4, lambda event: event.update(batch="0" * 16))
    assert "step 4, trained again" in mismatch(ranks, 2, two, 5)


def test_a_mismatch_in_the_lineage_itself_stops_whatever_another_topology_trained_since(
    ranks: Ranks, two: Job, three: Job
) -> None:
    ranks.run(stay, 2, two, 2, 2)
    ranks.run(stay, 2, two, 3)
    ranks.run(stay, 3, three, 4)
    forge(two.run_dir, 2, 3, lambda event: event.update(loss=event["loss"] + 1e-6))
    assert "loss was" in mismatch(ranks, 2, two, 4)


def test_there_and_back_is_a_lineage_of_its_own(ranks: Ranks, two: Job, three: Job) -> None:
    ranks.run(stay, 2, two, 2, 2)
    ranks.run(stay, 2, two, 6)
    ranks.run(stay, 3, three, 4, 4)
    assert compared(two.run_dir) == ("0 with all figures, tolerance exact; 4 with their samples only", 2)
    ranks.run(stay, 2, two, 6, 5)
    assert compared(two.run_dir) == ("0 with all figures, tolerance exact; 2 with their samples only", 2)
    ranks.run(stay, 2, two, 6)
    assert compared(two.run_dir) == ("1 with all figures, tolerance exact; 0 with their samples only", 1)
    forge(two.run_dir, 4, 6, lambda event: event.update(loss=0.5))  # attempts 4 and 5 trained it in this lineage
    forge(two.run_dir, 5, 6, lambda event: event.update(loss=0.5))
    assert "loss was 0.5" in mismatch(ranks, 2, two, 6)
