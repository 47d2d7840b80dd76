"""The exact image of a data file: a plain safetensors file whose pieces lie where the arena stages them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.records import DTYPES, TensorSpec

#: The data section starts on a page, as O_DIRECT asks for.
ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a piece lies in the file: absolute byte offset and size."""

    spec: TensorSpec
    box: Box
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Header bytes, the slots behind it without holes, and the file's size in bytes."""

    header: bytes
    slots: tuple[Slot, ...]
    size: int

    def relabelled(self, metadata: dict[str, str]) -> bytes:
        """The header with other metadata. ValueError where it would take other room, and move the pieces."""
        entries = json.loads(self.header[8:])
        header = _header({**entries, "__metadata__": metadata})
        if len(header) != len(self.header):
            raise ValueError("the metadata does not fit the header's room")
        return header


def entry_name(spec: TensorSpec, box: Box) -> str:
    """Name of a piece inside the safetensors file: ``exp_avg/model.norm.weight[0:64]``."""
    return f"{spec.key}[{box}]"


def plan_file(pieces: Iterable[tuple[TensorSpec, Box]], metadata: dict[str, str]) -> FileLayout:
    """Lay `pieces` out as one safetensors file.

    The format allows no holes, so pieces go by falling element size: each is then aligned to its own element.
    Two pieces of the same tensor and box raise ValueError.
    """
    ordered = sorted(pieces, key=lambda p: -p[0].itemsize)
    entries: dict[str, object] = {"__metadata__": metadata}
    position, sizes = 0, []
    for spec, box in ordered:
        nbytes = box.numel * spec.itemsize
        name = entry_name(spec, box)
        if name in entries:
            raise ValueError(f"{name} is laid out twice")
        entries[name] = {
            "dtype": DTYPES[spec.dtype][0],
            "shape": list(box.shape),
            "data_offsets": [position, position + nbytes],
        }
        sizes.append((position, nbytes))
        position += nbytes
    header = _header(entries)
    slots = tuple(
        Slot(spec, box, len(header) + start, nbytes)
        for (spec, box), (start, nbytes) in zip(ordered, sizes, strict=True)
    )
    return FileLayout(header, slots, len(header) + position)


def _header(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


def read_header(image: memoryview) -> dict[str, dict[str, object]]:
    """The entries of a safetensors file from its first bytes; ValueError when they are not one."""
    if len(image) < 8:
        raise ValueError("too short for a safetensors header")
    length = int.from_bytes(image[:8], "little")
    if 8 + length > len(image):
        raise ValueError("the safetensors header is cut off")
    entries = json.loads(bytes(image[8 : 8 + length]))
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("the safetensors header is not a table of entries")
    entries.pop("__metadata__", None)
    return entries
