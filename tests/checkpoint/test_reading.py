"""Indices and data files against the manifest, and blocks against their digests: every fault is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.datafile import Way
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.reading import check_data_file, check_ranges, read_index
from resume_kit.errors import CheckpointDamaged
from tests.checkpoints import commit, flip, resign

IMAGE = bytes((7 * i + i // 256) % 256 for i in range(1000))
BLOCK = 64
DIGESTS = digest_image(memoryview(IMAGE), BLOCK)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rank-00003.safetensors"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "x"
    path.write_bytes(IMAGE)
    return path


# -- checking without keeping


@given(ranges=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda p: (min(p), max(p)))))
@settings(max_examples=50, deadline=None)
def test_a_check_reads_the_blocks_of_its_ranges_and_no_others(ranges: list[tuple[int, int]], shared: Path) -> None:
    check_ranges(shared, DIGESTS, ranges)
    touched = DIGESTS.touched(ranges)
    wrong = replace(DIGESTS, blocks=tuple("0" * 32 for _ in DIGESTS.blocks))
    if not touched:
        check_ranges(shared, wrong, ranges)
        return
    with pytest.raises(CheckpointDamaged) as caught:
        check_ranges(shared, wrong, ranges)
    named = [f"the content of bytes {lo:,}..{hi:,} is not what was saved" for lo, hi in map(DIGESTS.span, touched)]
    assert [problem.what for problem in caught.value.problems] == named


@pytest.mark.parametrize("way", get_args(Way))
def test_a_check_names_every_bad_block_and_the_end_of_a_truncated_file_once(way: Way, data: Path) -> None:
    for position in (900, 200, 450):
        flip(data, position, 0)
    sizes: list[int] = []
    with pytest.raises(CheckpointDamaged) as caught:
        check_ranges(data, DIGESTS, [(0, 1000)], way=way, on_block=sizes.append)
    assert sum(sizes) == 1000 and len(sizes) == len(DIGESTS.blocks)
    assert [problem.what.split()[4] for problem in caught.value.problems] == ["192..256", "448..512", "896..960"]
    assert {problem.where for problem in caught.value.problems} == {str(data)}
    os.truncate(data, 500)
    with pytest.raises(CheckpointDamaged) as caught:
        check_ranges(data, DIGESTS, [(448, 1000)], way=way)
    assert [problem.what for problem in caught.value.problems] == ["truncated: it ends at byte 500"]


# -- indices and data files against the manifest


def test_an_index_reads_back_as_it_was(run_dir: Path) -> None:
    directory = commit(run_dir, 7)
    manifest = read_manifest(directory)
    for rank in range(2):
        index = read_index(directory, manifest, rank)
        raw = (directory / names.index_file(rank)).read_bytes()
        assert index.to_bytes() == raw and parse_index(raw, directory) == index
        assert (index.step, index.rank, index.world_size) == (7, rank, 2)
        check_data_file(directory, manifest, rank)


def test_an_index_of_another_size_or_content_is_damage(run_dir: Path) -> None:
    directory = commit(run_dir, 7)
    manifest = read_manifest(directory)
    path = directory / names.index_file(1)
    raw = path.read_bytes()
    for changed, expected in [
        (raw[:-1], f"it has {len(raw) - 1} bytes, the manifest says {len(raw)}"),
        (raw + b"\n", f"it has {len(raw) + 1} bytes"),
        (raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], "its digest is not the one in the manifest"),
    ]:
        path.write_bytes(changed)
        with pytest.raises(CheckpointDamaged, match=rf"rank-00001\.index\.json: {expected}"):
            read_index(directory, manifest, 1)
    path.unlink()
    with pytest.raises(CheckpointDamaged, match="the file is missing"):
        read_index(directory, manifest, 1)


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("step", 6), ("run_id", "ffffffffffff"), ("attempt", 9)])
def test_an_index_of_another_rank_step_or_run_is_told(field: str, value: object, run_dir: Path) -> None:
    """Even where the manifest was made to agree with it."""
    directory = commit(run_dir, 7)
    path = directory / names.index_file(1)
    resign(path, lambda document: document.update({field: value}))
    raw = path.read_bytes()
    resign(
        directory / names.MANIFEST,
        lambda document: document["ranks"][1]["index"].update(bytes=len(raw), digest=canonical.digest(raw)),
    )
    with pytest.raises(CheckpointDamaged, match="it belongs to run"):
        read_index(directory, read_manifest(directory), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"), ("schema", 99), ("tensors", [["a"]]), ("tensors", 3), ("pieces", [[99, "", "", 0, 0]]),
        ("pieces", [[0, "5:1", "0" * 16, 0, 0]]), ("pieces", [[0, "x", "0" * 16, 0, 0]]), ("data", {}), ("data", None),
    ],
)  # fmt: skip
def test_a_signed_index_of_other_types_is_damage(field: str, value: object, run_dir: Path) -> None:
    document = json.loads((commit(run_dir, 7) / names.index_file(0)).read_bytes())
    del document["digest"]
    assert isinstance(parse_index(canonical.sign(document), Path("i")), RankIndex)
    with pytest.raises(CheckpointDamaged):
        parse_index(canonical.sign({**document, field: value}), Path("i"))


def test_a_data_file_of_another_size_or_none_is_damage(run_dir: Path) -> None:
    directory = commit(run_dir, 7)
    manifest = read_manifest(directory)
    path = directory / names.data_file(0)
    size = path.stat().st_size
    for changed, expected in [(size - 1, "truncated: it has"), (size + 1, "too long: it has")]:
        os.truncate(path, changed)
        with pytest.raises(CheckpointDamaged, match=rf"rank-00000\.safetensors: {expected} {changed:,} bytes"):
            check_data_file(directory, manifest, 0)
    path.unlink()
    with pytest.raises(CheckpointDamaged, match="the file is missing"):
        check_data_file(directory, manifest, 0)
