"""Why a rank ended before its time, as it lies in the attempt's folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resume_kit.errors import (
    CheckpointDamaged,
    Fenced,
    Problem,
    ReplayMismatch,
    SaveFailed,
    TooLittleMemory,
    Unreadable,
    UsageError,
)
from resume_kit.run import last_words
from resume_kit.run.last_words import LastWords
from tests.ranks import ROOT


class FakeAttempt(SimpleNamespace):
    """Keeps how it ended."""

    def ended(self, reason: str, *, step: int | None, by: str = "") -> None:
        self.said = reason, step, by


@pytest.fixture
def attempt(tmp_path: Path) -> FakeAttempt:
    return FakeAttempt(folder=tmp_path)


@pytest.fixture
def words(attempt: Any) -> Iterator[LastWords]:
    found = LastWords(attempt, 3)
    yield found
    found.close()


def written(words: LastWords) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(words.path.read_bytes())
    return found


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (RuntimeError("CUDA out of memory.\nTried …"), "failed", "failed"),
        (SaveFailed("no space left", [Problem("disk", "/x", "full")]), "failed", "failed"),
        (ReplayMismatch("step 7 came out otherwise"), "failed", "refused"),
        (CheckpointDamaged("none is good"), "failed", "refused"),
        (Fenced("attempt 8 took over"), "fenced", "fenced"),
    ],
)
def test_an_error_is_one_line(error: Exception, kind: str, reason: str, words: LastWords, attempt: FakeAttempt) -> None:
    words.step = 41
    words.stacks.touch()  # opened for a hang, which did not come
    last_words.record(error)
    found = written(words)
    line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert found.items() >= {"rank": 3, "step": 41, "kind": kind, "error": line}.items()
    assert found["host"] and found["time"] > 1e9
    assert attempt.said == (reason, 41, line)
    assert not words.stacks.exists()


def test_the_first_words_are_kept(words: LastWords) -> None:
    words.record("no progress for 5 s", kind="hung")
    words.record(RuntimeError("torn down"))
    assert written(words)["error"] == "no progress for 5 s"


def test_a_disk_that_says_no_does_not_hide_the_error(attempt: Any, tmp_path: Path) -> None:
    attempt.folder = tmp_path / "is" / "gone"
    words = LastWords(attempt, 0)
    words.record(RuntimeError("the error"))
    words.close()
    assert attempt.said[0] == "failed"


def test_the_words_of_any_rank_are_heard(words: LastWords, tmp_path: Path) -> None:
    assert words.of_any() == ""
    (tmp_path / "rank-00000.json").write_text('{"rank": 0, "ki')  # being written
    assert words.of_any() == ""
    (tmp_path / "rank-00000.json").unlink()
    words.record("mine")
    assert words.of_any() == "rank 3 failed: mine"
    (tmp_path / "rank-00001.json").write_text('{"rank": 1, "kind": "failed", "error": "MemoryError"}')
    assert words.of_any() == "rank 1 failed: MemoryError"


def test_without_a_kit_nothing_is_recorded_and_after_close_neither(tmp_path: Path, attempt: Any) -> None:
    hook = sys.excepthook
    words = LastWords(attempt, 0)
    assert sys.excepthook != hook
    words.close()
    assert sys.excepthook == hook
    last_words.record(RuntimeError("x"))
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from resume_kit.run.last_words import LastWords
sys.excepthook = lambda kind, error, trace: print("the hook of before:", error)
class Attempt(SimpleNamespace):
    def ended(self, *said, **more): print("ended", *said)
attempt = Attempt(folder=Path(sys.argv[1]))
words = LastWords(attempt, 0)
words.step = 9
raise KeyError("no such thing")
"""


def test_an_uncaught_exception_is_recorded_and_goes_on_its_way(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 1
    assert run.stdout.splitlines() == ["ended failed", "the hook of before: 'no such thing'"]
    found = json.loads((tmp_path / "rank-00000.json").read_bytes())
    assert found["error"] == "KeyError: 'no such thing'" and found["step"] == 9


@pytest.mark.parametrize(
    ("error", "training", "reason"),
    [
        (UsageError("the model is another"), False, "refused"),
        (CheckpointDamaged("none is good"), False, "refused"),
        (CheckpointDamaged("rank-00001.index.json came late"), True, "failed"),
        (UsageError("the kit is not told of every step"), True, "failed"),
        (ReplayMismatch("step 7 came out otherwise"), True, "refused"),
        (Unreadable("stale"), False, "failed"),
        (TooLittleMemory("now"), False, "failed"),
    ],
)
def test_only_what_a_check_says_no_to_is_refused(error: Exception, training: bool, reason: str) -> None:
    assert last_words.reason_of(error, training=training) == reason


def test_the_first_signal_that_asked_is_written_down_once(words: LastWords, tmp_path: Path, attempt: Any) -> None:
    words.asked("SIGTERM")
    LastWords(attempt, 5).asked("SIGUSR1")
    found = json.loads((tmp_path / "asked.json").read_bytes())
    assert found.items() >= {"signal": "SIGTERM", "rank": 3}.items() and found["time"] > 1e9
    attempt.folder = tmp_path / "is" / "gone"
    LastWords(attempt, 0).asked("SIGTERM")


def test_a_process_that_was_forked_off_does_not_speak_for_the_rank(words: LastWords, attempt: FakeAttempt) -> None:
    child = os.fork()
    if not child:
        words.record(RuntimeError("of a data worker"))
        os._exit(hasattr(attempt, "said"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not words.path.exists()


DYING = """
import os, signal, sys
from pathlib import Path
from resume_kit.run.last_words import LastWords
class Attempt:
    folder = Path(sys.argv[1])
    def ended(self, *said, **more): ...
attempt = Attempt()
signal.signal(signal.SIGTERM, lambda *_: None)
sys.excepthook = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
words = LastWords(attempt, 0)
raise KeyError("no such thing")
"""


def test_after_an_uncaught_exception_sigterm_ends_the_process(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", DYING, str(tmp_path)], cwd=ROOT, timeout=30, check=False)
    assert run.returncode == -signal.SIGTERM
