"""Reading parts of a checkpoint: whole blocks only, each checked, and every fault named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.reading import check_data_file, read_index, read_ranges
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


# -- data


@given(ranges=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda p: (min(p), max(p)))))
@settings(max_examples=100, deadline=None)
def test_wanted_bytes_are_those_of_the_file(ranges: list[tuple[int, int]], shared: Path) -> None:
    read = read_ranges(shared, DIGESTS, ranges)
    for start, stop in ranges:
        if start < stop:
            assert bytes(read.view(start, stop - start)) == IMAGE[start:stop]
    touched = {byte // BLOCK for start, stop in ranges for byte in range(start, stop)}
    assert sum(stop - start for start, stop, _ in read.runs) == sum(
        DIGESTS.span(block)[1] - DIGESTS.span(block)[0] for block in touched
    )


def test_bytes_that_were_not_read_are_not_there(data: Path) -> None:
    read = read_ranges(data, DIGESTS, [(70, 80), (300, 310)])
    assert bytes(read.view(64, 64)) == IMAGE[64:128]  # the whole block came
    for offset, count in [(63, 2), (127, 2), (0, 1), (70, 240)]:
        with pytest.raises(KeyError, match="were not read"):
            read.view(offset, count)


@pytest.mark.parametrize("position", [0, 63, 64, 500, 999])
def test_a_flipped_bit_is_seen_by_who_reads_its_block_and_by_nobody_else(position: int, data: Path) -> None:
    flip(data, position, 5)
    start, stop = DIGESTS.span(position // BLOCK)
    with pytest.raises(
        CheckpointDamaged, match=rf"rank-00003\.safetensors: the content of bytes {start:,}\.\.{stop:,}"
    ):
        read_ranges(data, DIGESTS, [(start, start + 1)])
    others = [(0, start), (stop, 1000)]
    assert sum(stop - start for start, stop, _ in read_ranges(data, DIGESTS, others).runs) == 1000 - (stop - start)


def test_the_first_of_several_bad_blocks_is_named(data: Path) -> None:
    for position in (900, 200, 450):
        flip(data, position, 0)
    with pytest.raises(CheckpointDamaged, match=r"bytes 192\.\.256"):
        read_ranges(data, DIGESTS, [(0, 1000)])


@pytest.mark.parametrize("size", [0, 63, 500, 999])
def test_a_truncated_file_is_named_with_its_end(size: int, data: Path) -> None:
    os.truncate(data, size)
    with pytest.raises(CheckpointDamaged, match=f"truncated: it ends at byte {size}"):
        read_ranges(data, DIGESTS, [(0, 1000)])


def test_a_file_that_cannot_be_opened_or_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="gone: cannot be opened: No such file"):
        read_ranges(tmp_path / "gone", DIGESTS, [(0, 1)])
    with pytest.raises(CheckpointDamaged, match="read failed at byte 64: Is a directory"):
        read_ranges(tmp_path, DIGESTS, [(64, 65)])


def test_no_descriptor_is_left_open_by_a_failure(data: Path) -> None:
    flip(data, 0, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(CheckpointDamaged):
            read_ranges(data, DIGESTS, [(0, 1)])
    assert len(os.listdir("/proc/self/fd")) == before


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
        ("format", "other"), ("schema", 2), ("tensors", [["a"]]), ("tensors", 3), ("pieces", [[99, "", "", 0, 0]]),
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
