"""Rounds among real ranks: all get the result, or all get the same error, within the bound."""

from __future__ import annotations

import atexit
import functools
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import (
    CheckpointDamaged,
    Fenced,
    InconsistentState,
    Problem,
    RanksFailed,
    ReplayMismatch,
    ResumeKitError,
    ResumeRefused,
    SaveFailed,
    UsageError,
)
from tests.conftest import Ranks
from tests.ranks import RankFailure

T = TypeVar("T")

PAYLOADS: list[Any] = [
    float("nan"),
    -math.inf,
    -0.0,
    5e-324,
    (1, ("two", [3.0, None])),
    b"\x00\xff$bytes",
    {"$tuple": [1]},
    {1: "int key", "1": "text key"},
    {"value": {"error": "only a word"}},
    {"error": {"type": "", "headline": "not an error", "problems": []}},
    2**70,
]


def coordinator(timeout: float = 30.0) -> Coordinator:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Coordinator.of_default_group(timeout=timeout)


def departing(function: Callable[..., T]) -> Callable[..., T]:
    """A rank's function after which rank 0, whose process holds the store, waits for the others."""

    @functools.wraps(function)
    def with_farewell(*arguments: Any) -> T:
        value = function(*arguments)
        coordinator().depart()
        return value

    return with_farewell


def caught(action: Callable[[], Any]) -> dict[str, Any]:
    """What a round raised, in plain values."""
    start = time.monotonic()
    try:
        return {"value": action()}
    except ResumeKitError as error:
        seconds = time.monotonic() - start
        return {
            "class": type(error).__name__,
            "headline": error.headline,
            "problems": [(p.check, p.where, p.what, p.remedy) for p in error.problems],
            "failures": getattr(error, "failures", None),
            "text": str(error),
            "cause": repr(error.__cause__),
            "seconds": seconds,
        }


def seen_alike(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The one error that all ranks raised; cause and time are each rank's own."""
    common = [{key: value for key, value in a.items() if key not in ("cause", "seconds")} for a in answers]
    assert "class" in common[0], f"no error was raised: {common}"
    assert all(each == common[0] for each in common)
    return common[0]


def raise_on(rank: int, here: int, error: Exception, value: Any = None) -> Any:
    if rank == here:
        raise error
    return value


# -- results


@departing
def rounds(rank: int, world_size: int) -> dict[str, Any]:
    ranks = coordinator()
    drew = []

    def combine(values: list[int]) -> list[int]:
        drew.append(rank)
        return sorted(values, reverse=True)

    return {
        "round": ranks.round("squares", lambda: rank * rank, combine),
        "gather": ranks.gather("names", lambda: f"rank {rank}"),
        "zero": ranks.on_rank_zero("once", lambda: ["made by", rank]),
        "again": [ranks.gather("same name", lambda i=i: [i, rank]) for i in range(3)],
        "combined on": drew,
    }


def test_every_rank_gets_what_rank_zero_combined(ranks: Ranks) -> None:
    answers = ranks.run(rounds, 3)
    assert [answer.pop("combined on") for answer in answers] == [[0], [], []]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] == {
        "round": [4, 1, 0],
        "gather": ["rank 0", "rank 1", "rank 2"],
        "zero": ["made by", 0],
        "again": [[[i, rank] for rank in range(3)] for i in range(3)],
    }


@departing
def payloads(rank: int, world_size: int) -> list[Any]:
    ranks = coordinator()
    return [ranks.gather("payload", lambda p=payload: [rank, p]) for payload in PAYLOADS]


def test_values_that_json_cannot_say_survive(ranks: Ranks) -> None:
    for answer in ranks.run(payloads, 2):
        for sent, (first, second) in zip(PAYLOADS, answer, strict=True):
            assert first[0] == 0 and second[0] == 1
            for got in (first[1], second[1]):
                assert type(got) is type(sent)
                assert repr(got) == repr(sent)  # -0.0, NaN, tuples and key types included


@departing
def gather_waits(rank: int, world_size: int) -> tuple[float, float]:
    ranks = coordinator()
    ranks.gather("start", lambda: None)
    if rank == 1:
        time.sleep(0.4)
    arrived = time.monotonic()  # one clock for all processes of a host
    ranks.gather("end", lambda: None)
    return arrived, time.monotonic()


def test_a_round_holds_until_the_last_has_arrived(ranks: Ranks) -> None:
    answers = ranks.run(gather_waits, 2)
    last_arrival = max(arrived for arrived, _ in answers)
    assert all(left >= last_arrival for _, left in answers)


@departing
def shared_store(rank: int, world_size: int) -> list[Any]:
    first, second = coordinator(), coordinator()
    seen = []
    for number in range(5):
        seen.append(first.gather("same", lambda n=number: ["first", n, rank]))
        if rank == 0:
            time.sleep(0.05)  # a rank that looked at the other's keys would find a result at once
        seen.append(second.gather("same", lambda n=number: ["second", n, rank]))
    return seen


def test_two_coordinators_do_not_read_each_others_keys(ranks: Ranks) -> None:
    expected = [[[who, n, rank] for rank in range(2)] for n in range(5) for who in ("first", "second")]
    assert ranks.run(shared_store, 2) == [expected, expected]


@departing
def many_rounds(rank: int, world_size: int) -> list[int]:
    from torch.distributed import distributed_c10d as c10d

    ranks = coordinator()
    store = c10d._get_default_store()
    counts = []
    for number in range(100):
        ranks.gather(f"round {number % 3}", lambda: "x" * 100)
        if number % 10 == 7:
            caught(lambda: ranks.round("bad", lambda: raise_on(rank, 1, SaveFailed("no")), lambda v: v))
        if number in (9, 99):
            ranks.gather("nobody is ahead", lambda: None)
            counts.append(store.num_keys())
            ranks.gather("all have counted", lambda: None)
    return counts


def test_the_store_does_not_grow_with_the_rounds(ranks: Ranks) -> None:
    for early, late in ranks.run(many_rounds, 2):
        assert late <= early + 2  # the keys of the round that is under way


# -- errors


@departing
def one_fails(rank: int, world_size: int, kind: str, where: str) -> list[dict[str, Any]]:
    ranks = coordinator()
    errors: dict[str, Exception] = {
        cls.__name__: cls("it is bad", [Problem("check", where, "what is wrong", "what to do")])
        for cls in (UsageError, CheckpointDamaged, ResumeRefused, ReplayMismatch, SaveFailed, InconsistentState)
    }
    outcome = caught(lambda: ranks.round("step", lambda: raise_on(rank, 1, errors[kind]), lambda v: v))
    after = caught(lambda: ranks.gather("after", lambda: rank))
    return [outcome, after]


@pytest.mark.parametrize(
    "kind",
    ["UsageError", "CheckpointDamaged", "ResumeRefused", "ReplayMismatch", "SaveFailed", "InconsistentState"],
)
def test_an_error_of_ours_on_one_rank_is_raised_alike_on_all(kind: str, ranks: Ranks) -> None:
    answers = ranks.run(one_fails, 3, kind, "some file")
    error = seen_alike([outcome for outcome, _ in answers])
    assert error["class"] == kind
    assert error["headline"] == "it is bad"
    assert error["problems"] == [("check", "rank 1, some file", "what is wrong", "what to do")]
    # The error ended that round and nothing else: the next one works.
    assert [after for _, after in answers] == [{"value": [0, 1, 2]}] * 3


def test_a_place_that_names_a_rank_already_is_left_as_it_is(ranks: Ranks) -> None:
    error = seen_alike([outcome for outcome, _ in ranks.run(one_fails, 2, "SaveFailed", "rank 1, disk")])
    assert error["problems"][0][1] == "rank 1, disk"


def several_fail(rank: int, world_size: int, mixed: bool) -> dict[str, Any]:
    ranks = coordinator()

    def local() -> None:
        if rank == 0 and mixed:
            raise ResumeRefused("refused", [Problem("c", "w", "mixed in")])
        if rank == 1:
            raise SaveFailed("cannot save", [Problem("disk", "", "full"), Problem("disk", "b.bin", "torn")])
        if rank == 2:
            raise SaveFailed("cannot save", [Problem("disk", "", "full")])
        if rank == 3:
            raise SaveFailed("without problems")

    return caught(lambda: ranks.round("write", local, lambda v: v))


def test_the_problems_of_several_ranks_are_merged_and_name_them(ranks: Ranks) -> None:
    error = seen_alike(ranks.run(several_fail, 4, False))
    assert error["class"] == "SaveFailed"
    assert [(check, where, what) for check, where, what, _ in error["problems"]] == [
        ("disk", "ranks 1–2 (2)", "full"),
        ("disk", "rank 1, b.bin", "torn"),
        ("write", "rank 3", "without problems"),
    ]


def test_ranks_that_fail_differently_are_all_told(ranks: Ranks) -> None:
    error = seen_alike(ranks.run(several_fail, 4, True))
    assert error["class"] == "RanksFailed"
    assert [rank for rank, _ in error["failures"]] == [0, 1, 2, 3]
    assert "mixed in" in error["text"] and "b.bin: torn" in error["text"] and "without problems" in error["text"]


def some_fenced(rank: int, _world_size: int) -> dict[str, Any]:
    ranks = coordinator()

    def local() -> None:
        raise Fenced("superseded") if rank == 1 else SaveFailed("the directory is gone")

    return caught(lambda: ranks.round("write", local, lambda v: v))


def test_where_one_rank_sees_the_newer_attempt_all_are_fenced(ranks: Ranks) -> None:
    """Else a shared file system that is late makes the others report a disk fault, and start again."""
    error = seen_alike(ranks.run(some_fenced, 3))
    assert error["class"] == "Fenced" and "superseded" in error["text"]


def plain_error(rank: int, world_size: int, where: str) -> dict[str, Any]:
    ranks = coordinator()
    broken = ZeroDivisionError("by hand")

    def combine(values: list[Any]) -> Any:
        if where == "combine":
            raise broken
        return values

    local = (lambda: raise_on(rank, 1, broken)) if where == "local" else (lambda: rank)
    return caught(lambda: ranks.round("step", local, combine))


def test_a_plain_exception_on_one_rank_becomes_ranks_failed_on_all(ranks: Ranks) -> None:
    answers = ranks.run(plain_error, 3, "local")
    error = seen_alike(answers)
    assert error["class"] == "RanksFailed"
    assert error["failures"] == ((1, "ZeroDivisionError: by hand"),)
    assert "step failed on 1 rank(s)" in error["text"] and "rank 1: ZeroDivisionError: by hand" in error["text"]
    assert answers[1]["cause"] == "ZeroDivisionError('by hand')"  # its own traceback is not lost


def test_an_error_while_combining_reaches_all(ranks: Ranks) -> None:
    answers = ranks.run(plain_error, 2, "combine")
    assert "ZeroDivisionError: by hand" in seen_alike(answers)["text"]
    assert answers[0]["cause"] == "ZeroDivisionError('by hand')"


def combine_refuses(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    ranks = coordinator()

    def work() -> None:
        if kind == "ours":
            raise InconsistentState("they differ", [Problem("agree", "weights", "drifted", "resume")])
        raise RanksFailed("inner", [(1, "deep down")])

    return caught(lambda: ranks.on_rank_zero("judge", work))


def test_an_error_of_ours_while_combining_keeps_class_and_problems(ranks: Ranks) -> None:
    error = seen_alike(ranks.run(combine_refuses, 2, "ours"))
    assert error["class"] == "InconsistentState" and error["headline"] == "they differ"
    assert error["problems"] == [("agree", "weights", "drifted", "resume")]


def test_ranks_failed_passes_through_a_round_whole(ranks: Ranks) -> None:
    error = seen_alike(ranks.run(combine_refuses, 2, "nested"))
    assert error["class"] == "RanksFailed" and error["failures"] == ((1, "deep down"),)
    assert error["text"].startswith("inner failed on 1 rank(s)")


def unsendable(rank: int, world_size: int, from_combine: bool) -> dict[str, Any]:
    ranks = coordinator()
    if from_combine:
        return caught(lambda: ranks.on_rank_zero("payload", lambda: {1, 2}))
    return caught(lambda: ranks.gather("payload", lambda: {"deep": [object()]} if rank == 1 else None))


@pytest.mark.parametrize(("from_combine", "expected"), [(False, "payload.deep[0] holds a object"), (True, "set")])
def test_a_value_that_cannot_travel_fails_all_and_names_the_place(
    from_combine: bool, expected: str, ranks: Ranks
) -> None:
    error = seen_alike(ranks.run(unsendable, 2, from_combine))
    assert error["class"] == "UsageError" and expected in error["text"]


def slow_rank_one(rank: int) -> Coordinator:
    """A coordinator that on rank 1 is late to look for results."""
    ranks = coordinator()
    if rank == 1:
        wait = ranks._wait

        def late(*arguments: Any) -> dict[str, Any]:
            time.sleep(0.7)
            return wait(*arguments)

        ranks._wait = late
    return ranks


def slow_reader(rank: int, world_size: int) -> dict[str, Any]:
    ranks = slow_rank_one(rank)
    return caught(lambda: ranks.on_rank_zero("judge", lambda: raise_on(0, 0, SaveFailed("the disk is gone"))))


def test_an_error_reaches_a_slow_rank_though_rank_zero_ends_with_it(ranks: Ranks) -> None:
    """Rank 0's process holds the store: were it gone at once, the others would only see a broken connection."""
    assert seen_alike(ranks.run(slow_reader, 2))["headline"] == "the disk is gone"


def last_round(rank: int, world_size: int, end: str) -> str:
    ranks = slow_rank_one(rank)
    result = ranks.on_rank_zero("last", lambda: "all is written")
    if end == "departs":
        ranks.depart()
    elif end == "no farewell":
        atexit.unregister(ranks._leave)
    return result


@pytest.mark.parametrize("end", ["departs", "forgets"])
def test_the_last_result_reaches_a_slow_rank_before_rank_zero_ends(end: str, ranks: Ranks) -> None:
    assert ranks.run(last_round, 2, end) == ["all is written"] * 2


def test_a_rank_whose_store_is_gone_is_told_so(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match=r"last: the store is gone\n +\[last\] rank 1: the connection to the store"):
        ranks.run(last_round, 2, "no farewell")


ASKED = "first", "second", "third"


def on_without_a_store(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Rank 0, whose process holds the store, ends; rank 1 does not know, and goes on to ask."""
    ranks = coordinator()
    ranks.depart()
    return [caught(lambda n=name: ranks.gather(n, lambda: rank)) for name in ASKED] if rank else []


def test_every_round_after_the_store_is_gone_says_so(ranks: Ranks) -> None:
    """The first wait for it, the last cannot even be told its value."""
    _, told = ranks.run(on_without_a_store, 2)
    for name, error in zip(ASKED, told, strict=True):
        assert error["headline"] == f"{name}: the store is gone" and error["class"] == "ResumeKitError"


def test_a_rank_that_is_dead_at_the_end_holds_rank_zero_for_so_long_only() -> None:
    started = time.monotonic()
    Coordinator(dist.HashStore(), rank=0, world_size=2, timeout=0.2).depart()
    assert time.monotonic() - started < 5.0


# -- ranks that are missing


def missing(rank: int, world_size: int, absent: int, nap: float | None) -> dict[str, Any]:
    ranks = coordinator(timeout=1.0)
    ranks.gather("all are there", lambda: None)
    if rank == absent:
        if nap is None:
            return {}
        time.sleep(nap)
    outcome = caught(lambda: ranks.gather("step 7", lambda: rank))
    if rank == 0 != absent and nap is not None:
        time.sleep(nap)  # it holds the store
    return outcome


def test_a_rank_that_never_arrives_is_named_within_the_bound(ranks: Ranks) -> None:
    answers = ranks.run(missing, 3, 1, None)
    error = seen_alike([answers[0], answers[2]])
    assert error["class"] == "ResumeKitError"
    assert "[step 7]" in error["text"] and "rank 1 did not arrive within 1 s" in error["text"]
    assert error["problems"][0][3] != ""  # says what to do
    assert all(0.9 <= answers[rank]["seconds"] < 5.0 for rank in (0, 2))


def test_a_rank_that_comes_too_late_gets_the_same_error(ranks: Ranks) -> None:
    answers = ranks.run(missing, 2, 1, 2.0)
    assert "rank 1 did not arrive" in seen_alike(answers)["text"]
    assert answers[1]["seconds"] < 0.9  # the result was there already


def test_without_rank_zero_the_others_say_so_within_the_bound(ranks: Ranks) -> None:
    late, waiting = ranks.run(missing, 2, 0, 3.5)
    assert waiting["class"] == "ResumeKitError"
    assert "rank 0 sent no result within 2 s" in waiting["text"]
    assert 1.8 <= waiting["seconds"] < 3.4
    assert late == {"value": [0, 1]}  # it came after, and found what the other had left


# -- one process


def test_one_process_without_a_group_is_a_world_of_one() -> None:
    one = Coordinator.of_default_group(timeout=1.0)
    assert (one.rank, one.world_size) == (0, 1)
    assert one.gather("all", lambda: (1, b"2")) == [(1, b"2")]
    assert one.round("sum", lambda: 20, lambda values: sum(values) + 1) == 21
    assert one.on_rank_zero("once", lambda: "done") == "done"


def test_one_process_raises_as_many_do() -> None:
    one = Coordinator.of_default_group(timeout=1.0)
    with pytest.raises(RanksFailed, match="rank 0: KeyError: 'gone'") as plain:
        one.round("step", lambda: raise_on(0, 0, KeyError("gone")), lambda v: v)
    assert isinstance(plain.value.__cause__, KeyError)
    with pytest.raises(SaveFailed, match="full"):
        one.on_rank_zero("step", lambda: raise_on(0, 0, SaveFailed("full")))


def test_coordinators_of_one_process_are_apart() -> None:
    first, second = (Coordinator.of_default_group(timeout=0.2) for _ in range(2))
    assert first.gather("same", lambda: "first") == ["first"]
    assert second.gather("same", lambda: "second") == ["second"]
