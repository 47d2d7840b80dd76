"""The journal: figures come back bit for bit, and nothing that a crash or a stranger wrote stops a reader."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.checkpoint.names import JOURNAL
from resume_kit.errors import CheckpointDamaged, SaveFailed
from resume_kit.recovery import events
from resume_kit.recovery.events import JournalLines, last_number
from resume_kit.run.journal import (
    EVENTS,
    Journal,
    last_attempt,
    last_commit,
    number,
    read_journal,
    run_id_of,
)

FLOATS = [
    0.1,
    -0.0,
    0.0,
    5e-324,  # the smallest subnormal
    2.2250738585072009e-308,  # the largest subnormal
    1.7976931348623157e308,
    2.718281828459045,
    1 / 3,
    math.inf,
    -math.inf,
    math.nan,
]


def bits(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


def write(run: Path, *events: tuple[str, dict[str, Any]], attempt: int = 1) -> None:
    journal = Journal(run, attempt=attempt)
    for event, fields in events:
        journal.write(event, fields)
    journal.close()


def append(run: Path, raw: bytes) -> None:
    with (run / JOURNAL).open("ab") as file:
        file.write(raw)


def step(number: int, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "step", {"step": number, **fields}


def steps_after(run: Path, after: int) -> dict[int, dict[str, Any]]:
    """The newest event of every later step, with figures as numbers."""
    return {
        record["step"]: {key: number(value) for key, value in record.items()}
        for record in read_journal(run)
        if record["event"] == "step" and record["step"] > after
    }


def losses(run: Path) -> list[Any]:
    return [record["loss"] for record in read_journal(run) if record["event"] == "step"]


@pytest.mark.parametrize("value", FLOATS)
def test_a_float_comes_back_bit_for_bit(value: float, tmp_path: Path) -> None:
    write(tmp_path, step(1, loss=value))
    (record,) = read_journal(tmp_path)
    assert bits(number(record["loss"])) == bits(value)
    assert bits(steps_after(tmp_path, 0)[1]["loss"]) == bits(value)


@given(values=st.lists(st.floats(), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_float_comes_back_bit_for_bit(values: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    write(run, *(step(i, loss=value) for i, value in enumerate(values)))
    found = steps_after(run, -1)
    assert [bits(found[i]["loss"]) for i in range(len(values))] == [bits(value) for value in values]


def test_every_line_is_strict_json_even_with_non_finite_figures_deep_inside(tmp_path: Path) -> None:
    write(tmp_path, ("resume", {"report": {"gate": [math.nan, (math.inf, {"x": -math.inf})], 3: 1.5}}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / JOURNAL).read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record["report"] == {"gate": ["NaN", ["Infinity", {"x": "-Infinity"}]], "3": 1.5}


def test_words_are_not_figures() -> None:
    assert number("text") == "text" and number(7) == 7 and number(None) is None
    assert math.isnan(number("NaN")) and number("-Infinity") == -math.inf


def test_events_carry_attempt_and_time_and_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path, ("start", {"run_id": "a"}), step(1), attempt=4)
    write(tmp_path, ("start", {"run_id": "b"}), attempt=5)
    records = list(read_journal(tmp_path))
    assert [(record["event"], record["attempt"]) for record in records] == [("start", 4), ("step", 4), ("start", 5)]
    assert all(isinstance(record["time"], float) for record in records)
    assert run_id_of(tmp_path) == "a" and last_attempt(tmp_path) == 5


def test_an_unknown_event_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, attempt=1)
    with pytest.raises(ValueError, match="unknown event 'stpe'"):
        journal.write("stpe", {})
    journal.close()
    assert (tmp_path / JOURNAL).read_bytes() == b""
    write(tmp_path, *((event, {}) for event in sorted(EVENTS)))
    assert [record["event"] for record in read_journal(tmp_path)] == sorted(EVENTS)


def test_a_value_that_json_cannot_say_leaves_no_half_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, attempt=1)
    with pytest.raises(TypeError):
        journal.write("step", {"step": 1, "loss": object()})
    journal.write("step", {"step": 2, "loss": 1.0})
    journal.close()
    assert losses(tmp_path) == [1.0]


# -- crashes


def test_wherever_the_last_line_is_cut_off_the_others_stand_and_writing_goes_on(tmp_path: Path) -> None:
    write(tmp_path, step(1, loss=0.5), step(2, loss=0.25))
    whole = (tmp_path / JOURNAL).read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        (tmp_path / JOURNAL).write_bytes(whole[:cut])
        # A line that lacks only its newline is whole: all of its figures are there.
        survivors = [0.5, 0.25] if cut == len(whole) - 1 else [0.5]
        assert losses(tmp_path) == survivors, cut
        write(tmp_path, step(3, loss=4.0), attempt=2)
        assert losses(tmp_path) == [*survivors, 4.0], cut


def test_a_tear_within_a_character_does_not_stop_the_reader(tmp_path: Path) -> None:
    write(tmp_path, step(1, loss=0.5))
    append(tmp_path, '{"event":"step","step":2,"note":"ä'.encode()[:-1])
    assert losses(tmp_path) == [0.5]
    write(tmp_path, step(2, loss=0.75), attempt=2)
    assert losses(tmp_path) == [0.5, 0.75]


def test_a_whole_journal_is_not_changed_by_opening_it(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    before = (tmp_path / JOURNAL).read_bytes()
    Journal(tmp_path, attempt=2).close()
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_durable_event_is_fsynced_after_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / JOURNAL).read_bytes().count(b"\n")))
    journal = Journal(tmp_path, attempt=1)
    journal.write("step", {"step": 1})
    assert synced == []
    journal.write("commit", {"step": 1}, durable=True)
    journal.close()
    assert synced == [2]


def test_events_of_two_writers_do_not_mix(tmp_path: Path) -> None:
    one, two = Journal(tmp_path, attempt=1), Journal(tmp_path, attempt=2)
    for i in range(50):
        one.write("step", {"step": i, "pad": "x" * 5000})
        two.write("step", {"step": i, "pad": "y" * 300})
    one.close()
    two.close()
    assert [record["attempt"] for record in read_journal(tmp_path)] == [1, 2] * 50


def test_a_full_disk_in_the_middle_of_a_line_costs_that_line_only(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a write short just as a full disk does: first a short write, then an error."""
    write(tmp_path, step(1, loss=0.5))
    size = (tmp_path / JOURNAL).stat().st_size
    journal = Journal(tmp_path, attempt=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(SaveFailed, match=r"cannot write journal\.jsonl"):
            journal.write("step", {"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.write("step", {"step": 3, "loss": 0.125})
    journal.close()
    assert losses(tmp_path) == [0.5, 0.125]


# -- strangers

GARBAGE = {
    "empty line": b"\n",
    "text": b"hello world\n",
    "binary": bytes(range(256)) + b"\n",
    "half of JSON": b'{"event": "step", "step"\n',
    "a number": b"17\n",
    "a list": b'["step", 1]\n',
    "null": b"null\n",
    "an unknown event": b'{"event": "party", "attempt": 99, "step": 99}\n',
    "no event": b'{"attempt": 99, "step": 99}\n',
    "an event that is a list": b'{"event": ["step"], "attempt": 99}\n',
    "an event that is an object": b'{"event": {}, "attempt": 99}\n',
    "an event that is a number": b'{"event": 1}\n',
    "a known event of nobody": b'{"event": "start"}\n{"event": "step", "step": 9, "loss": 1}\n',
    "a known event of a name": b'{"event": "step", "attempt": "x", "step": 9}\n',
    "a deep nest": b"[" * 200_000 + b"\n",
    "Windows line end": b'{"event": "x"}\r\n',
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_other_peoples_lines_are_passed_over(garbage: str, place: str, tmp_path: Path) -> None:
    if place == "before":
        append(tmp_path, GARBAGE[garbage])
    write(tmp_path, ("start", {"run_id": "a"}), step(1, loss=0.5), attempt=3)
    if place == "between":
        append(tmp_path, GARBAGE[garbage])
    write(tmp_path, step(2, loss=0.25), attempt=3)
    if place == "after":
        append(tmp_path, GARBAGE[garbage])
    assert losses(tmp_path) == [0.5, 0.25]
    assert last_attempt(tmp_path) == 3 and run_id_of(tmp_path) == "a"
    assert sorted(steps_after(tmp_path, 1)) == [2]


def test_a_journal_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).mkdir()
    for read in (lambda: list(read_journal(tmp_path)), lambda: last_attempt(tmp_path), lambda: run_id_of(tmp_path)):
        with pytest.raises(CheckpointDamaged, match=r"journal\.jsonl: cannot be read: Is a directory"):
            read()


def test_a_new_run_has_no_events(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path)) == [] and last_attempt(tmp_path) == 0
    assert run_id_of(tmp_path) is None and steps_after(tmp_path, 0) == {}


# -- what is asked of it


def test_lines_that_cannot_be_read_are_counted_but_for_each_attempts_last(tmp_path: Path) -> None:
    write(tmp_path, ("start", {}), step(1, loss=0.5))
    append(tmp_path, b'\n{"event":"step"\n\n\xff\n')  # two in a row: the first was not the last line
    write(tmp_path, ("start", {}), step(2, loss=0.5), attempt=2)
    append(tmp_path, b"not JSON\n")  # in the middle of attempt 2
    write(tmp_path, step(3, loss=0.5), attempt=2)
    append(tmp_path, b'{"event":"st')
    lines = JournalLines(tmp_path)
    assert len(list(lines)) == 5 and lines.unreadable == 2
    append(tmp_path, b'"\n')
    write(tmp_path, step(3, loss=0.5), ("start", {}), attempt=3)
    for lines, count in ((JournalLines(tmp_path), 7), (JournalLines(tmp_path, steps_after=3), 3)):
        assert len(list(lines)) == count and lines.unreadable == 3  # a step that is passed over is a line all the same
    (tmp_path / JOURNAL).unlink()
    assert list(lines) == [] and lines.unreadable == 0


def test_of_some_kinds_only_stale_ones_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, ("start", {}), step(1), ("commit", {"step": 1}))
    write(tmp_path, ("start", {}), ("save", {"note": '"commit"'}), attempt=2)
    write(tmp_path, ("commit", {"step": 9}), attempt=1)
    write(tmp_path, ("commit", {"step": 3}), attempt=2)
    lines = JournalLines(tmp_path, {"commit"})
    assert [event["step"] for event in lines] == [1, 3] and lines.stale == 1
    assert last_commit(tmp_path) == 3


def test_steps_are_read_as_far_as_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads a journal of a million steps: those that nothing is asked of must not be parsed."""
    write(tmp_path, ("start", {}), *(step(n, loss=n / 7, batch="ab") for n in range(1, 6)))
    write(tmp_path, ("start", {}), step(3, loss=math.nan, batch="ab"), attempt=2)
    write(tmp_path, step(4, loss=0.5), attempt=1)  # stale
    whole = list(JournalLines(tmp_path))
    parse, parsed = events._parsed, []
    monkeypatch.setattr(events, "_parsed", lambda line: parsed.append(line) or parse(line))
    brief = [{name: event[name] for name in ("event", "attempt", "time", *event.keys() & {"step"})} for event in whole]
    lines = JournalLines(tmp_path, figures=False)
    assert list(lines) == brief and lines.stale == 1 and len(parsed) == 2  # the starts
    parsed.clear()
    later = JournalLines(tmp_path, steps_after=4)
    assert list(later) == [event for event in whole if event.get("step", 9) > 4] and len(parsed) == 3
    parsed.clear()
    assert list(JournalLines(tmp_path, {"commit"})) == [] and len(parsed) == 2


def test_a_line_that_only_begins_as_a_step_is_parsed_whole(tmp_path: Path) -> None:
    """Cut off, or written into by another process: it is no step, whatever is wanted of it."""
    begun = b'{"event":"step","attempt":1,"time":1.5,"step":1,"lo'
    write(tmp_path, ("start", {}), step(1, loss=0.5))
    for rest in (b'{"event":"commit"}\n', b"\n", b'ss":0.5}}\n'):
        append(tmp_path, begun + rest)
    write(tmp_path, step(2, loss=0.5))
    for lines, steps in ((JournalLines(tmp_path, figures=False), 2), (JournalLines(tmp_path, steps_after=1), 1)):
        assert sum(event["event"] == "step" for event in lines) == steps and lines.unreadable == 3


def test_the_newest_attempt_is_found_at_the_end_however_long_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_TAIL", 200)
    assert last_number(tmp_path) == 0
    write(tmp_path, ("start", {}), *(step(n) for n in range(100)), attempt=6)
    parse, parsed = events._parsed, []
    monkeypatch.setattr(events, "_parsed", lambda line: parsed.append(line) or parse(line))
    assert last_number(tmp_path) == 6 and len(parsed) < 10
    write(tmp_path, ("start", {}), ("resume", {"report": "x" * 1000}), attempt=7)
    assert last_number(tmp_path) == 7  # of a line that is longer than that


def test_the_last_attempt_is_the_highest_whatever_wrote_last(tmp_path: Path) -> None:
    write(tmp_path, step(1), attempt=7)
    write(tmp_path, step(1), attempt=2)
    assert last_attempt(tmp_path) == 7


def test_of_a_step_that_was_trained_twice_the_newest_counts(tmp_path: Path) -> None:
    write(tmp_path, step(1, loss=1.0), step(2, loss=2.0), step(3, loss=3.0))
    write(tmp_path, ("save", {"step": 9}), step(2, loss=20.0), attempt=2)
    found = steps_after(tmp_path, 1)
    assert {n: (record["loss"], record["attempt"]) for n, record in found.items()} == {2: (20.0, 2), 3: (3.0, 1)}
    assert steps_after(tmp_path, 3) == {}  # strictly later; and a save is not a step
