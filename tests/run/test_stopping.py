"""Reasons to stop: what the ranks agree on, signals in a real process, the deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from resume_kit.errors import UsageError
from resume_kit.run.stopping import Agreed, Deadline, Preempted, Reasons, Stop, StopSignals, Wish, agree
from tests.ranks import ROOT


def test_any_rank_stops_all_and_rank_0_decides_on_saves() -> None:
    assert agree([Wish(), Wish()]) == Agreed()
    assert agree([Wish(save=True), Wish()]).save and not agree([Wish(), Wish(save=True)]).save
    found = agree([Wish(Stop.DEADLINE, 9.0), Wish(Stop.SIGTERM, 0.5), Wish(Stop.SIGTERM, 0.75)])
    assert found == Agreed(Stop.SIGTERM, 0.75, False, rank=1)
    assert agree([Wish(Stop.SUPERSEDED), Wish(Stop.SIGTERM)]).stop is Stop.SUPERSEDED


def test_a_reason_is_told_with_its_rank_or_its_words() -> None:
    reasons = Reasons()
    assert reasons.gravest == (Stop.NO, 0.0) or reasons.gravest[0] is Stop.NO
    reasons.add(Stop.REQUEST, "anna: new data")
    reasons.add(Stop.REQUEST, "too late")
    assert reasons.gravest[0] is Stop.REQUEST
    assert reasons.describe(agree([Wish(Stop.REQUEST)])) == "request: anna: new data"
    assert reasons.describe(agree([Wish(), Wish(Stop.SIGUSR1)])) == "SIGUSR1 on rank 1"
    assert reasons.describe(agree([Wish(Stop.DEADLINE)])) == "deadline"


def test_the_exit_code_is_0_under_torchrun_which_would_start_the_ranks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert Preempted(3, "SIGTERM").code == 75
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert Preempted(3, "SIGTERM").code == 0


# -- the deadline


def test_the_deadline_leaves_time_for_a_step_and_two_saves() -> None:
    deadline = Deadline(1000.0)
    assert not deadline.near(900.0, 10.0, 40.0)
    assert deadline.near(911.0, 10.0, 40.0)
    assert not deadline.near(800.0, 10.0, None)
    assert deadline.near(875.0, 10.0, None)  # a save that has not been measured gets a minute


def test_where_the_deadline_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + 1000
    monkeypatch.delenv("RESUME_KIT_DEADLINE", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert Deadline.of(None) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{later + 50:.0f}")
    assert Deadline.of(None) == Deadline(float(f"{later + 50:.0f}"))
    monkeypatch.setenv("RESUME_KIT_DEADLINE", str(later))
    assert Deadline.of(None) == Deadline(later)
    assert Deadline.of(later + 1) == Deadline(later + 1)
    assert Deadline.of(float("inf")) is None
    monkeypatch.setenv("RESUME_KIT_DEADLINE", "tomorrow")
    with pytest.raises(UsageError, match="RESUME_KIT_DEADLINE is 'tomorrow'"):
        Deadline.of(None)


def test_a_deadline_that_has_passed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"it passed 1\d s ago"):
        Deadline.of(time.time() - 10)


# -- signals


class Nothing:
    """An outlook that knows nothing, and keeps what it is told."""

    def __init__(self, hopeless: str = "", overdue: str = "") -> None:
        self.told: list[str] = []
        self.hopeless, self.overdue = (lambda: hopeless), (lambda: overdue)

    def asked(self, name: str) -> None:
        self.told.append(name)

    def failed(self, why: str) -> None:
        print("left word of:", why, file=sys.stderr, flush=True)


@contextmanager
def signals(reasons: Reasons) -> Iterator[StopSignals]:
    taken = StopSignals(reasons, Nothing())
    try:
        yield taken
    finally:
        taken.close()


def soon(reasons: Reasons) -> Stop:
    end = time.monotonic() + 5
    while reasons.gravest[0] is Stop.NO and time.monotonic() < end:
        time.sleep(0.01)
    return reasons.gravest[0]


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_signal_is_a_reason_and_its_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    reasons = Reasons()
    with signals(reasons):
        os.kill(os.getpid(), number)
        assert soon(reasons) is Stop[number.name]
        os.kill(os.getpid(), number)  # passed on by another: the same
        time.sleep(0.05)
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_are_none_of_ours() -> None:
    reasons = Reasons()
    with signals(reasons):
        before = signal.signal(signal.SIGCHLD, lambda *_: None)
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(0.05)
        signal.signal(signal.SIGCHLD, before)
        assert reasons.gravest[0] is Stop.NO


def test_elsewhere_than_in_the_main_thread_it_says_so() -> None:
    found = list[StopSignals]()
    thread = threading.Thread(target=lambda: found.append(StopSignals(Reasons(), Nothing())))
    thread.start()
    thread.join()
    assert "was not made in the main thread" in found[0].note
    found[0].close()


WAITING = """
import os, sys, time
from resume_kit.run import stopping
from tests.run.test_stopping import Nothing
stopping.StopSignals.GAP = 0.5
stopping.StopSignals.EXIT_WITHIN = 2.0
outlook = Nothing(*sys.argv[1:3])
signals = stopping.StopSignals(stopping.Reasons(), outlook)
exec(sys.argv[3])
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
import ctypes
while True:
    ctypes.CDLL(None).usleep(60_000_000)  # as in a collective: the main thread runs no Python
"""


class Waiting:
    """The program above under way, with a forked child, as data workers are."""

    def __init__(self, hopeless: str = "", overdue: str = "", first: str = "") -> None:
        arguments = [sys.executable, "-c", WAITING, hopeless, overdue, first]
        self.process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    def ended(self) -> tuple[int, str]:
        """Exit code and what it said."""
        code = self.process.wait(timeout=5)
        os.kill(self.child, signal.SIGKILL)  # it holds the pipes
        return code, self.process.communicate(timeout=5)[1]


@pytest.fixture
def start() -> Iterator[Callable[..., Waiting]]:
    started: list[Waiting] = []

    def begin(hopeless: str = "", overdue: str = "", first: str = "") -> Waiting:
        started.append(Waiting(hopeless, overdue, first))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        with suppress(ProcessLookupError):
            os.kill(each.child, signal.SIGKILL)
        each.process.communicate(timeout=5)


def test_a_second_signal_ends_the_process_also_while_it_waits_in_a_collective(start: Callable[..., Waiting]) -> None:
    run = start()
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGUSR1)
    time.sleep(0.8)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ended()
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM, the second signal: ended at once; the last commit stands" in errors


def test_after_a_signal_a_rank_whose_peer_has_failed_ends_at_once(start: Callable[..., Waiting]) -> None:
    run = start("rank 1 failed: no memory")
    time.sleep(0.3)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ended()
    assert code == 1
    assert "no step will come to its end: rank 1 failed: no memory" in errors
    assert "left word of: rank 1 failed: no memory" in errors


def test_sigterm_is_not_waited_with_for_ever_but_a_warning_ahead_of_time_is(start: Callable[..., Waiting]) -> None:
    run = start(overdue="no progress for 60 s")
    run.process.send_signal(signal.SIGUSR1)
    time.sleep(1.3)
    assert run.process.poll() is None
    run.process.kill()
    run = start(overdue="no progress for 60 s")
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ended()
    assert code == 1 and "left word of: no progress for 60 s" in errors


MANY_FILES = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
signals.close()
files = [open("/dev/null") for _ in range(1100)]
signals = stopping.StopSignals(stopping.Reasons(), outlook)
assert signals._reader > 1023
"""


def test_signals_are_read_also_beside_more_files_than_select_can_take(start: Callable[..., Waiting]) -> None:
    run = start(first=MANY_FILES)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ended()
    assert code == 128 + signal.SIGTERM and "the second signal" in errors


def test_where_the_thread_dies_the_signals_kill_as_without_a_kit(start: Callable[..., Waiting]) -> None:
    run = start(first="outlook.asked = None; signals._reasons = None")  # the first signal is its end
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ended()
    assert code == -signal.SIGTERM and "AttributeError" in errors


def test_a_process_whose_run_is_over_ends_at_the_first_signal_or_by_itself(start: Callable[..., Waiting]) -> None:
    run = start(first="signals.over(75)")
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ended()
    assert code == 75 and "SIGTERM: the run is over, its process ends at once" in errors
    run = start(first="signals.over(75)")
    code, errors = run.ended()
    assert code == 75 and "the run is over, but not its process after 2 s" in errors


def test_a_forked_child_tells_nobody_and_dies_of_sigterm_as_ever(start: Callable[..., Waiting]) -> None:
    run = start("a peer has failed")
    time.sleep(0.2)  # the child has let go of the pipe
    os.kill(run.child, signal.SIGUSR1)
    time.sleep(0.2)
    assert not is_zombie(run.child)
    os.kill(run.child, signal.SIGTERM)
    end = time.monotonic() + 5
    while not is_zombie(run.child) and time.monotonic() < end:
        time.sleep(0.01)
    assert is_zombie(run.child)
    time.sleep(1.3)  # longer than it takes to look whether a peer has failed
    assert run.process.poll() is None


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
