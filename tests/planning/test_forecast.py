"""The forecast of a resume is what the resume then reads: on real engines, from a real checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.pages import filled
from resume_kit.checkpoint.reading import read_index
from resume_kit.checkpoint.sharing import MOST_READERS, MOST_WINDOWS
from resume_kit.cli.planning import missing_bytes
from resume_kit.planning.forecast import forecast
from resume_kit.planning.layouts.topology import ZeroTopology
from tests.checkpoints import commit
from tests.conftest import Ranks
from tests.jobs import Job, text_file, train


def reads_of(rank: int, world_size: int, options: dict[str, Any], checkpoint: str) -> tuple[int, int, list[int]]:
    """Bytes, parts and files that the engine of this rank does read."""
    from resume_kit.engines.deepspeed.adapter import DeepSpeedAdapter
    from resume_kit.resuming.preflight import plan_reading
    from tests.jobs import build
    from tests.reading import read

    engine, loader = build(rank, world_size, Job(**options))
    directory = Path(checkpoint)
    order = plan_reading(directory, read_manifest(directory), DeepSpeedAdapter(engine), rank)
    account = read(directory, order).account
    parts = [part for _, parts in order.wants for part in parts]
    loader.close()
    return account.wanted_bytes, len(parts), sorted({part.rank for part in parts})


def test_portions_of_tensors_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = commit(tmp_path, 10)
    manifest = read_manifest(directory)
    indices = [read_index(directory, manifest, rank) for rank in range(2)]
    once = forecast(manifest, indices, ZeroTopology(world_size=3)).plan
    monkeypatch.setattr("resume_kit.planning.forecast._PORTION", 1)
    piecemeal = forecast(manifest, indices, ZeroTopology(world_size=3)).plan
    assert once.read.tolist() == piecemeal.read.tolist() and once.parts.tolist() == piecemeal.parts.tolist()
    assert [once.files_of(rank) for rank in range(3)] == [piecemeal.files_of(rank) for rank in range(3)]


def test_bytes_that_no_file_holds_are_named_by_rank(tmp_path: Path) -> None:
    directory = commit(tmp_path, 10)
    manifest = read_manifest(directory)
    found = forecast(manifest, [read_index(directory, manifest, 0)], ZeroTopology(world_size=2))
    assert found.plan.missing[0] < found.plan.missing[1]
    (problem,) = missing_bytes(found)[-1:]
    assert (problem.check, problem.where) == ("ownership", "rank 1")
    assert f"{found.plan.missing[1]:,} bytes" in problem.what


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        pytest.param((3, 2), (3, 3), id="ZeRO-3 from 2 to 3 ranks"),
        pytest.param((3, 3), (1, 2), id="ZeRO-3 on 3 to ZeRO-1 on 2"),
        pytest.param((2, 2), (3, 4), id="ZeRO-2 on 2 to ZeRO-3 on 4"),
    ],
)
def test_the_engine_reads_what_was_forecast(
    ranks: Ranks, tmp_path: Path, saved: tuple[int, int], live: tuple[int, int]
) -> None:
    job = Job(
        run_dir=str(tmp_path / "run"),
        stage=saved[0],
        steps=2,
        save_every=2,
        frozen=True,
        layers=1,
        data=text_file(tmp_path),
    )
    ranks.run(train, saved[1], job.to_json())
    directory = tmp_path / "run" / names.step_directory(2)
    manifest = read_manifest(directory)
    indices = [read_index(directory, manifest, rank) for rank in range(saved[1])]
    found = forecast(manifest, indices, ZeroTopology(stage=live[0], world_size=live[1]))
    reads = ranks.run(reads_of, live[1], job.but(stage=live[0]).to_json(), str(directory))
    assert [row[0] for row in reads] == found.plan.read.tolist()
    assert [row[1] for row in reads] == found.plan.parts.tolist()
    assert [row[2] for row in reads] == [found.plan.files_of(rank) for rank in range(live[1])]
    assert not found.plan.missing.any()
    block = max(min(index.data.block_bytes, index.data.size) for index in indices)
    most = MOST_READERS + (MOST_WINDOWS if live[1] > 1 else 0)
    assert found.peak_host_bytes.tolist() == [filled(block) * most] * live[1]
