"""Faults around a change of topology: each is found, named, and either fallen back from or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.checkpoint.index import StoredPiece
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.reading import read_index
from tests import jobs, megatron_jobs
from tests.checkpoints import left_in
from tests.conftest import Ranks
from tests.damage import flip_bit, resign
from tests.megatron_jobs import MegatronJob
from tests.ranks import RankFailure, run_ranks
from tests.resharding.stays import stay
from tests.resharding.trips import TRIPS, AnyJob, Trip

CHANGES = {"deepspeed": TRIPS["zero-4-3"], "megatron": TRIPS["megatron-tp-pp"]}


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trip]:
    """For each engine a trip whose start has checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    data = jobs.text_file(folder)
    found = {}
    for engine, trip in CHANGES.items():
        start, goal = (place.job.but(run_dir=str(folder / engine), data=data) for place in (trip.start, trip.goal))
        module = jobs if engine == "deepspeed" else megatron_jobs
        run_ranks(module.train, trip.start.world, start.but(steps=4, save_every=2).to_json())
        found[engine] = replace(trip, start=replace(trip.start, job=start), goal=replace(trip.goal, job=goal))
    return found


def copied(job: AnyJob, tmp_path: Path) -> AnyJob:
    return job.but(run_dir=shutil.copytree(job.run_dir, tmp_path / "run", dirs_exist_ok=True).as_posix())


def middle_piece(run: Path, step: int, rank: int, kind: str = "master") -> tuple[Path, StoredPiece]:
    """A data file and one of the pieces that lie in its middle."""
    checkpoint = run / names.step_directory(step)
    index = read_index(checkpoint, read_manifest(checkpoint), rank)
    pieces = [piece for piece in index.pieces if piece.stored and piece.key.kind == kind]
    return checkpoint / index.data_file, pieces[len(pieces) // 2]


@pytest.mark.parametrize("engine", CHANGES)
def test_a_bit_flipped_in_a_block_that_is_read_in_part_falls_back(
    engine: str, ranks: Ranks, saved: dict[str, Trip], tmp_path: Path
) -> None:
    goal = saved[engine].goal
    job = copied(goal.job, tmp_path)
    file, piece = middle_piece(Path(job.run_dir), 4, rank=1)
    assert piece.offset is not None
    flip_bit(file, 8 * (piece.offset + piece.nbytes // 2) + 2)
    for found in ranks.run(stay, goal.world, job, 2, 2):
        assert found.resumed_at == 2
        assert found.read["verified_bytes"] < found.read["read_bytes"]
        (rejected,) = found.rejected
        assert rejected["checkpoint"] == names.step_directory(4)
        assert all(file.name in problem["where"] for problem in rejected["problems"])
        assert any("is not what was saved" in problem["what"] for problem in rejected["problems"])
    good = read_manifest(Path(goal.job.run_dir) / names.step_directory(2))
    again = read_manifest(Path(job.run_dir) / names.step_directory(2))
    assert again.engine["world_size"] == goal.world
    assert good.tensors and {(e.spec, e.fingerprint) for e in good.tensors} == {
        (e.spec, e.fingerprint) for e in again.tensors
    }


def _hold(ranks: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(holders=dict.fromkeys(document["holders"], ranks))


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "holders no ranks": _hold("abc"),
    "holders out of the world": _hold("7-9"),
    "holders without end": _hold(f"0-{10**12}"),
    "holders a number": lambda document: document["holders"].update(dict.fromkeys(document["holders"], 5)),
    "carried a number": lambda document: document.update(carried=[5]),
    "carried without its size": lambda document: document.update(carried=[{"engine": "megatron"}]),
    "carried without its records": lambda document: document.update(
        carried=[{**document["engine"], "tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 8}]
    ),
    "carried where the run is now": lambda document: document.update(
        carried=[{**document["engine"], "tensor_parallel": 1, "pipeline_parallel": 2, "expert_tensor_parallel": 1}]
    ),
    "an engine of a size in words": lambda document: document["engine"].update(world_size="two"),
    "an engine without its axes": lambda document: document["engine"].pop("tensor_parallel"),
    "an engine of more ranks": lambda document: document["engine"].update(data_parallel=9, pipeline_parallel=9),
    "an engine of axes in words": lambda document: document["engine"].update(tensor_parallel="two"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_signed_manifest_that_says_odd_things_is_damage_and_falls_back(
    what: str, ranks: Ranks, saved: dict[str, Trip], tmp_path: Path
) -> None:
    goal = saved["megatron"].goal
    job = copied(goal.job, tmp_path)
    resign(Path(job.run_dir) / names.step_directory(4) / names.MANIFEST, ODD[what])
    for found in ranks.run(stay, goal.world, job, 2):
        assert found.resumed_at == 2
        (rejected,) = found.rejected
        assert rejected["checkpoint"] == names.step_directory(4) and rejected["problems"]


@pytest.mark.parametrize(
    ("engine", "fault", "expected"),
    [
        ("deepspeed", "flip-master", ["master/", "over all ranks", "saved"]),
        ("deepspeed", "flip-moment", ["exp_avg/", "over all ranks"]),
        ("deepspeed", "flip-copy", ["rank 1, param/", "this whole copy"]),
        ("deepspeed", "wrong-step", ["step.value: live 1.0, saved 4.0"]),
        ("megatron", "flip-master", ["master/", "over all ranks", "saved"]),
        ("megatron", "flip-weight", ["param/", "over all ranks"]),
        (
            "megatron",
            "flip-copy",
            ["rank 1, param/embedding.word_embeddings.weight", "copy is not what was saved"],
        ),
        ("megatron", "wrong-step", ["step.value: live 1.0, saved 4.0"]),
        ("megatron", "reseed-torch", ["rank 1, torch: changed between resume() and the first batch"]),
    ],
)
def test_a_live_state_that_is_wrong_after_the_change_is_refused(
    engine: str, fault: str, expected: list[str], ranks: Ranks, saved: dict[str, Trip], tmp_path: Path
) -> None:
    goal = saved[engine].goal
    job = copied(goal.job, tmp_path)
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, goal.world, job, 5, None, [fault])
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.ResumeRefused"
    for part in expected:
        assert part in failure.value.outcomes[1].error
    events = [json.loads(line) for line in (Path(job.run_dir) / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "refuse"
    assert (Path(job.run_dir) / names.step_directory(4)).is_dir()


def saving(ranks: Ranks, folder: Path, fault: str, **options: Any) -> tuple[RankFailure, Path]:
    """A Megatron run whose only save, after step 3, must be refused because of a fault."""
    job = MegatronJob(run_dir=str(folder / "run"), data=jobs.text_file(folder), steps=4, save_every=3, **options)
    with pytest.raises(RankFailure) as failure:
        ranks.run(megatron_jobs.train, 2, job.to_json(), [fault])
    return failure.value, Path(job.run_dir)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"tp": 2, "rotary": True}, "decoder.layers.0.input_layernorm."),
        ({"pp": 2}, "embedding.word_embeddings.weight"),
        ({"distributed_optimizer": False}, "embedding.word_embeddings.weight"),
        ({}, ""),
    ],
    ids=["norm over tensor ranks", "tied embedding over stages", "weight over data ranks", "gathered weight"],
)
def test_a_copy_that_drifted_is_not_saved(options: dict[str, Any], weight: str, ranks: Ranks, tmp_path: Path) -> None:
    failure, run = saving(ranks, tmp_path, "drift-weight", **options)
    for outcome in failure.outcomes:
        assert outcome.error_type == "resume_kit.errors.InconsistentState"
        assert f"[replicas] rank 1, param/{weight}" in outcome.error
        assert "rank 1's copy is not " in outcome.error and "the replicas have drifted apart" in outcome.error
        assert "rank 0" not in outcome.error
    assert left_in(run) == []


def test_a_weight_that_is_not_its_masters_cast_is_blamed_on_its_owner(ranks: Ranks, tmp_path: Path) -> None:
    """The owner's part is wrong, so that every sound copy differs from what the owners hold together."""
    failure, _ = saving(ranks, tmp_path, "flip-saved-weight")
    assert "[cast of master] rank 1, param/" in failure.outcomes[0].error
    assert "is not its master's cast" in failure.outcomes[0].error
    assert "rank 0" not in failure.outcomes[0].error


def test_a_weight_whose_gather_overlaps_the_forward_is_gathered_before_the_save(ranks: Ranks, tmp_path: Path) -> None:
    """What drifts before that gather is written over by it, so that the save and what comes after are right."""
    data = jobs.text_file(tmp_path)
    one = MegatronJob(run_dir=str(tmp_path / "good"), data=data, steps=4, overlap=True)
    expected = ranks.run(megatron_jobs.train, 2, one.to_json())
    drifted = one.but(run_dir=str(tmp_path / "drifted"))
    assert ranks.run(megatron_jobs.train, 2, drifted.to_json(), ["drift-weight"]) == expected


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("zero-saved-moments", "every element of every exp_avg is zero after 3 updates"),
        ("adam-step-astray", "rank 0 has step=3.0, rank 1 step=4.0"),
        ("nan-state", "the gate is not finite"),
        ("flip-saved-weight", "rank 1, param/"),
        ("extra-step-counter", "rank 1 is at step 2, rank 0 at step 1"),
    ],
)
def test_a_megatron_state_that_contradicts_itself_is_not_saved(
    fault: str, expected: str, ranks: Ranks, tmp_path: Path
) -> None:
    failure, run = saving(ranks, tmp_path, fault, tp=2)
    for outcome in failure.outcomes:
        assert outcome.error_type == "resume_kit.errors.InconsistentState"
        assert expected in outcome.error
    assert left_in(run) == []


@pytest.mark.parametrize(
    ("engine", "changes", "expected"),
    [
        (
            "deepspeed",
            {"stage": 1},
            ["world_size: saved with 4, live 3", "zero_stage: saved with 3, live 1", "zero_optimization"],
        ),
        (
            "megatron",
            {"distributed_optimizer": False},
            [
                "tensor_parallel: saved with 2, live 1",
                "pipeline_parallel: saved with 1, live 2",
                "distributed_optimizer: saved with True, live False",
            ],
        ),
    ],
)
def test_a_strict_policy_refuses_another_topology_with_all_differences(
    engine: str, changes: dict[str, Any], expected: list[str], ranks: Ranks, saved: dict[str, Trip], tmp_path: Path
) -> None:
    goal = saved[engine].goal
    job = copied(goal.job, tmp_path).but(policy={}, **changes)
    with pytest.raises(RankFailure) as failure:
        ranks.run(stay, goal.world, job, 5)
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.ResumeRefused"
        for part in [*expected, "`topology: reshard`"]:
            assert part in outcome.error
