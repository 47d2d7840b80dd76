from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.checkpoints import commit, flip, resign
from tests.cli.conftest import Cli

FLIPS = 200


def test_good(cli: Cli, run: Path) -> None:
    result = cli("verify", run)
    assert (result.code, result.err) == (0, "")
    assert result.out.count("✓") == 1
    assert "step-000000030 is good" in result.out
    result = cli("verify", run, "--all", "--deep", "--json")
    assert result.code == 0
    assert [(c["step"], c["ok"]) for c in result.json["checkpoints"]] == [(10, True), (20, True), (30, True)]


def test_every_flipped_bit_is_found_and_its_file_named(
    cli: Cli, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Must-show: 200 random single-bit flips over all files of a checkpoint."""
    rng = random.Random(20_240_601)
    paths = sorted(checkpoint.iterdir())
    found: Counter[str] = Counter()
    for _ in range(FLIPS):
        path = rng.choice(paths)
        position, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, position, bit)
        result = cli("verify", checkpoint, "--deep", "--json")
        problems = result.json["checkpoints"][0]["problems"]
        where = f"bit {bit} of byte {position} of {path.name}"
        assert result.code == 1, where
        assert [p["where"].split(",")[0] for p in problems if p["check"] != "schema"] == [str(path)], where
        flip(path, position, bit)
        found[path.name] += 1
    assert cli("verify", checkpoint, "--deep").code == 0
    with capsys.disabled():
        spread = ", ".join(f"{count} in {name}" for name, count in sorted(found.items()))
        print(f"\n{found.total()} of {FLIPS} single-bit flips found, each by the name of its file: {spread}")
    assert found.keys() == {path.name for path in paths}


def test_a_flip_in_the_second_block_is_located(cli: Cli, tmp_path: Path) -> None:
    path = commit(tmp_path, 10, ranks=1, weights={"big.weight": (1500, 1024)})
    data = path / "rank-00000.safetensors"
    size = data.stat().st_size
    flip(data, size - 1, 7)
    assert cli("verify", path).code == 0  # reads no data
    result = cli("verify", path, "--deep")
    assert result.code == 1
    assert f"the content of bytes {16 << 20:,}..{size:,} is not what was saved" in result.out


def test_the_text_names_file_what_and_remedy(cli: Cli, checkpoint: Path) -> None:
    data = checkpoint / "rank-00001.safetensors"
    os.truncate(data, 4000)
    result = cli("verify", checkpoint)
    assert result.code == 1
    lines = result.out.splitlines()
    assert lines[0] == f"✗ {checkpoint} is damaged: 1 problem"
    assert lines[1] == f"  ✗ {data}"
    assert "truncated: it has 4,000 bytes, the manifest says" in lines[2]
    assert lines[3] == "      → restore the file from a copy, or resume from an older checkpoint"


@pytest.mark.parametrize("deep", [(), ("--deep",)])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.index.json", "manifest.json"])
@pytest.mark.parametrize("act", ["truncate", "lengthen", "empty", "remove", "directory", "garbage"])
def test_each_damage_of_each_file(cli: Cli, checkpoint: Path, act: str, name: str, deep: tuple[str, ...]) -> None:
    path = checkpoint / name
    size = path.stat().st_size
    if act in ("truncate", "lengthen", "empty"):
        os.truncate(path, {"truncate": size - 1, "lengthen": size + 1, "empty": 0}[act])
    elif act == "garbage":
        path.write_bytes(random.Random(0).randbytes(size + 1))
    else:
        path.unlink()
    if act == "directory":
        path.mkdir()
    result = cli("verify", checkpoint, "--json", *deep)
    assert result.code == 1
    problems = result.json["checkpoints"][0]["problems"]
    assert str(path) in {problem["where"] for problem in problems}


@pytest.mark.parametrize("name", ["safetensors", "index.json"])
def test_files_swapped_between_ranks(cli: Cli, checkpoint: Path, name: str) -> None:
    one, two = (checkpoint / f"rank-0000{rank}.{name}" for rank in range(2))
    one.rename(checkpoint / "waiting")
    two.rename(one)
    (checkpoint / "waiting").rename(two)
    result = cli("verify", checkpoint, "--deep")
    assert result.code == 1
    assert str(one) in result.out
    assert str(two) in result.out


def test_files_swapped_between_steps(cli: Cli, run: Path) -> None:
    for name in ("rank-00000.safetensors", "rank-00000.index.json"):
        shutil.copy(run / "step-000000010" / name, run / "step-000000020" / name)
    result = cli("verify", run, "--all", "--deep", "--json")
    assert result.code == 1
    assert [c["ok"] for c in result.json["checkpoints"]] == [True, False, True]


def test_a_renamed_checkpoint(cli: Cli, checkpoint: Path) -> None:
    moved = checkpoint.rename(checkpoint.with_name("step-000000011"))
    result = cli("verify", moved)
    assert result.code == 1
    assert "it says step 10, its directory says step-000000011" in result.out


def test_a_stranger_in_the_directory(cli: Cli, checkpoint: Path) -> None:
    (checkpoint / "rank-00002.safetensors").write_bytes(b"")
    result = cli("verify", checkpoint)
    assert result.code == 1
    assert "does not belong to this checkpoint" in result.out


def test_data_of_another_save_under_the_same_index(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    other = commit(tmp_path / "other", 10, seed=1)
    shutil.copy(other / "rank-00001.safetensors", checkpoint / "rank-00001.safetensors")
    assert cli("verify", checkpoint).code == 0  # same size: only the content tells
    assert cli("verify", checkpoint, "--deep").code == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 99}, "schema version 99; this resume_kit reads version 2"),
        ({"requires": ["time-travel"]}, "requires features that this resume_kit does not know: time-travel"),
        ({"format": "other"}, "format is 'other', not 'resume_kit'"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_other_versions_are_refused(cli: Cli, checkpoint: Path, command: str, change: dict, text: str) -> None:
    resign(checkpoint / "manifest.json", lambda document: document.update(change))
    result = cli(command, checkpoint)
    assert result.code == 1
    assert text in result.out + result.err


def test_an_unsigned_edit(cli: Cli, checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"lr":0.003', b'"lr":0.004'))
    result = cli("verify", checkpoint)
    assert result.code == 1
    assert "its digest is" in result.out
    assert str(manifest) in result.out


def test_white_space_is_damage_too(cli: Cli, checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert "not the canonical form" in cli("verify", checkpoint).out


def test_a_forged_fingerprint_contradicts_the_indices(cli: Cli, checkpoint: Path) -> None:
    resign(checkpoint / "manifest.json", lambda document: document["tensors"][3].__setitem__(4, "0" * 16))
    assert "tell different things" in cli("verify", checkpoint).out


def test_progress_goes_to_stderr_and_only_when_asked(cli: Cli, run: Path) -> None:
    result = cli("verify", run, "--all", "--deep", "--progress", "--json")
    assert result.json["ok"]
    assert result.err.count("100%") == 0
    assert "verify step-000000030" in result.err
    assert cli("verify", run, "--deep").err == ""


def test_all_wants_a_run(cli: Cli, checkpoint: Path) -> None:
    assert cli("verify", checkpoint, "--all").code == 2
