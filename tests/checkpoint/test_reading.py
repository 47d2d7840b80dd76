"""Reading parts of a checkpoint: what the plan says arrives, whole blocks are checked, and every fault is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.reading import (
    ReadAccount,
    allocate,
    carry_out,
    check_data_file,
    check_ranges,
    read_index,
)
from resume_kit.checkpoint.readplan import ReadPlan, Source, plan_reads
from resume_kit.checkpoint.transfers import Transfer
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


def wanted(*ranges: tuple[int, int], stored: int = 1000) -> tuple[ReadPlan, list[memoryview]]:
    """A plan that reads each range into a buffer of its own, and the buffers."""
    transfers = tuple(Transfer(start, number, 0, stop - start) for number, (start, stop) in enumerate(ranges))
    buffers = [memoryview(bytearray(stop - start)) for start, stop in ranges]
    return plan_reads([Source("rank-00003.safetensors", DIGESTS, stored, transfers)]), buffers


# -- carrying out a plan


def test_wanted_bytes_are_those_of_the_file_and_all_are_accounted_for(data: Path) -> None:
    ranges = [(64, 256), (300, 310), (500, 500 + 3), (640, 704)]
    plan, buffers = wanted(*ranges)
    account = carry_out(plan, data.parent, buffers)
    assert [bytes(buffer) for buffer in buffers] == [IMAGE[start:stop] for start, stop in ranges]
    assert account == ReadAccount(
        wanted_bytes=269,
        read_bytes=269,
        verified_bytes=256,
        unverified=(("rank-00003.safetensors", 256, 320), ("rank-00003.safetensors", 448, 512)),
    )


def test_neighbours_that_were_read_in_part_are_one_range(data: Path) -> None:
    plan, buffers = wanted((40, 80), (140, 150))
    assert carry_out(plan, data.parent, buffers).unverified == (("rank-00003.safetensors", 0, 192),)


@pytest.mark.parametrize("position", [0, 63, 64, 500, 999])
def test_a_flipped_bit_is_seen_by_who_reads_its_block_whole_and_by_nobody_else(position: int, data: Path) -> None:
    flip(data, position, 5)
    start, stop = DIGESTS.span(position // BLOCK)
    named = rf"rank-00003\.safetensors: the content of bytes {start:,}\.\.{stop:,} is not what was saved"
    plan, buffers = wanted((start, stop))
    with pytest.raises(CheckpointDamaged, match=named):
        carry_out(plan, data.parent, buffers)
    others = [(lo, hi) for lo, hi in [(0, start), (stop, 1000)] if lo < hi]
    plan, buffers = wanted(*others, stored=10_000)
    account = carry_out(plan, data.parent, buffers)
    assert account.verified_bytes == 1000 - (stop - start) and not account.unverified


def test_nothing_of_a_bad_block_is_passed_on(data: Path) -> None:
    flip(data, 70, 0)
    plan, buffers = wanted((0, 64), (64, 128))
    with pytest.raises(CheckpointDamaged):
        carry_out(plan, data.parent, buffers)
    assert bytes(buffers[0]) == IMAGE[:64] and bytes(buffers[1]) == bytes(64)


def test_a_flipped_bit_in_a_block_that_is_read_in_part_is_passed_on(data: Path) -> None:
    """That is why the account names the block: digests cannot tell, fingerprints will."""
    flip(data, 70, 0)
    plan, buffers = wanted((70, 72))
    account = carry_out(plan, data.parent, buffers)
    assert bytes(buffers[0]) == bytes([IMAGE[70] ^ 1, IMAGE[71]])
    assert account.verified_bytes == 0 and account.unverified == (("rank-00003.safetensors", 64, 128),)


@pytest.mark.parametrize("size", [0, 63, 500, 999])
@pytest.mark.parametrize("ranges", [[(0, 1000)], [(3, 7), (700, 730), (990, 1000)]])
def test_a_truncated_file_is_named_with_its_end(size: int, ranges: list[tuple[int, int]], data: Path) -> None:
    os.truncate(data, size)
    plan, buffers = wanted(*ranges)
    with pytest.raises(CheckpointDamaged, match=f"truncated: it ends at byte {size}"):
        carry_out(plan, data.parent, buffers)


def test_a_file_that_cannot_be_opened_or_read_is_named(tmp_path: Path) -> None:
    plan, buffers = wanted((64, 65))
    with pytest.raises(CheckpointDamaged, match=r"rank-00003\.safetensors: cannot be opened: No such file"):
        carry_out(plan, tmp_path, buffers)
    (tmp_path / "rank-00003.safetensors").mkdir()
    with pytest.raises(CheckpointDamaged, match="read failed at byte 64: Is a directory"):
        carry_out(plan, tmp_path, buffers)


def test_no_descriptor_is_left_open_by_a_failure(data: Path) -> None:
    flip(data, 0, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        plan, buffers = wanted((0, 64))
        with pytest.raises(CheckpointDamaged):
            carry_out(plan, data.parent, buffers)
        with pytest.raises(CheckpointDamaged):
            check_ranges(data, DIGESTS, [(0, 1)])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("nbytes", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (3 << 20) + 1])
def test_memory_is_of_the_asked_size_and_large_memory_starts_on_a_page(nbytes: int) -> None:
    memory = allocate(nbytes)
    assert (memory.nbytes, memory.itemsize, memory.readonly) == (nbytes, 1, False)
    if nbytes >= 1 << 20:
        assert np.frombuffer(memory, np.uint8).ctypes.data % 4096 == 0


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


@pytest.mark.parametrize("cached", [True, False])
def test_a_check_names_every_bad_block_and_the_end_of_a_truncated_file_once(cached: bool, data: Path) -> None:
    for position in (900, 200, 450):
        flip(data, position, 0)
    with pytest.raises(CheckpointDamaged) as caught:
        check_ranges(data, DIGESTS, [(0, 1000)], cached=cached)
    assert [problem.what.split()[4] for problem in caught.value.problems] == ["192..256", "448..512", "896..960"]
    assert {problem.where for problem in caught.value.problems} == {str(data)}
    os.truncate(data, 500)
    with pytest.raises(CheckpointDamaged) as caught:
        check_ranges(data, DIGESTS, [(448, 1000)], cached=cached)
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
