"""A change of tensor parallelism on the real Megatron engine, read together by the ranks of the node, and proved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import assignment, names
from resume_kit.resuming import neighbours
from tests.checkpoints import flip
from tests.conftest import Ranks
from tests.resharding.stays import Stay, stay
from tests.resharding.travel import LEFT_AT, manifest_of, other_tensors
from tests.resharding.trips import AnyJob, megatron


def stay_together(rank: int, world_size: int, job: AnyJob, least: int, *given: Any) -> Stay:
    """`tests.resharding.stays.stay`, where little is worth sharing too, on any file system."""
    assignment.LEAST_SHARED = least
    neighbours.in_memory = lambda *_: False  # type: ignore[attr-defined]
    return stay(rank, world_size, job, *given)


def test_tensor_parallel_ranks_read_each_block_once_check_it_and_prove_the_tensors(
    ranks: Ranks, tmp_path: Path
) -> None:
    data = tmp_path / "text"
    data.write_bytes(bytes(range(256)) * 60)
    apart, cut = megatron(2), megatron(2, tp=2)
    home = tmp_path / "home"
    ranks.run(stay, 2, apart.job.but(run_dir=str(home), data=str(data)), LEFT_AT, LEFT_AT, timeout=120)
    saved = manifest_of(home)
    read = {}
    for least in (1, 1 << 40):
        run = tmp_path / f"least-{least}"
        shutil.copytree(home, run)
        job = cut.job.but(run_dir=str(run), data=str(data))
        first, second = ranks.run(stay_together, 2, job, least, LEFT_AT, LEFT_AT, timeout=120)
        assert first.resumed_at == second.resumed_at == LEFT_AT and first.rejected == ()
        assert other_tensors(saved, manifest_of(run)) == ()
        read[least] = first.read
    together, alone = read[1], read[1 << 40]
    assert together["wanted_bytes"] == alone["wanted_bytes"]
    assert together["read_bytes"] == together["verified_bytes"] <= 1.05 * together["wanted_bytes"], json.dumps(read)
    assert together["read_bytes"] < 0.8 * alone["read_bytes"], json.dumps(read)


def test_damage_that_one_rank_meets_makes_all_fall_back_and_read_together_again(ranks: Ranks, tmp_path: Path) -> None:
    data, run = tmp_path / "text", tmp_path / "run"
    data.write_bytes(bytes(range(256)) * 60)
    given = {"run_dir": str(run), "data": str(data)}
    for step in (LEFT_AT, LEFT_AT + 1):
        ranks.run(stay, 2, megatron(2).job.but(**given), step, step, timeout=120)
    damaged = run / names.step_directory(LEFT_AT + 1) / names.data_file(1)
    flip(damaged, damaged.stat().st_size // 2, 3)
    for found in ranks.run(stay_together, 2, megatron(2, tp=2).job.but(**given), 1, LEFT_AT, timeout=120):
        assert found.resumed_at == LEFT_AT and damaged.name in str(found.rejected)
        assert found.read["verified_bytes"] == found.read["read_bytes"] <= 1.05 * found.read["wanted_bytes"]
