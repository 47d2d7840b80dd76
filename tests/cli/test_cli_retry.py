from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Cli
from tests.recovery.runs import attempt


def test_what_was_given_up_may_start_again(cli: Cli, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        attempt(tmp_path, number, at=100 * number).train(3).ended("failed", "bad")
    assert cli("next", tmp_path).out == "stop\n"
    assert cli("retry", tmp_path).out == "failures up to attempt 3 no longer count\n"
    assert cli("next", tmp_path).out == "restart\n"
    assert cli("retry", tmp_path, "--json").json["pardoned_up_to"] == 3


def test_nothing_to_retry(cli: Cli, tmp_path: Path) -> None:
    result = cli("retry", tmp_path)
    assert result.code == 2 and "no attempts to pardon" in result.err
