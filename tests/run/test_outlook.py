"""Whether a step boundary can still come: from last words, from the processes of this host, and from how steps went."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resume_kit.recovery.identity import Identity
from resume_kit.run import outlook as module
from resume_kit.run.last_words import LastWords
from resume_kit.run.outlook import RankOutlook
from resume_kit.run.watchdog import Watchdog
from tests.run.test_last_words import FakeAttempt


class Clock:
    """Monotonic seconds, moved by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def pass_by(self, seconds: float, outlook: RankOutlook) -> str:
        """Second by second, as the thread that reads signals looks; the last answer."""
        answer = ""
        for _ in range(int(seconds)):
            self.now += 1.0
            answer = answer or outlook.overdue()
        return answer


@pytest.fixture
def words(tmp_path: Path) -> Iterator[LastWords]:
    attempt: Any = FakeAttempt(folder=tmp_path)
    found = LastWords(attempt, 0)
    yield found
    found.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def outlook_of(words: LastWords, peers: dict[int, Identity] | None = None) -> RankOutlook:
    return RankOutlook(words, Watchdog(None, words), peers or {})


def test_no_sign_of_progress_for_a_minute_is_the_end(words: LastWords, clock: Clock) -> None:
    outlook = outlook_of(words)
    assert clock.pass_by(60, outlook) == ""
    assert "no progress for 60 s after SIGTERM" in clock.pass_by(3, outlook)


def test_signs_of_progress_and_the_kits_own_waits_are_waited_for(words: LastWords, clock: Clock) -> None:
    outlook = outlook_of(words)
    for _ in range(5):
        assert clock.pass_by(50, outlook) == ""
        outlook._watchdog.alive()
    with outlook.waiting():
        assert clock.pass_by(500, outlook) == ""
    assert clock.pass_by(50, outlook) == ""
    assert clock.pass_by(20, outlook) != ""


@pytest.mark.parametrize(("steps", "allowed"), [([40.0], 200), ([300.0, 10.0], 600)])
def test_long_steps_have_more_time(steps: list[float], allowed: int, words: LastWords, clock: Clock) -> None:
    outlook = outlook_of(words)
    outlook.reached()
    for seconds in steps:
        clock.now += seconds
        outlook.reached()
    assert outlook.last_step == steps[-1]
    assert clock.pass_by(allowed, outlook) == ""
    assert clock.pass_by(5, outlook) != ""


def test_a_process_that_was_stopped_meanwhile_is_not_overdue(words: LastWords, clock: Clock) -> None:
    outlook = outlook_of(words)
    outlook.overdue()
    clock.now += 5000.0
    assert outlook.overdue() == ""


def test_a_peer_that_was_killed_is_missed_after_a_while(words: LastWords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankOutlook, "GONE_FOR", 0.2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = Identity.of_this_process()
    peers = {0: own, 1: replace(own, pid=child.pid, pid_started=started(child.pid))}
    peers[2] = replace(peers[1], boot_id="of another host", pid=2**22 + 1)
    outlook = outlook_of(words, peers)
    assert outlook.hopeless() == ""
    child.kill()
    time.sleep(0.2)  # a process that nobody has waited for yet
    assert outlook.hopeless() == ""
    time.sleep(0.3)
    assert outlook.hopeless() == f"its peer, rank 1 (process {child.pid} on this host), has died without a word"
    child.wait()


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize("content", ["[]", '{"rank": 1}', "7", '{"rank": 1, "ki'])
def test_words_that_make_no_sense_end_nothing(content: str, words: LastWords, tmp_path: Path) -> None:
    (tmp_path / "rank-00001.json").write_text(content)
    assert outlook_of(words).hopeless() == ""


def test_what_a_rank_said_is_heard_at_once(words: LastWords, tmp_path: Path) -> None:
    (tmp_path / "rank-00001.json").write_text('{"rank": 1, "kind": "failed", "error": "MemoryError"}')
    assert outlook_of(words).hopeless() == "rank 1 failed: MemoryError"
