"""Whatever lies at a path: one readable answer, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import canonical
from resume_kit.cli import main as main_module
from resume_kit.cli.main import COMMANDS, main
from tests.checkpoints import commit, resign
from tests.cli.conftest import Cli

ROOT = Path(__file__).resolve().parent.parent.parent


def commands_for(path: object) -> list[tuple[object, ...]]:
    return [
        ("ls", path),
        ("inspect", path, "--tensors"),
        ("verify", path),
        ("verify", path, "--deep"),
        ("diff", path, path),
        ("prune", path, "--keep-last", 2),
    ]


COUNT = len(commands_for(""))


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("path", ["", "nowhere", "file", "file/below", "x" * 5000, "nul\0byte", "\udc80", "line\nfeed"])
def test_a_wrong_path(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, number: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no directory")
    result = cli(*commands_for(path)[number])
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert result.err.isascii() or "…" in result.err
    with_json = cli(*commands_for(path)[number], "--json")
    assert with_json.code == 2
    assert with_json.json["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("ls",),
        ("ls", "a", "b"),
        ("ls", "a", "--what"),
        ("diff", "a"),
        ("verify", "a", "--dee"),
    ],
)
def test_wrong_usage_is_one_line(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(cli: Cli, command: str) -> None:
    result = cli(*filter(None, [command]), "--help")
    assert result.code == 0
    assert "usage: resume-kit" in result.out


def test_an_empty_directory(cli: Cli, tmp_path: Path) -> None:
    codes = [cli(*arguments).code for arguments in commands_for(tmp_path)]
    assert codes == [0, 2, 2, 2, 2, 0]
    empty = tmp_path / "step-000000010"
    empty.mkdir()
    codes = [cli(*arguments).code for arguments in commands_for(empty)]
    assert codes == [2, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe" * 99,
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{}",
        b'{"digest":1}',
        b'{"schema":[]}',
        b"[" * 100_000,
        b'{"a":' * 990 + b"1" + b"}" * 990,
        b'{"a":NaN}',
        b'{"a":' + b"9" * 10_000 + b"}",
        b"\xff\xfe{\x00}\x00",
    ],
)
def test_garbage_for_a_manifest(cli: Cli, run: Path, content: bytes) -> None:
    newest = run / "step-000000030"
    (newest / "manifest.json").write_bytes(content)
    for arguments in commands_for(newest)[1:5]:
        result = cli(*arguments)
        assert result.code == 1
        assert "manifest.json" in result.out + result.err
    assert cli("ls", run).code == 0
    assert cli("prune", run, "--keep-last", 2).code == 0
    assert (run / "step-000000020").is_dir()


OTHER_TYPES: list[Any] = [None, 0, -1, 10**400, 1.5, True, "text", [], [1], [[]], {}, {"a": 1}, [{"b": []}]]


FIELDS = "aliases attempt created data engine format gate pinned ranks requires run_id schema state step tensors"


@pytest.mark.parametrize("field", FIELDS.split())
def test_a_signed_manifest_with_fields_of_other_types(cli: Cli, checkpoint: Path, field: str) -> None:
    run, manifest = checkpoint.parent, checkpoint / "manifest.json"
    original = manifest.read_bytes()
    for value in (None, -1, 10**400, "text", [[1]], {"a": []}):
        manifest.write_bytes(original)
        resign(manifest, lambda document, value=value: document.update({field: value}))
        lines = [("inspect", checkpoint), ("diff", checkpoint, run), ("ls", run), ("verify", run, "--deep")]
        for arguments in (*lines, ("prune", run, "--keep-last", 3)):
            assert cli(*arguments).code in (0, 1), (field, value, arguments)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.index.json"])
def test_signed_documents_with_odd_values_anywhere(cli: Cli, checkpoint: Path, name: str) -> None:
    """A value of another type deep inside, everything signed anew: found or shown, never a traceback."""
    rng = random.Random(7)
    path = checkpoint / name
    originals = {p: p.read_bytes() for p in (path, checkpoint / "manifest.json")}
    document = json.loads(originals[path])
    for place in rng.sample([p for p in places(document) if p and p[0] != "digest"], 40):
        odd = rng.choice([*OTHER_TYPES, {"$tuple": 3}, {"$bytes": 1}, {"$items": [1]}, {"$float": []}])
        for p, content in originals.items():
            p.write_bytes(content)

        def change(target: Any, place: tuple[Any, ...] = place, odd: Any = odd) -> None:
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = odd

        resign(path, change)
        if name != "manifest.json":
            vouch_for(path)
        for arguments in (("inspect", checkpoint, "--tensors"), ("verify", checkpoint, "--deep")):
            assert cli(*arguments).code in (0, 1), (place, odd, arguments)
            assert cli(*arguments, "--json").json
        for arguments in (("ls", checkpoint.parent), ("diff", checkpoint, checkpoint)):
            assert cli(*arguments).code in (0, 1), (place, odd, arguments)
        assert cli("prune", checkpoint.parent, "--keep-last", 2).code in (0, 1), (place, odd)


def vouch_for(path: Path) -> None:
    """Let the manifest state the index as it is now, so that only its content can tell."""
    raw = path.read_bytes()
    stated = {"bytes": len(raw), "digest": canonical.digest(raw), "file": path.name}
    resign(path.parent / "manifest.json", lambda document: document["ranks"][0].update(index=stated))


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A temporary directory that any user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so tests under root step down."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permission_errors(cli: Cli, open_tmp: Path) -> None:
    run = open_tmp / "run"
    for step in (10, 20, 30):
        commit(run, step)
    for arguments in commands_for(run)[:5]:
        cli(*arguments)  # import what is imported late while that is readable
    (run / "step-000000030" / "manifest.json").chmod(0)
    (run / "step-000000020" / "rank-00000.safetensors").chmod(0)
    with as_nobody():
        listing = cli("ls", run, "--json")
        assert (listing.code, listing.err) == (0, "")
        assert [row["state"] for row in listing.json["checkpoints"]] == ["good", "good", "damaged"]
        deep = cli("verify", run / "step-000000020", "--deep")
        assert deep.code == 1
        assert "cannot be opened: Permission denied" in deep.out
        for arguments in commands_for(run)[1:5]:
            result = cli(*arguments)
            assert result.code == 1
            assert "manifest.json" in result.out + result.err
            assert "Permission denied" in result.out + result.err
    (run / "step-000000020").chmod(0)
    with as_nobody():
        listing = cli("ls", run, "--json")
        assert [row["state"] for row in listing.json["checkpoints"]] == ["good", "damaged", "damaged"]
        assert cli("verify", run, "--all").code == 1
        assert cli("prune", run, "--keep-last", 2).code == 1
    run.chmod(0)
    with as_nobody():
        for arguments in commands_for(run):
            result = cli(*arguments)
            assert (result.code, result.out) == (2, "")
            assert result.err == f"resume-kit: {run} cannot be read: Permission denied\n"
    run.chmod(0o755)


def test_interrupt(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_arguments: object) -> None:
        raise KeyboardInterrupt

    command = main_module.Command("", COMMANDS["ls"].configure, interrupted)  # type: ignore[arg-type]
    monkeypatch.setitem(COMMANDS, "ls", command)
    result = cli("ls", run)
    assert (result.code, result.out, result.err) == (130, "", "resume-kit: interrupted\n")


def test_main_returns_its_code(checkpoint: Path) -> None:
    assert main(["verify", str(checkpoint)]) == 0


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = f'set -o pipefail; kit() {{ {sys.executable} -m resume_kit.cli "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script, "bash", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_hangs_up(tmp_path: Path, reader: str) -> None:
    path = commit(tmp_path, 10, weights={f"layers.{i}.weight": (1,) for i in range(400)}, ranks=1)
    result = shell(f'kit inspect "$1" --tensors | {reader}', path)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_full_disk_and_a_closed_stdout(checkpoint: Path) -> None:
    result = shell('kit verify "$1" > /dev/full', checkpoint)
    assert (result.returncode, result.stderr) == (1, "resume-kit: No space left on device\n")
    result = shell('kit verify "$1" >&-', checkpoint)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_terminal_that_knows_only_ascii(checkpoint: Path) -> None:
    result = shell(
        'PYTHONIOENCODING=ascii kit verify "$1"; PYTHONIOENCODING=ascii kit ls "$2"',
        checkpoint,
        checkpoint.parent,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()


BLOCKER = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "deepspeed", "transformers", "torchdata", "megatron"):
            raise ImportError(f"{name} is not on this login node")

sys.meta_path.insert(0, NoTorch())
from resume_kit.cli.main import main
run, codes = sys.argv[1], []
for line in ("ls R", "inspect R --tensors", "verify R --deep --all", "diff R R", "prune R --keep-last 2"):
    codes.append(main([word.replace("R", run) for word in line.split()]))
print(codes)
"""


def test_no_torch(run: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BLOCKER, str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0]"
