"""Fixtures: the command line in this process, with what it printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resume_kit.cli.main import main
from tests.checkpoints import commit


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("verify", path)`: exit code, stdout, stderr. No command may ever show a traceback."""

    def run(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 10, 20 and 30."""
    run = tmp_path / "run"
    for step in (10, 20, 30):
        commit(run, step)
    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One checkpoint of step 10."""
    return commit(tmp_path / "run", 10)
