"""What a save holds is the state of its step, whatever the script does while the state is still being copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resume_kit.algebra.fingerprint import MASK
from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import read_manifest
from tests.conftest import Ranks
from tests.jobs import Job, live_digests, text_file
from tests.ranks import RankFailure
from tests.saving.loop import Loop


def resumed_while_saving(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Back to step 2 while the save of step 4, whose copies are slow, is under way; then on from there."""
    loop = Loop(rank, world_size, options, ["slow-copies"])
    loop.steps(2)
    loop.kit.save()
    loop.steps(2)
    state = live_digests(loop.kit)
    loop.kit.save(returns="overlapped")
    loop.resume(at=2)
    back_at = loop.kit.step_number
    loop.steps(1)
    loop.kit.close()
    return {"at": back_at, "state": state}


def test_a_resume_waits_for_the_save_under_way(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), stage=3, save_every=0, buffers=False)
    found = ranks.run(resumed_while_saving, 2, job.to_json())
    assert [rank["at"] for rank in found] == [2, 2]
    run = Path(job.run_dir)
    assert names.committed_steps(run) == [2]
    saved = read_manifest(run / "set-aside" / "step-000000004.attempt-1")
    # A fingerprint is linear: those of all ranks' pieces add up to the tensor's.
    live: dict[str, int] = {}
    for rank in found:
        for piece, value in rank["state"].items():
            key = piece.partition("[")[0]
            if "[" in piece:
                live[key] = (live.get(key, 0) + int(value, 16)) & MASK
    assert {entry.spec.key.kind for entry in saved.tensors} >= {"master", "exp_avg"}
    assert {str(entry.spec.key): int(entry.fingerprint, 16) for entry in saved.tensors} == live


def with_a_teacher(
    rank: int, world_size: int, options: dict[str, Any], faults: list[str], steps: int
) -> tuple[float, float]:
    """Frozen weights that every forward moves, as of a moving average; their sum where it begins and at step 3."""
    loop = Loop(rank, world_size, options, faults)
    frozen = [weight for weight in loop.engine.module.parameters() if not weight.requires_grad]

    def total() -> float:
        return float(sum(weight.detach().double().sum() for weight in frozen))

    first = at_save = total()
    for _ in range(steps):
        with torch.no_grad():
            for weight in frozen:
                weight.mul_(0.9)
        loop.steps(1)
        if loop.kit.step_number == 3:
            at_save = total()
    loop.kit.close()
    return first, at_save


def test_a_frozen_weight_that_a_forward_changes_is_saved_as_of_its_step(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), stage=1, save_every=3, frozen=True)
    saved = ranks.run(with_a_teacher, 2, job.to_json(), ["slow-copies"], 5)
    resumed = ranks.run(with_a_teacher, 2, job.to_json(), [], 0)
    assert [first for first, _ in resumed] == [at_save for _, at_save in saved]

    torn = job.but(run_dir=str(tmp_path / "torn"))
    ranks.run(with_a_teacher, 2, torn.to_json(), ["slow-copies", "no-fence"], 5)
    with pytest.raises(RankFailure, match="not as recorded"):  # nothing but the wait guards them
        ranks.run(with_a_teacher, 2, torn.to_json(), [], 0)
