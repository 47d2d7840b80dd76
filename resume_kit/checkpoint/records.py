"""The plain types that manifest, index and planning share."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from resume_kit.errors import UsageError

#: dtype name (torch's, without the prefix) → (safetensors code, bytes per element)
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "uint16": ("U16", 2),
    "uint32": ("U32", 4),
    "uint64": ("U64", 8),
    "bool": ("BOOL", 1),
    "complex64": ("C64", 8),
}


class TensorKey(NamedTuple):
    """What a logical tensor is called: its kind (param, master, exp_avg, buffer, …) and its global name."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A logical tensor, free of any parallel layout. `shape` is the global shape in elements."""

    key: TensorKey
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"{self.key} has dtype {self.dtype}, which the format has no place for")

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype][1]

    def __str__(self) -> str:
        return f"{self.key} {self.dtype}{list(self.shape)}"
