from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from resume_kit.data import TokenDataset, standard_library_path
from resume_kit.errors import UsageError


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_windows_of_a_text_file(tmp_path: Path) -> None:
    data = TokenDataset.from_path(write(tmp_path / "a.log", b"abcdefghij"), sequence_length=4)
    assert len(data) == 2
    assert data.vocab_size == 256
    item = data[1]
    assert item["input_ids"].tolist() == list(b"efgh")
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    assert item["input_ids"].data_ptr() != item["labels"].data_ptr()
    for index in (-1, 2):
        with pytest.raises(IndexError):
            data[index]


def test_folder_is_joined_in_path_order(tmp_path: Path) -> None:
    write(tmp_path / "b.py", b"BB")
    write(tmp_path / "a" / "z.md", b"AA")
    write(tmp_path / "c.bin2", b"no")
    write(tmp_path / "__pycache__" / "a.py", b"no")
    write(tmp_path / "site-packages" / "a.py", b"no")
    data = TokenDataset.from_path(tmp_path, sequence_length=2)
    assert data.tokens.tobytes() == b"AA\0BB"
    assert TokenDataset.from_path(tmp_path, sequence_length=2, max_bytes=4).tokens.tobytes() == b"AA\0B"
    assert TokenDataset.from_path(tmp_path, sequence_length=2, max_bytes=2).tokens.tobytes() == b"AA"
    assert TokenDataset.from_path(tmp_path, sequence_length=2, suffixes=[".py"]).tokens.tobytes() == b"BB"


def test_token_id_files(tmp_path: Path) -> None:
    ids = np.array([5, 60_000, 7, 8, 9, 1], dtype=np.uint16)
    write(tmp_path / "t.bin", ids.tobytes())
    np.save(tmp_path / "t.npy", ids.astype(np.int32))
    for name, dtype in (("t.bin", "uint16"), ("t.npy", "int32")):
        data = TokenDataset.from_path(tmp_path / name, sequence_length=3)
        assert isinstance(data.tokens, np.memmap)
        assert data[0]["input_ids"].tolist() == [5, 60_000, 7]
        assert (data.tokenizer, data.vocab_size) == ("token-ids", 60_001)
        assert data.fingerprint()["dtype"] == dtype
    assert len(TokenDataset.from_path(tmp_path / "t.bin", sequence_length=3, max_bytes=6)) == 1
    named = TokenDataset.from_path(tmp_path / "t.bin", sequence_length=3, tokenizer="gpt2")
    assert named.fingerprint()["tokenizer"] == "gpt2"


def test_fingerprint_sees_one_byte_and_the_length(tmp_path: Path) -> None:
    text = bytearray(os.urandom(10_001))
    path = write(tmp_path / "a.txt", bytes(text))
    first = TokenDataset.from_path(path, sequence_length=10).fingerprint()
    assert first == TokenDataset.from_path(path, sequence_length=10).fingerprint()
    assert first != TokenDataset.from_path(path, sequence_length=20).fingerprint()
    text[-1] ^= 1
    write(path, bytes(text))
    changed = TokenDataset.from_path(path, sequence_length=10).fingerprint()
    assert changed["content"] != first["content"]
    assert changed["tokens"] == first["tokens"]


def test_fingerprint_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    whole = TokenDataset(tokens, sequence_length=10, tokenizer="ids").fingerprint()
    strided = TokenDataset(np.repeat(tokens, 2)[::2], sequence_length=10, tokenizer="ids").fingerprint()
    monkeypatch.setattr("resume_kit.data.tokens._SCAN_TOKENS", 7)
    assert TokenDataset(tokens, sequence_length=10, tokenizer="ids").fingerprint() == whole == strided


def test_standard_library_is_a_corpus() -> None:
    data = TokenDataset.from_path(standard_library_path(), sequence_length=64, max_bytes=10_000)
    assert len(data) == 10_000 // 64


def test_bad_arguments(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", b"abc")
    folder = tmp_path / "empty"
    folder.mkdir()
    cases: list[tuple[str, Path, dict[str, object]]] = [
        ("no file or folder", tmp_path / "missing", {}),
        ("name other suffixes", folder, {}),
        ("too few", text, {"sequence_length": 4}),
        ("at least 2 tokens", text, {"sequence_length": 1}),
        ("max_bytes is 0", text, {"max_bytes": 0}),
        ("cannot read the text", text, {"tokenizer": "gpt2"}),
        ("whole uint16", write(tmp_path / "odd.bin", b"abc"), {}),
        ("cannot read token ids", write(tmp_path / "bad.npy", b"not an array"), {}),
    ]
    for match, path, arguments in cases:
        with pytest.raises(UsageError, match=match):
            TokenDataset.from_path(path, **{"sequence_length": 2, **arguments})  # type: ignore[arg-type]


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot read token ids"):
        TokenDataset.from_path(tmp_path / "objects.npy", sequence_length=2)


def test_unreadable_file_raises(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"abcd")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"b\.txt"):
        TokenDataset.from_path(tmp_path, sequence_length=2)


@pytest.mark.parametrize(
    ("tokens", "tokenizer", "match"),
    [
        (np.zeros((4, 4), np.uint8), "bytes", "1-D"),
        (np.zeros(4, np.float32), "ids", "1-D"),
        (np.zeros(4, np.uint16), "bytes", "uint8"),
    ],
)
def test_bad_arrays(tokens: np.ndarray, tokenizer: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        TokenDataset(tokens, sequence_length=2, tokenizer=tokenizer)


def test_negative_ids_are_refused() -> None:
    data = TokenDataset(np.array([1, -100, 3]), sequence_length=2, tokenizer="ids")
    with pytest.raises(UsageError, match="negative"):
        data.fingerprint()
