"""What happened to a run, attempt by attempt, from attempts/ and the journal. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from resume_kit.checkpoint.names import committed_steps
from resume_kit.recovery.attempts import AttemptRecord, read_attempts
from resume_kit.recovery.identity import Identity
from resume_kit.recovery.traces import Commit, Moment, Trace, Traces, read_traces

Kind = Literal["finished", "preempted", "failed", "hung", "fenced", "refused", "died", "open"]
"""How an attempt ended. died: without a word. open: the newest one has not ended, or died just now."""

#: Errors that tell of another process's end.
_SECOND_HAND = re.compile(r"killed by signal|connection (reset|closed)|broken pipe|peer", re.IGNORECASE)

FAILURES: frozenset[Kind] = frozenset({"failed", "hung", "died", "fenced"})
"""Ends that nobody planned."""


@dataclass(frozen=True)
class LastWord:
    """What one rank said before it ended."""

    rank: int | None
    host: str
    step: int | None
    kind: str
    error: str
    time: float

    @property
    def second_hand(self) -> bool:
        """Whether it only tells of another process's end, so that the cause is elsewhere."""
        return self.kind == "failed" and bool(_SECOND_HAND.search(self.error))

    def __str__(self) -> str:
        who = "rank ?" if self.rank is None else f"rank {self.rank}"
        return f"{who} on {self.host}: {self.error}" if self.host else f"{who}: {self.error}"


@dataclass(frozen=True)
class Past:
    """One attempt of a run. Times are Unix seconds, durations seconds.

    ended: for a death without a word the last sign of life. why: one line for a person. slurm: the job and how often it
    was started again. silent: where all words are second hand, the ranks without any. lost_steps: steps it trained
    that no later attempt goes on from, lost_samples the same in samples. step_seconds: the median. to_first_step: from
    the end of the attempt before to the first step of this. phases: how that time was spent, as far as known: `gap`
    (until the process started: noticing, scheduling), `start` (imports, engine), `open` (the run directory), the stages
    of the resume and `other` of it, `first step`.
    """

    number: int
    kind: Kind
    why: str
    started: float | None = None
    ended: float | None = None
    host: str = ""
    job: str = ""
    slurm: tuple[str, int] | None = None
    world_size: int | None = None
    topology: Mapping[str, Any] = field(default_factory=dict)
    global_batch_size: int | None = None
    resumed_from: int | None = None
    first_step: Moment | None = None
    last_step: Moment | None = None
    trained: int = 0
    last_commit: Commit | None = None
    commits: int = 0
    lost_steps: int = 0
    lost_samples: int | None = 0
    step_seconds: float | None = None
    to_first_step: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    words: tuple[LastWord, ...] = ()
    silent: tuple[int, ...] = ()
    folder: Path | None = None

    @property
    def is_failure(self) -> bool:
        return self.kind in FAILURES

    @property
    def seconds(self) -> float:
        """How long it lasted, at least."""
        return max(0.0, self.ended - self.started) if self.started and self.ended else 0.0

    @property
    def reached(self) -> int:
        """The step at which it ended: the last it trained, else that it went on from."""
        return self.last_step.step if self.last_step else self.resumed_from or 0

    @property
    def left(self) -> int | None:
        """The step of the checkpoint that it left to the next; None where it did not come so far as to resume."""
        return self.last_commit.step if self.last_commit else self.resumed_from

    def kept_up_to(self, step: float) -> int:
        """How many of the steps it trained stand, where all after `step` are trained again."""
        if self.resumed_from is None:
            return 0
        return max(0, min(self.trained, int(min(step, self.reached)) - self.resumed_from))


@dataclass(frozen=True)
class Story:
    """All that is known of a run. commits: of all attempts, in the journal's order. stale: lines of the journal that
    an attempt wrote after a newer one had begun. curves: some of each attempt's steps, evenly picked. give_up_after: as
    the newest attempt was configured."""

    run: Path
    run_id: str | None
    pasts: list[Past]
    commits: list[Commit]
    skipped: int
    stale: int
    newest_checkpoint: int | None
    curves: Mapping[int, Sequence[Moment]]
    give_up_after: int | None = None


def history(run: Path, *, alive: bool | None = None) -> list[Past]:
    """All attempts, oldest first; see `read_story`."""
    return read_story(run, alive=alive).pasts


def read_story(run: Path, *, alive: bool | None = None) -> Story:
    """Read attempts/ and, in one pass, the journal. Raises `CheckpointDamaged` when the journal cannot be read.

    alive: what is known of the newest attempt, if it has not said its end: False makes it one that died.
    """
    records = {record.number: record for record in read_attempts(run)}
    traces = read_traces(run)
    newest_checkpoint = max(committed_steps(run), default=None)
    numbers = sorted({*records, *traces.of})
    numbers = [n for n in numbers if n == numbers[-1] or n in traces.of or records[n].started is not None]
    pasts: list[Past] = []
    for number in numbers:
        record, newest = records.get(number), number == numbers[-1]
        past = _past(record, traces.of.get(number, Trace(number)))
        if past.kind == "died" and newest and alive is not False:
            past = replace(past, kind="open", why="runs" if alive else "no word of its end yet")
        elif past.kind == "died" and record and record.asked is not None:
            by = f"{record.asked.get('signal')} on rank {record.asked.get('rank')}"
            past = replace(past, kind="preempted", why=f"asked to stop by {by}, killed before it had saved")
        pasts.append(_after(past, traces, pasts[-1]) if pasts else past)
    pasts = list(reversed([*_with_losses(pasts, newest_checkpoint or 0)]))
    commits = [commit for trace in traces.of.values() for commit in trace.commits]
    curves = {number: trace.curve for number, trace in traces.of.items()}
    skipped = sum(trace.skipped for trace in traces.of.values())
    bound = _size(records[numbers[-1]].give_up_after) if numbers and numbers[-1] in records else None
    return Story(run, traces.run_id, pasts, commits, skipped, traces.stale, newest_checkpoint, curves, bound)


def _past(record: AttemptRecord | None, trace: Trace) -> Past:
    words = _words(record)
    world_size = _size((record and record.world_size) or trace.start.get("world_size"))
    silent = _silent(record, words, world_size)
    kind, why = _end(record, trace, words, silent)
    identity = record.identity if record else None
    return Past(
        number=trace.number,
        kind=kind,
        why=why,
        started=_first(record and record.started, trace.start.get("time")),
        ended=_ended(record, trace, words),
        host=str(identity.host) if identity else str(trace.start.get("host") or ""),
        job=_job(identity),
        slurm=_slurm(identity),
        world_size=world_size,
        topology=_mapping(trace.start.get("topology")),
        global_batch_size=_size(trace.start.get("global_batch_size")),
        resumed_from=trace.resumed_from,
        first_step=trace.first_step,
        last_step=trace.last_step,
        trained=trace.trained,
        last_commit=trace.commits[-1] if trace.commits else None,
        commits=len(trace.commits),
        step_seconds=trace.step_seconds,
        words=words,
        silent=silent,
        folder=record.folder if record else None,
    )


def _words(record: AttemptRecord | None) -> tuple[LastWord, ...]:
    """Oldest first; those who were waiting for the others in a hang come last, and those who saw others end."""
    found = [
        LastWord(
            rank=_integer(word.get("rank")),
            host=str(word.get("host") or ""),
            step=_integer(word.get("step")),
            kind=str(word.get("kind") or "failed"),
            error=" ".join(str(word.get("error") or "no error told").split()),
            time=_first(word.get("time")) or 0.0,
        )
        for word in (record.last_words if record else ())
    ]
    waited = {word: word.second_hand or (word.kind == "hung" and "exchange" in word.error) for word in found}
    return tuple(sorted(found, key=lambda word: (waited[word], word.time)))


def _silent(record: AttemptRecord | None, words: tuple[LastWord, ...], world_size: int | None) -> tuple[int, ...]:
    """The ranks that left no word, where what the others say is second hand."""
    if not words or not words[0].second_hand:
        return ()
    spoke = {word.rank for word in words} | ({0} if record and record.ended is not None else set())
    return tuple(rank for rank in range(min(world_size or 0, 10**5)) if rank not in spoke)


def _end(
    record: AttemptRecord | None, trace: Trace, words: tuple[LastWord, ...], silent: tuple[int, ...]
) -> tuple[Kind, str]:
    ended = (record and record.ended) or _journaled_end(trace)
    reason, by = str(ended.get("reason", "")), " ".join(str(ended.get("by") or "").split())
    if reason == "finished":
        return "finished", f"finished at step {ended.get('step')}"
    if reason == "preempted":
        return "preempted", f"preempted by {by}" if by else "preempted"
    if reason == "refused":
        return "refused", f"refused: {by}" if by else "refused"
    if reason == "fenced" or (words and words[0].kind == "fenced"):
        return "fenced", f"fenced: {by or words[0].error}" if by or words else "fenced by a newer attempt"
    if (words[0].error if words else by).startswith("KeyboardInterrupt"):
        return "preempted", "stopped by a person (KeyboardInterrupt)"
    if words:
        kind: Kind = "hung" if words[0].kind == "hung" else "failed"
        at = f" at step {words[0].step}" if words[0].step is not None else ""
        return kind, f"{kind}{at}: {words[0]}{_without_a_word(silent)}"
    if reason:
        return "failed", f"failed: {by}" if by else "failed"
    return "died", "died without a word"


def _without_a_word(silent: tuple[int, ...]) -> str:
    if not silent:
        return ""
    some = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
    first = "and may have died first" if len(silent) == 1 else "and one of them may have died first"
    return f"; rank{'s' if len(silent) > 1 else ''} {some} left no word {first}"


def _journaled_end(trace: Trace) -> Mapping[str, Any]:
    """The end in the terms of ended.json, from the journal: of runs made before there were folders."""
    event = trace.closing
    if event is None:
        return {}
    reason = {"end": "finished", "preempt": "preempted", "refuse": "refused", "fenced": "fenced"}[event["event"]]
    by = event.get("by", event.get("reason"))
    return {"reason": reason, "step": event.get("step"), "time": event["time"], "by": by}


def _ended(record: AttemptRecord | None, trace: Trace, words: tuple[LastWord, ...]) -> float | None:
    told = _first(_mapping(record and record.ended).get("time"), *(word.time for word in words))
    if told is not None:
        return told
    files = (_mapping(record and record.alive), _mapping(record and record.asked))
    signs = (trace.last_sign, *(_first(file.get("time")) for file in files), _first(record and record.started))
    return max((sign for sign in signs if sign is not None), default=None)


def _after(past: Past, traces: Traces, before: Past) -> Past:
    """`past` with the way from the end of the attempt before to its first step."""
    trace = traces.of.get(past.number, Trace(past.number))
    opened, resumed = _first(trace.start.get("time")), _first(trace.resume.get("time"))
    process = _first(trace.start.get("process_started"))
    first = past.first_step.time if past.first_step else None
    told = _mapping(trace.resume.get("seconds"))
    stages = {
        str(stage): _first(s) for stage, s in _mapping(_mapping(trace.resume.get("report")).get("seconds")).items()
    }
    whole = _first(told.get("resume"))
    phases = {
        "gap": _between(before.ended, process if process is not None else opened),
        "start": _first(told.get("before_kit"), _between(process, opened)),
        "open": _first(told.get("opening")),
        **stages,
        "other": None if whole is None else max(0.0, whole - sum(s for s in stages.values() if s is not None)),
        "first step": _between(resumed if resumed is not None else opened, first),
    }
    known = {phase: seconds for phase, seconds in phases.items() if seconds is not None}
    return replace(past, to_first_step=_between(before.ended, first), phases=known)


def _with_losses(pasts: list[Past], newest_checkpoint: int) -> Iterator[Past]:
    """Newest first: what each trained that no later attempt goes on from, nor the next one will."""
    standing: float = math.inf
    if pasts and pasts[-1].kind not in ("finished", "open"):
        standing = newest_checkpoint
    for past in reversed(pasts):
        lost = past.trained - past.kept_up_to(standing)
        samples = lost * past.global_batch_size if past.global_batch_size is not None else None
        yield replace(past, lost_steps=lost, lost_samples=samples if lost else 0)
        if past.resumed_from is not None:
            standing = min(standing, past.resumed_from)


def _slurm(identity: Identity | None) -> tuple[str, int] | None:
    if identity is None or not isinstance(identity.slurm_job, str):
        return None
    return identity.slurm_job, _integer(identity.slurm_restarts) or 0


def _job(identity: Identity | None) -> str:
    """``SLURM 1234.2``: the job, and how often it was requeued; or torchrun's id, and how often it restarted."""
    if identity is None:
        return ""
    if identity.slurm_job is not None:
        return f"SLURM {identity.slurm_job}" + (f".{identity.slurm_restarts}" if identity.slurm_restarts else "")
    if identity.elastic_run is not None:
        return str(identity.elastic_run) + (f".{identity.elastic_restarts}" if identity.elastic_restarts else "")
    return ""


def _first(*values: object) -> float | None:
    """The first that is a number of this world."""
    numbers = (v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
    return next((float(v) for v in numbers if abs(v) < 1e15), None)


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _size(value: object) -> int | None:
    size = _integer(value)
    return size if size is not None and 0 < size < 10**9 else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
