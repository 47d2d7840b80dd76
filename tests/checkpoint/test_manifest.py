"""The manifest: what was committed reads back; anything else is damage or another version, and says which."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.manifest import SCHEMA, Manifest, RankEntry, TensorEntry, read_manifest
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.errors import CheckpointDamaged, ResumeKitError, ResumeRefused
from tests.checkpoints import commit, resign

SMALL = Manifest(
    run_id="0123456789ab",
    attempt=2,
    step=7,
    created=1_700_000_000.25,
    engine={"engine": "deepspeed", "world_size": 2},
    tensors=(
        TensorEntry(TensorSpec(TensorKey("master", "w"), "float32", (2, 3)), "0" * 16, stored=True),
        TensorEntry(TensorSpec(TensorKey("buffer", "b"), "bfloat16", ()), "f" * 16, stored=False, owner=1),
    ),
    ranks=tuple(RankEntry(rank, 100 + rank, "d" * 32, 50, "e" * 32, "a" * 32) for rank in range(2)),
    aliases={"head": "w"},
    state={"lr": 0.1, "t": {"$tuple": [1]}},
    data={"position": 14},
    pinned={"seed": 1},
    gate={"loss": 2.5},
    requires=("cast-of-master",),
)


def placed(run: Path, raw: bytes, name: str = "step-000000007") -> Path:
    directory = run / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names.MANIFEST).write_bytes(raw)
    return directory


def test_a_manifest_reads_back_as_it_was(tmp_path: Path) -> None:
    read = read_manifest(placed(tmp_path, SMALL.to_bytes()))
    assert read == SMALL
    assert read.world_size == 2 and read.total_bytes == 100 + 101 + 50 + 50
    assert read.by_key()[TensorKey("buffer", "b")].owner == 1


def test_a_manifest_without_a_gate_reads_back(tmp_path: Path) -> None:
    without = Manifest(**{**vars(SMALL), "gate": None, "requires": ()})
    assert read_manifest(placed(tmp_path, without.to_bytes())) == without


def test_changes_of_bytes_are_damage_wherever_they_are(tmp_path: Path) -> None:
    raw = SMALL.to_bytes()
    rng = random.Random(1)
    for position in range(len(raw)):
        changed = bytearray(raw)
        changed[position] ^= 1 << rng.randrange(8)
        with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
            read_manifest(placed(tmp_path, bytes(changed)))


@pytest.mark.parametrize("raw", [b"", b"{}", b"null", b"\0" * 100, SMALL.to_bytes()[:-1], SMALL.to_bytes() * 2])
def test_other_content_is_damage(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged):
        read_manifest(placed(tmp_path, raw))


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-000000007").mkdir()
    with pytest.raises(CheckpointDamaged, match=r"step-000000007/manifest\.json: the file is missing"):
        read_manifest(tmp_path / "step-000000007")


def test_a_directory_of_another_step_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="it says step 7, its directory says step-000000008") as error:
        read_manifest(placed(tmp_path, SMALL.to_bytes(), "step-000000008"))
    assert error.value.problems[0].remedy == "undo the rename"
    for name in (names.replaced_directory("step-000000007"), "a copy"):  # these names promise no step
        assert read_manifest(placed(tmp_path, SMALL.to_bytes(), name)).step == 7


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": SCHEMA + 1}, rf"schema version {SCHEMA + 1}; this resume_kit reads version {SCHEMA}"),
        ({"format": "other"}, "format is 'other', not 'resume_kit'"),
        ({"requires": ["cast-of-master", "quantum", "zstd"]}, "does not know: quantum, zstd"),
    ],
)
def test_another_version_is_refused_and_is_not_damage(change: dict[str, Any], expected: str, run_dir: Path) -> None:
    directory = commit(run_dir, 7)
    resign(directory / names.MANIFEST, lambda document: document.update(change))
    with pytest.raises(ResumeRefused, match=expected):
        read_manifest(directory)


def test_damage_to_the_schema_is_damage_with_a_note(tmp_path: Path) -> None:
    raw = SMALL.to_bytes().replace(f'"schema":{SCHEMA}'.encode(), b'"schema":3')
    with pytest.raises(CheckpointDamaged, match="it states schema version 3") as error:
        read_manifest(placed(tmp_path, raw))
    assert len(error.value.problems) == 2 and "its digest is" in error.value.problems[0].what


def replace(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


MISSHAPEN: dict[str, Callable[[dict[str, Any]], None]] = {
    "run_id": replace("run_id", value=7),
    "attempt": replace("attempt", value="1"),
    "step": replace("step", value="7"),
    "negative step": replace("step", value=-1),
    "huge step": replace("step", value=10**9),
    "created": replace("created", value="today"),
    "engine": replace("engine", value=[]),
    "state": replace("state", value=None),
    "data": replace("data", value=3),
    "pinned": replace("pinned", value="x"),
    "aliases": replace("aliases", value=[["a", "b"]]),
    "gate": replace("gate", value=2.5),
    "tensors": replace("tensors", value=None),
    "a tensor": replace("tensors", 0, value=["master", "w"]),
    "kind": replace("tensors", 0, 0, value=3),
    "name": replace("tensors", 0, 1, value=None),
    "dtype": replace("tensors", 0, 2, value="float31"),
    "dtype type": replace("tensors", 0, 2, value=["float32"]),
    "shape": replace("tensors", 0, 3, value="23"),
    "extent": replace("tensors", 0, 3, value=[2, -3]),
    "fingerprint": replace("tensors", 0, 4, value=0),
    "stored": replace("tensors", 0, 5, value="yes"),
    "owner": replace("tensors", 1, 6, value="1"),
    "ranks": replace("ranks", value=7),
    "rank": replace("ranks", 0, value=[]),
    "data bytes": replace("ranks", 0, "data", "bytes", value="100"),
    "negative bytes": replace("ranks", 0, "index", "bytes", value=-1),
    "data digest": replace("ranks", 1, "data", "digest", value=None),
    "rng digest": replace("ranks", 1, "rng", value=1),
    "requires": replace("requires", value=7),
    "holders": replace("holders", value=["w"]),
    "holders of a tensor": replace("holders", "w", value=5),
    "carried": replace("carried", value=7),
    "a carried topology": replace("carried", value=[5]),
    "a carried topology without its size": replace("carried", value=[{"engine": "deepspeed"}]),
    "a carried topology's size": replace("carried", value=[{"engine": "deepspeed", "world_size": "3"}]),
    "an engine's size": replace("engine", "world_size", value="2"),
    "an engine without its size": replace("engine", value={"engine": "deepspeed"}),
    **{f"no {key}": (lambda document, key=key: document.pop(key)) for key in (
        "run_id", "attempt", "step", "created", "engine", "tensors", "ranks", "aliases", "state", "data", "pinned",
        "gate", "requires",
    )},
}  # fmt: skip


@pytest.mark.parametrize("what", MISSHAPEN)
def test_a_signed_manifest_of_other_types_is_damage_and_never_a_crash(what: str, tmp_path: Path) -> None:
    directory = placed(tmp_path, SMALL.to_bytes())
    resign(directory / names.MANIFEST, MISSHAPEN[what])
    with pytest.raises(CheckpointDamaged, match=r"malformed|is not what the format says"):
        read_manifest(directory)


def test_any_signed_json_is_read_or_refused_by_our_own_errors(tmp_path: Path) -> None:
    """Whatever a field is replaced with, no error but ours comes out."""
    document = json.loads(SMALL.to_bytes())
    del document["digest"]
    strange: list[Any] = [None, True, -1, 1.5, "x", "", [], [[]], [1], ["a"], {}, {"a": 1}, [{}], [None]]
    outcomes = set()
    for key in document:
        for value in strange:
            directory = placed(tmp_path, canonical.sign({**document, key: value}))
            try:
                read_manifest(directory)
                outcomes.add("read")
            except ResumeKitError as error:
                outcomes.add(type(error).__name__)
    assert outcomes == {"read", "CheckpointDamaged", "ResumeRefused"}
