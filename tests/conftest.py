"""Fixtures of all tests: ranks and run directories."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import SERVER, RankGroup, run_ranks, start_ranks

# A shell starts background jobs with Ctrl-C ignored, and every process of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Ranks:
    """`run` and `start` of `tests.ranks`; groups that a test leaves running are killed at its end."""

    def __init__(self) -> None:
        self._groups: list[RankGroup] = []

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
        return run_ranks(fn, world_size, *args, **options)

    def start(self, fn: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> RankGroup:
        group = start_ranks(fn, world_size, *args, **options)
        self._groups.append(group)
        return group

    def close(self) -> None:
        for group in self._groups:
            group.close()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """The session's fork server, warm. Only tests that use ranks pay for it."""
    SERVER.warm_up()
    yield
    SERVER.close()


@pytest.fixture
def ranks(fork_server: None) -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory that does not exist yet."""
    return tmp_path / "run"
