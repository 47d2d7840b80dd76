"""A damaged checkpoint is named and left aside for the newest good one, which makes the live engine whole again."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint.blocks import digest_image
from tests.conftest import Ranks
from tests.damage import DAMAGES, MISFITS, flip_bit, flip_random_bit, resign, resign_index
from tests.jobs import Job, build, live_digests, text_file, train

#: Found only when the data is read, which goes straight into the live tensors.
FOUND_WHILE_READING = {"data swapped", "data flipped"}


def resume_each(rank: int, world_size: int, options: dict[str, Any], runs: list[str], policy: dict[str, Any]) -> Any:
    """Resume from each run directory in turn with one engine; what came of each, and whether a refusal left a trace."""
    from resume_kit import Policy, ResumeKit, ResumeKitError

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    outcomes = []
    groups = engine.optimizer.param_groups
    as_constructed = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    for run in runs:
        for group, fresh in zip(groups, as_constructed, strict=True):
            group.update(fresh)
        kit = ResumeKit(
            engine, loader, Policy.from_mapping(policy), run_dir=run, config={"seed": job.seed}, show=lambda _: None
        )
        before = live_digests(kit)
        try:
            step, error = kit.resume(), ""
        except ResumeKitError as refusal:
            step, error = -1, f"{type(refusal).__name__}: {refusal}"
        assert kit.report is not None
        rejected = [problem["where"] for r in kit.report.rejected for problem in r["problems"]]
        try:
            refused = "" if step >= 0 else str(kit.step(1.0))
        except ResumeKitError as refusal:
            refused = str(refusal)
        live = live_digests(kit)
        outcomes.append(
            {
                "step": step,
                "error": error,
                "rejected": rejected,
                "untouched": live == before and loader.position == 0,
                "live": live,
                "step refused": refused,
            }
        )
        loader.seek(0)
    return outcomes


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A ZeRO-3 run with checkpoints of steps 2 and 4."""
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("saved")
    job = Job(run_dir=str(folder / "run"), data=text_file(folder), steps=4, save_every=2)
    run_ranks(train, 2, job.to_json())
    return job


def copies(job: Job, tmp_path: Path, count: int) -> list[Path]:
    return [Path(shutil.copytree(job.run_dir, tmp_path / f"run-{number}")) for number in range(count)]


def test_falls_back_from_every_damage_by_name(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    runs = copies(saved, tmp_path, len(DAMAGES))
    for run, (damage, _) in zip(runs, DAMAGES.values(), strict=True):
        damage(run / "step-000000004")
    results = ranks.run(resume_each, 2, saved.to_json(), [str(run) for run in runs], {})
    for (name, (_, file)), mine, other in zip(DAMAGES.items(), *results, strict=True):
        assert mine["step"] == other["step"] == 2, f"{name}: {mine}"
        assert any(file in where for where in mine["rejected"]), f"{name}: {mine['rejected']}"
    for run in runs:
        assert (run / "set-aside" / "step-000000004.attempt-2").is_dir()
        assert (run / "step-000000002").is_dir()


def test_falls_back_from_twenty_random_bit_flips(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    rng = random.Random(20)
    runs = copies(saved, tmp_path, 20)
    flipped = [flip_random_bit(run / "step-000000004", rng).name for run in runs]
    results = ranks.run(resume_each, 2, saved.to_json(), [str(run) for run in runs], {})
    for name, mine in zip(flipped, results[0], strict=True):
        assert mine["step"] == 2
        assert any(name in where for where in mine["rejected"]), f"{name}: {mine['rejected']}"


def test_refuses_every_damage_when_told_not_to_fall_back(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    runs = copies(saved, tmp_path, len(DAMAGES))
    for run, (damage, _) in zip(runs, DAMAGES.values(), strict=True):
        damage(run / "step-000000004")
    for outcomes in ranks.run(resume_each, 2, saved.to_json(), [str(r) for r in runs], {"fallback": False}):
        for (name, (_, file)), outcome in zip(DAMAGES.items(), outcomes, strict=True):
            assert outcome["error"].startswith("CheckpointDamaged"), f"{name}: {outcome}"
            assert file in outcome["error"]
            assert outcome["untouched"] or name in FOUND_WHILE_READING
            assert "call resume() before the first step()" in outcome["step refused"]


def in_blocks(checkpoint: Path, block_bytes: int) -> None:
    """Sign the checkpoint anew with digests of smaller blocks, so that small files have many."""
    for rank in range(2):
        data = digest_image(memoryview((checkpoint / f"rank-{rank:05d}.safetensors").read_bytes()), block_bytes)
        blocks = {"block_bytes": block_bytes, "blocks": list(data.blocks)}
        resign_index(checkpoint, rank, lambda index, blocks=blocks: index["data"].update(blocks))
        resign(
            checkpoint / "manifest.json",
            lambda manifest, rank=rank, data=data: manifest["ranks"][rank]["data"].update(digest=data.whole),
        )


def test_damage_met_halfway_leaves_no_trace_after_the_fallback(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    """Most blocks of step 4 are in the live tensors when the bad one shows; step 2 then replaces them all."""
    damaged, forbidden, older, good = copies(saved, tmp_path, 4)
    for run in (damaged, forbidden, good):
        in_blocks(run / "step-000000004", 4096)
    for run in (damaged, forbidden):
        file = run / "step-000000004" / "rank-00001.safetensors"
        flip_bit(file, 8 * (file.stat().st_size - 10_000))
    shutil.rmtree(older / "step-000000004")
    fell_back = ranks.run(resume_each, 2, saved.to_json(), [str(damaged)], {})
    refused = ranks.run(resume_each, 2, saved.to_json(), [str(forbidden)], {"fallback": False})
    undamaged = ranks.run(resume_each, 2, saved.to_json(), [str(older), str(good)], {})
    for (mine,), (other,), (expected, newer) in zip(fell_back, refused, undamaged, strict=True):
        assert (mine["step"], expected["step"], newer["step"]) == (2, 2, 4)
        assert mine["live"] == expected["live"] != newer["live"]
        assert other["step"] == -1 and "call resume() before" in other["step refused"]
        written = [name for name, digest in other["live"].items() if newer["live"][name] == digest]
        assert any(name.startswith("master/") for name in written), "the damage was not met halfway"


def test_refuses_what_does_not_fit_and_does_not_fall_back(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    runs = copies(saved, tmp_path, len(MISFITS))
    for run, (change, _) in zip(runs, MISFITS.values(), strict=True):
        change(run / "step-000000004")
    for outcomes in ranks.run(resume_each, 2, saved.to_json(), [str(run) for run in runs], {}):
        for (name, (_, expected)), outcome in zip(MISFITS.items(), outcomes, strict=True):
            assert outcome["error"].startswith("ResumeRefused"), f"{name}: {outcome}"
            assert expected in outcome["error"]
            assert outcome["untouched"]


def test_stops_when_no_checkpoint_is_good(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    (run,) = copies(saved, tmp_path, 1)
    for step in (2, 4):
        (run / f"step-{step:09d}" / "rank-00001.safetensors").unlink()
    (outcome,) = ranks.run(resume_each, 2, saved.to_json(), [str(run)], {})[0]
    assert "none of the 2 checkpoints" in outcome["error"]
    assert outcome["untouched"]
    assert sorted(p.name for p in run.iterdir() if p.name.startswith("step-")) == ["step-000000002", "step-000000004"]
