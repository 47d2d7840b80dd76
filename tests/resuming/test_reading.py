"""Reading into live tensors: a rank's own bytes from real files, whole blocks checked, and a diagnosis of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint import files, names, readplan
from resume_kit.checkpoint.blocks import BLOCK_BYTES, digest_image
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.errors import CheckpointDamaged
from resume_kit.planning.reads import StoredPieces
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.reading import read_into, verify_unread
from resume_kit.resuming.wanted import Want
from tests.checkpoints import flip
from tests.reading import read


@pytest.fixture(autouse=True)
def page_of_one_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or these small blocks would all be read whole."""
    monkeypatch.setattr(readplan, "PAGE", 1)


KINDS = ("master", "exp_avg", "exp_avg_sq")
ROWS, COLUMNS = 64, 48
BLOCK = 512

Tensors = dict[TensorSpec, np.ndarray]


def tensors(rows: int = ROWS, columns: int = COLUMNS) -> Tensors:
    generator = np.random.default_rng(5)
    return {
        TensorSpec(TensorKey(kind, "w"), "float32", (rows, columns)): generator.random((rows, columns), np.float32)
        for kind in KINDS
    }


def slices(spec: TensorSpec, parts: int, part: int) -> Box:
    """The columns of one tensor-parallel rank of `parts`."""
    rows, columns = spec.shape
    return Box((0, columns * part // parts), (rows, columns * (part + 1) // parts))


def save(directory: Path, saved: Tensors, parts: int, block: int) -> list[RankIndex]:
    """A checkpoint of `parts` ranks, each with its columns of every tensor."""
    indices = []
    for rank in range(parts):
        layout = plan_file([(spec, slices(spec, parts, rank)) for spec in saved], {})
        image = bytearray(layout.header) + b"".join(saved[s.spec][s.box.slices].tobytes() for s in layout.slots)
        files.write_image(directory / names.data_file(rank), memoryview(image))
        pieces = tuple(StoredPiece(s.spec, s.box, "0" * 16, s.offset, s.nbytes) for s in layout.slots)
        digests = digest_image(memoryview(image), block)
        indices.append(RankIndex("run", 1, 7, rank, parts, digests, pieces, {}, {}))
    return indices


def order_of(indices: Sequence[RankIndex], wants: Sequence[Want]) -> ReadOrder:
    stored = StoredPieces(indices)
    parts = tuple((want, tuple(stored.parts(want.spec.key, want.box))) for want in wants)
    return ReadOrder(parts, {index.rank: index for index in indices})


def columns_of(saved: Tensors, parts: int, part: int) -> list[Want]:
    return [Want(spec, slices(spec, parts, part)) for spec in saved]


def assert_read(directory: Path, order: ReadOrder, saved: Tensors) -> None:
    result = read(directory, order)
    for want, _ in order.wants:
        found = result.get(want.spec.key, want.box)
        assert found is not None
        assert np.array_equal(found.numpy(), saved[want.spec][want.box.slices].reshape(-1))


# -- what is read, and what of it is checked


@pytest.mark.parametrize("block", [BLOCK, BLOCK_BYTES])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_topology_reads_its_own_file_once_and_checks_every_byte(rank: int, block: int, tmp_path: Path) -> None:
    saved = tensors()
    indices = save(tmp_path, saved, 2, block)
    order = order_of(indices, columns_of(saved, 2, rank))
    assert_read(tmp_path, order, saved)
    account = read(tmp_path, order).account
    size = (tmp_path / names.data_file(rank)).stat().st_size
    assert account.read_bytes == account.verified_bytes == size == indices[rank].data.size
    assert account.wanted_bytes == len(KINDS) * ROWS * COLUMNS // 2 * 4 and not account.unverified


@pytest.mark.parametrize(("saved_on", "parts"), [(2, 1), (2, 4), (2, 3), (4, 2), (4, 16), (1, 48), (3, 2)])
@pytest.mark.parametrize("block", [BLOCK, BLOCK_BYTES])
def test_another_number_of_slices_reads_hardly_more_than_is_wanted(
    saved_on: int, parts: int, block: int, tmp_path: Path
) -> None:
    """The headers of files of which all is wanted come on top: here they are as large as a third of the data."""
    saved = tensors()
    indices = save(tmp_path, saved, saved_on, block)
    for part in {0, parts - 1}:
        wants = columns_of(saved, parts, part)
        order = order_of(indices, wants)
        assert_read(tmp_path, order, saved)
        account = read(tmp_path, order).account
        wanted = sum(want.box.numel * 4 for want in wants)
        whole = [
            index
            for index in indices
            if all(slices(want.spec, parts, part).contains(slices(want.spec, saved_on, index.rank)) for want in wants)
        ]
        headers = sum(index.data.size - len(KINDS) * ROWS * COLUMNS // saved_on * 4 for index in whole)
        assert account.wanted_bytes == wanted
        assert wanted <= account.read_bytes <= 1.05 * wanted + headers
        assert account.verified_bytes <= account.read_bytes


def test_a_flat_range_of_another_split_reads_hardly_more_than_is_wanted(tmp_path: Path) -> None:
    saved = tensors()
    indices = save(tmp_path, saved, 2, BLOCK)
    wants = [Want(spec, box) for spec in saved for box in boxes_of_flat_range(spec.shape, 1001, 2007)]
    order = order_of(indices, wants)
    assert_read(tmp_path, order, saved)
    account = read(tmp_path, order).account
    assert account.wanted_bytes == len(KINDS) * 1006 * 4
    assert account.read_bytes <= 1.05 * account.wanted_bytes


def test_the_same_box_wanted_twice_is_read_once(tmp_path: Path) -> None:
    saved = tensors()
    indices = save(tmp_path, saved, 2, BLOCK)
    wants = columns_of(saved, 2, 1)
    once, twice = (read(tmp_path, order_of(indices, wanted)).account for wanted in (wants, [*wants, *wants]))
    assert once == twice


def test_a_weight_that_is_stored_only_in_part_is_left_to_its_master(tmp_path: Path) -> None:
    """One saving rank proved the cast and stored nothing: half a box must never pass for the whole."""
    saved = tensors()
    first, second = save(tmp_path, saved, 2, BLOCK)
    cast = replace(second, pieces=tuple(replace(piece, offset=None, nbytes=0) for piece in second.pieces))
    wants = [Want(spec, Box.whole(spec.shape), required=False) for spec in saved]
    result = read(tmp_path, order_of([first, cast], wants))
    assert all(result.get(want.spec.key, want.box) is None for want in wants)
    assert result.account.read_bytes == 0


# -- damage


def test_every_flipped_bit_of_the_own_file_is_seen_header_included(tmp_path: Path) -> None:
    saved = tensors()
    order = order_of(save(tmp_path, saved, 2, BLOCK), columns_of(saved, 2, 1))
    path = tmp_path / names.data_file(1)
    for position in [0, 7, 100, *range(4000, path.stat().st_size, 1777), path.stat().st_size - 1]:
        flip(path, position, 3)
        start = position // BLOCK * BLOCK
        with pytest.raises(CheckpointDamaged, match=rf"rank-00001\.safetensors: the content of bytes {start:,}\.\."):
            read(tmp_path, order)
        flip(path, position, 3)
    read(tmp_path, order)


def test_a_flipped_bit_in_a_block_read_in_part_is_written_and_found_by_the_diagnosis(tmp_path: Path) -> None:
    saved = tensors()
    indices = save(tmp_path, saved, 2, BLOCK)
    order = order_of(indices, columns_of(saved, 8, 5))
    path = tmp_path / names.data_file(1)
    account = read(tmp_path, order).account
    assert account.unverified and {file for file, _, _ in account.unverified} == {path.name}
    verify_unread(tmp_path, order, account)

    piece = indices[1].pieces[0]
    assert piece.offset is not None
    row = (COLUMNS // 2) * 4
    position = piece.offset + 30 * row + (COLUMNS // 8) * 4 + 1  # a column that part 5 of 8 wants
    flip(path, position, 6)
    result = read(tmp_path, order)
    found = result.get(piece.key, slices(piece.spec, 8, 5))
    assert found is not None
    expected = saved[piece.spec][slices(piece.spec, 8, 5).slices].reshape(-1)
    assert int((found.numpy() != expected).sum()) == 1
    start = position // BLOCK * BLOCK
    with pytest.raises(CheckpointDamaged) as caught:
        verify_unread(tmp_path, order, result.account)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert problem.what == f"the content of bytes {start:,}..{start + BLOCK:,} is not what was saved"


def test_the_diagnosis_names_the_damage_of_all_files_and_looks_at_no_other_block(tmp_path: Path) -> None:
    saved = tensors()
    indices = save(tmp_path, saved, 2, BLOCK)
    wants = [Want(spec, Box((0, 20), (ROWS, 28))) for spec in saved]
    order = order_of(indices, wants)
    account = read(tmp_path, order).account
    for rank in range(2):
        flip(tmp_path / names.data_file(rank), 10, 0)  # in the header, of which nothing was wanted
    verify_unread(tmp_path, order, account)
    for rank in range(2):
        flip(tmp_path / names.data_file(rank), 4096 + 5000, 0)
    with pytest.raises(CheckpointDamaged) as caught:
        verify_unread(tmp_path, order, account)
    assert [Path(problem.where).name for problem in caught.value.problems] == [names.data_file(r) for r in range(2)]
    (tmp_path / names.data_file(0)).unlink()
    with pytest.raises(CheckpointDamaged, match=r"rank-00000\.safetensors: cannot be opened"):
        verify_unread(tmp_path, order, account)


# -- live memory


def test_every_tensor_that_holds_a_box_is_filled_and_its_bytes_are_read_once(tmp_path: Path) -> None:
    saved = tensors()
    wants = columns_of(saved, 2, 1)
    order = order_of(save(tmp_path, saved, 2, BLOCK), wants)
    places = {(want.spec.key, want.box): [torch.zeros(want.box.numel) for _ in range(2)] for want in wants}
    account = read_into(tmp_path, order, places)
    assert account == read(tmp_path, order).account
    for want in wants:
        for found in places[want.spec.key, want.box]:
            assert np.array_equal(found.numpy(), saved[want.spec][want.box.slices].reshape(-1))


def test_what_has_no_live_memory_is_not_read(tmp_path: Path) -> None:
    """Moments that a policy drops."""
    saved = tensors()
    wants = columns_of(saved, 2, 1)
    order = order_of(save(tmp_path, saved, 2, BLOCK), wants)
    only = wants[0]
    found = torch.zeros(only.box.numel)
    account = read_into(tmp_path, order, {(only.spec.key, only.box): [found]})
    assert np.array_equal(found.numpy(), saved[only.spec][only.box.slices].reshape(-1))
    assert account.wanted_bytes == found.nbytes and account.read_bytes <= 1.05 * found.nbytes
    assert read_into(tmp_path, order, {}).read_bytes == 0


def test_live_memory_of_another_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    saved = tensors()
    first, second, *_ = wants = columns_of(saved, 2, 1)
    order = order_of(save(tmp_path, saved, 2, BLOCK), wants)
    good, short = torch.zeros(first.box.numel), torch.zeros(second.box.numel, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"exp_avg/w \[.*\] is live with 3,072 bytes, not 6,144"):
        read_into(tmp_path, order, {(first.spec.key, first.box): [good], (second.spec.key, second.box): [short]})
    assert not good.any()


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes. Files read with read calls do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("parts", [2, 3, 16])
def test_beside_the_live_tensors_there_is_one_window_for_each_thread(parts: int, readers: int, tmp_path: Path) -> None:
    """Two files of 54 MB: all of one (half the columns), two thirds of it, and an eighth of it in short runs."""
    saved = tensors(4096, 2200)
    order = order_of(save(tmp_path, saved, 2, BLOCK_BYTES), columns_of(saved, parts, 0))
    wanted = sum(want.box.numel * 4 for want, _ in order.wants)
    del saved
    places = {(want.spec.key, want.box): [torch.ones(want.box.numel)] for want, _ in order.wants}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    account = read_into(tmp_path, order, places, readers=readers)
    peak = resident("VmHWM") - before
    assert account.wanted_bytes == wanted
    assert peak < readers * BLOCK_BYTES + (8 << 20)
