"""Copies of what other ranks own: one that drifted, one that is not all there, one that came from a damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.reading import read_index
from tests.checkpoints import left_in
from tests.conftest import Ranks
from tests.damage import flip_bit
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob, train
from tests.ranks import RankFailure
from tests.resharding.stays import stay
from tests.resharding.trips import zero

UNCOVERED = "does not cover the tensor exactly once: some rank lists too few or too many pieces of it"


def failing(failure: RankFailure, error: str) -> str:
    """The text of the error that every rank raised, of the type expected."""
    assert {o.error_type for o in failure.outcomes} == {f"resume_kit.errors.{error}"}, str(failure)
    assert len({o.error for o in failure.outcomes}) == 1
    return failure.outcomes[0].error


def test_a_copy_of_which_a_rank_lists_no_piece_is_neither_saved_nor_proved(ranks: Ranks, tmp_path: Path) -> None:
    """Every piece of it that is there is sound, so that no rank is to blame."""
    job = MegatronJob(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), tp=2)
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, 4, job.but(run_dir=str(tmp_path / "other")), 0, 0, ["lost-copy@3"])
    text = failing(failure.value, "InconsistentState")
    assert f"[replicas] param/decoder.layers.0.mlp.linear_fc1.weight: copy 2 {UNCOVERED}" in text
    assert "nothing was saved" in text
    ranks.run(stay, 4, job, 0, 0)
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, 4, job, 0, None, ["lost-copy@3"])
    text = failing(failure.value, "ResumeRefused")
    assert f"param/decoder.layers.1.mlp.linear_fc1.weight: copy 2 {UNCOVERED}" in text


@pytest.mark.parametrize(("fault", "kind"), [("drift-moment", "exp_avg"), ("drift-master", "master")])
def test_what_every_data_rank_updates_is_not_saved_where_one_drifted(
    fault: str, kind: str, ranks: Ranks, tmp_path: Path
) -> None:
    job = MegatronJob(
        run_dir=str(tmp_path / "run"), data=text_file(tmp_path), distributed_optimizer=False, steps=4, save_every=3
    )
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), [fault])
    text = failing(failure.value, "InconsistentState")
    assert f"[replicas] rank 1, {kind}/" in text and "rank 0" not in text
    assert left_in(Path(job.run_dir)) == []


@pytest.mark.parametrize(
    ("fault", "kind"), [("flip-copied-moment", "exp_avg"), ("flip-copied-master", "master"), ("flip-copy", "param")]
)
def test_what_every_data_rank_updates_is_proved_on_every_rank(
    fault: str, kind: str, ranks: Ranks, tmp_path: Path
) -> None:
    job = MegatronJob(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), distributed_optimizer=False)
    ranks.run(stay, 2, job, 1, 1)
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, 2, job, 2, None, [fault])
    text = failing(failure.value, "ResumeRefused")
    assert f"rank 1, {kind}/" in text and "this copy is not what was saved" in text
    assert "rank 0" not in text


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (3, {}),  # no weight's size is a multiple of 3
        (2, {"precision": "fp32"}),
        (4, {"tp": 2}),
        (4, {"experts": 4, "ep": 2}),
    ],
)
def test_what_every_data_rank_updates_is_read_once_and_given_to_the_others(
    world_size: int, changes: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    job = MegatronJob(
        run_dir=str(tmp_path / "run"), data=text_file(tmp_path), distributed_optimizer=False, global_batch=12, **changes
    )
    before = ranks.run(stay, world_size, job, 1, 1)
    after = ranks.run(stay, world_size, job, 1)
    for saved, resumed in zip(before, after, strict=True):
        assert resumed.resumed_at == 1 and resumed.state == saved.state
    shares = [wanted for wanted, *_ in after[0].read["by_rank"]]
    if not changes:
        directory = Path(job.run_dir) / names.step_directory(1)
        manifest = read_manifest(directory)
        indices = [read_index(directory, manifest, rank) for rank in range(world_size)]
        stored = [sum(piece.nbytes for piece in index.pieces) for index in indices]
        assert shares == stored and max(shares) < 1.1 * min(shares)


@pytest.mark.parametrize("weight", ["wpe.weight", "mlp.c_fc.weight"])
def test_a_damaged_whole_copy_falls_back_where_blocks_are_read_in_part(
    weight: str, ranks: Ranks, tmp_path: Path
) -> None:
    """A frozen weight is whole on every rank: its owner stores it, the others only prove it."""
    start, goal = (zero(n, 1, batch=6, accumulation=6 // n, frozen=True).job for n in (2, 3))
    place = {"run_dir": str(tmp_path / "run"), "data": text_file(tmp_path)}
    for step in (1, 2):
        ranks.run(stay, 2, start.but(**place), step, step)
    checkpoint = Path(place["run_dir"]) / names.step_directory(2)
    manifest = read_manifest(checkpoint)
    (file, offset), *_ = [
        (checkpoint / index.data_file, piece.offset)
        for index in (read_index(checkpoint, manifest, rank) for rank in range(2))
        for piece in index.pieces
        if piece.offset is not None and piece.key.kind == "param" and piece.key.name.endswith(weight)
    ]
    flip_bit(file, 8 * (offset + 10) + 2)
    for found in ranks.run(stay, 3, goal.but(**place), 1):
        assert found.resumed_at == 1
        (rejected,) = found.rejected
        assert rejected["checkpoint"] == names.step_directory(2)
        assert all(file.name in problem["where"] for problem in rejected["problems"])
