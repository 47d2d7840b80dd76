"""Data files are plain safetensors files: the library itself reads them, and gets the same arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint.layout import ALIGNMENT, FileLayout, entry_name, plan_file, read_header
from resume_kit.checkpoint.records import DTYPES, TensorKey, TensorSpec
from resume_kit.errors import UsageError

METADATA = {"format": "resume_kit", "step": "7"}
Piece = tuple[TensorSpec, Box]


def spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(TensorKey("master", name), dtype, shape)


def image_of(layout: FileLayout, data: dict[Piece, bytes]) -> bytes:
    image = bytearray(layout.size)
    image[: len(layout.header)] = layout.header
    for slot in layout.slots:
        image[slot.offset : slot.offset + slot.nbytes] = data[slot.spec, slot.box]
    return bytes(image)


def fill(pieces: list[Piece]) -> dict[Piece, bytes]:
    """Bytes of each piece: small ones and twos, which are valid elements of every dtype."""
    generator = np.random.default_rng(0)
    return {
        (spec, box): (
            generator.integers(0, 2, box.numel, np.uint8) if spec.dtype == "bool" else generator.integers(
                0, 3, box.numel * spec.itemsize, np.uint8)
        ).tobytes()
        for spec, box in pieces
    }  # fmt: skip


def written(tmp_path: Path, pieces: list[Piece]) -> tuple[Path, dict[Piece, bytes]]:
    data = fill(pieces)
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(image_of(plan_file(pieces, METADATA), data))
    return path, data


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_the_same_bytes_for_every_dtype(dtype: str, tmp_path: Path) -> None:
    whole = spec("w", dtype, (6, 5))
    pieces = [(whole, box) for box in boxes_of_flat_range((6, 5), 3, 28)]
    pieces += [(spec("scalar", dtype, ()), Box((), ())), (spec("void", dtype, (0, 4)), Box.whole((0, 4)))]
    path, data = written(tmp_path, pieces)
    found = safetensors.torch.load_file(path)
    assert set(found) == {entry_name(*piece) for piece in pieces}
    for (piece_spec, box), raw in data.items():
        tensor = found[entry_name(piece_spec, box)]
        assert tensor.dtype == getattr(torch, dtype) and tuple(tensor.shape) == box.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw if raw else tensor.numel() == 0


def test_arrays_come_back_as_they_are_bf16_too(tmp_path: Path) -> None:
    master = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    low = master.to(torch.bfloat16)
    specs = {
        "master": TensorSpec(TensorKey("master", "w"), "float32", (8, 6)),
        "param": TensorSpec(TensorKey("param", "w"), "bfloat16", (8, 6)),
    }
    upper, lower = Box((0, 0), (5, 6)), Box((5, 0), (8, 6))
    pieces = [(s, box) for s in specs.values() for box in (upper, lower)]
    source = {"master": master, "param": low}
    data = {(s, b): source[s.key.kind][b.slices].contiguous().view(torch.uint8).numpy().tobytes() for s, b in pieces}
    path = tmp_path / "x.safetensors"
    path.write_bytes(image_of(plan_file(pieces, METADATA), data))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
        for kind, tensor in source.items():
            parts = [file.get_tensor(f"{kind}/w[{box}]") for box in ("0:5,0:6", "5:8,0:6")]
            assert torch.equal(torch.cat(parts).view(torch.uint8), tensor.view(torch.uint8))
    with safetensors.safe_open(path, framework="np") as file:
        assert np.array_equal(file.get_tensor("master/w[0:5,0:6]"), master[:5].numpy())


@st.composite
def many_pieces(draw: st.DrawFn) -> list[Piece]:
    pieces: list[Piece] = []
    for number in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        tensor = spec(f"layers.{number}", draw(st.sampled_from(sorted(DTYPES))), shape)
        cut = draw(st.integers(0, int(np.prod(shape))))
        pieces += [(tensor, box) for box in boxes_of_flat_range(shape, 0, cut)]
    return draw(st.permutations(pieces))


@given(many_pieces())
@settings(max_examples=150, deadline=None)
def test_pieces_lie_without_holes_each_on_its_own_alignment(pieces: list[Piece]) -> None:
    layout = plan_file(pieces, METADATA)
    assert len(layout.header) % ALIGNMENT == 0
    assert {(slot.spec, slot.box) for slot in layout.slots} == set(pieces) and len(layout.slots) == len(pieces)
    position = len(layout.header)
    for slot in layout.slots:
        assert slot.offset == position and slot.offset % slot.spec.itemsize == 0
        assert slot.nbytes == slot.box.numel * slot.spec.itemsize
        position += slot.nbytes
    assert layout.size == position
    found = safetensors.torch.load(image_of(layout, fill(pieces)))  # it refuses holes and overlaps
    assert set(found) == {entry_name(*piece) for piece in pieces}


def test_the_library_does_refuse_a_hole() -> None:
    """What the test above relies on."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}).encode()
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(len(header).to_bytes(8, "little") + header + b"xy")


@pytest.mark.parametrize("count", [0, 1, 30, 60, 200])
def test_data_starts_on_the_first_free_page(count: int) -> None:
    layout = plan_file([(spec(f"weight.{i}", "float32", (2,)), Box.whole((2,))) for i in range(count)], METADATA)
    length = int.from_bytes(layout.header[:8], "little")
    assert 8 + length == len(layout.header) and len(layout.header) % ALIGNMENT == 0
    assert len(layout.header) - (8 + len(layout.header[8:].rstrip(b" "))) < ALIGNMENT


def test_the_same_piece_twice_is_refused() -> None:
    tensor = spec("w", "float32", (4,))
    two = [(tensor, Box((0,), (2,))), (tensor, Box((2,), (4,)))]
    assert len(plan_file(two, {}).slots) == 2
    with pytest.raises(ValueError, match=r"master/w\[2:4\] is laid out twice"):
        plan_file([*two, two[1]], {})


def test_a_dtype_without_a_code_has_no_spec() -> None:
    with pytest.raises(UsageError, match="master/w has dtype complex128, which the format has no place for"):
        spec("w", "complex128", (1,))


def test_the_header_reads_back() -> None:
    pieces = [(spec("a", "int16", (3,)), Box.whole((3,))), (spec("b", "float64", (2,)), Box.whole((2,)))]
    header = read_header(memoryview(image_of(plan_file(pieces, METADATA), fill(pieces))))
    assert header == {
        "master/b[0:2]": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
        "master/a[0:3]": {"dtype": "I16", "shape": [3], "data_offsets": [16, 22]},
    }


@pytest.mark.parametrize(
    "raw", [b"", b"\x10\0\0", (99).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{x"]
)
def test_what_is_no_header_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - three causes, one class
        read_header(memoryview(raw))
