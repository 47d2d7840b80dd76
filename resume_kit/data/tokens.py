"""Fixed-length training samples out of one flat array of tokens."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from resume_kit.errors import UsageError

TokenArray = npt.NDArray[Any]

_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages"})
_SEPARATOR = b"\0"
_SCAN_TOKENS = 1 << 22


def standard_library_path() -> Path:
    """The folder of the running Python's standard library: a text corpus that is always at hand."""
    return Path(sysconfig.get_path("stdlib"))


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Map-style dataset of non-overlapping windows of `sequence_length` tokens; a shorter tail is left out.

    An item is dict(input_ids=int64 [sequence_length], labels=the same ids): the Hugging Face causal LM
    convention, where the model shifts the labels.

    Raises UsageError when tokens is not a 1-D integer array, sequence_length < 2, there are too few tokens
    for one sample, or byte tokens are not uint8.
    """

    def __init__(self, tokens: TokenArray, *, sequence_length: int, tokenizer: str) -> None:
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; give a 1-D array of integers")
        if tokenizer == "bytes" and tokens.dtype != np.uint8:
            raise UsageError(f"byte tokens are uint8, not {tokens.dtype}; name the tokenizer that made them")
        if sequence_length < 2:
            raise UsageError(f"sequence_length is {sequence_length}; a sample needs at least 2 tokens")
        if len(tokens) < sequence_length:
            raise UsageError(
                f"{len(tokens)} tokens are too few for one sample of sequence_length {sequence_length}; "
                "give more text or a shorter sequence_length"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.tokenizer = tokenizer

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        *,
        sequence_length: int,
        tokenizer: str = "bytes",
        suffixes: Sequence[str] = (".py", ".txt", ".md"),
        max_bytes: int | None = None,
    ) -> TokenDataset:
        """Read tokens from a text file, a folder of text files, or a file of token ids.

        path: a folder gives all its files with one of `suffixes`, recursively, in the order of their
            relative paths, with a zero byte between two files (`__pycache__` and `site-packages` are
            skipped). A `.npy` (1-D integers) or `.bin` (raw uint16) file is memory-mapped token ids.
        tokenizer: "bytes" for text. For token ids it is only the name kept in the fingerprint; left at its
            default it becomes "token-ids".
        max_bytes: use no more than this many bytes of the text, or of the token ids.

        Raises UsageError for a missing or unreadable path, no matching file, a tokenizer that cannot read
        text, a malformed token file, and for what the constructor refuses.
        """
        source = Path(path)
        if max_bytes is not None and max_bytes < 1:
            raise UsageError(f"max_bytes is {max_bytes}; give at least 1, or None for no limit")
        if not source.exists():
            raise UsageError(f"no file or folder at {source}; check the data path")
        if source.is_file() and source.suffix in {".npy", ".bin"}:
            tokens = _open_token_ids(source)
            if max_bytes is not None:
                tokens = tokens[: max_bytes // tokens.dtype.itemsize]
            tokenizer = "token-ids" if tokenizer == "bytes" else tokenizer
        elif tokenizer != "bytes":
            raise UsageError(
                f"tokenizer {tokenizer!r} cannot read the text at {source}; use 'bytes', or store its "
                "token ids in a .npy or .bin file"
            )
        else:
            files = [source] if source.is_file() else list(_text_files(source, tuple(suffixes)))
            if not files:
                raise UsageError(f"no file under {source} ends in {', '.join(suffixes)}; name other suffixes")
            tokens = np.frombuffer(_concatenate(files, max_bytes), dtype=np.uint8)
        return cls(tokens, sequence_length=sequence_length, tokenizer=tokenizer)

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)} samples")
        start = index * self.sequence_length
        ids = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    @property
    def vocab_size(self) -> int:
        """256 for bytes; for token ids the largest id + 1 (reads all tokens once), a lower bound."""
        return 256 if self.tokenizer == "bytes" else self._scan[1] + 1

    def fingerprint(self) -> dict[str, str | int]:
        """What the samples are made of; "content" is the xxh3_128 of all token bytes (read once, cached)."""
        return {
            "content": self._scan[0],
            "tokens": len(self.tokens),
            "dtype": str(self.tokens.dtype),
            "tokenizer": self.tokenizer,
            "sequence_length": self.sequence_length,
        }

    @cached_property
    def _scan(self) -> tuple[str, int]:
        digest, largest = xxhash.xxh3_128(), 0
        for start in range(0, len(self.tokens), _SCAN_TOKENS):
            chunk = np.ascontiguousarray(self.tokens[start : start + _SCAN_TOKENS])
            if chunk.min() < 0:
                raise UsageError(f"token ids after token {start} are negative ({chunk.min()}); rebuild them")
            digest.update(chunk.view(np.uint8).data)
            largest = max(largest, int(chunk.max()))
        return digest.hexdigest(), largest


def _open_token_ids(path: Path) -> TokenArray:
    try:
        if path.suffix == ".npy":
            array: TokenArray = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
        if path.stat().st_size % 2:
            raise ValueError(f"{path.stat().st_size} bytes are not whole uint16 tokens")
        return np.memmap(path, dtype=np.uint16, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read token ids from {path}: {error}; rebuild the file") from error


def _text_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot list a folder under {folder}: {error}; fix its permissions") from error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in names if name.endswith(suffixes)]
    yield from sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _concatenate(files: Sequence[Path], max_bytes: int | None) -> bytearray:
    text = bytearray()
    for number, file in enumerate(files):
        if max_bytes is not None and len(text) >= max_bytes:
            break
        try:
            text += (_SEPARATOR if number else b"") + file.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error}; fix its permissions or move it away") from error
    return text if max_bytes is None else text[:max_bytes]
