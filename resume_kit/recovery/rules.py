"""What to do next with a run: start it again, leave it, or call a person. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resume_kit.errors import GivenUp, Problem, UsageError
from resume_kit.recovery.attempts import read_attempts, shows_life
from resume_kit.recovery.history import Past, Story, read_story
from resume_kit.recovery.identity import is_dead

Word = Literal["restart", "finished", "stop", "running"]

PARDONED = "pardoned"

_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")

#: Ends that count towards giving up. One that was fenced, preempted or refused says nothing of the step it was at.
_COUNTED = ("failed", "hung", "died")


@dataclass(frozen=True)
class Decision:
    """One word for a batch script, and the reason for a person."""

    word: Word
    reason: str


def decide(run: Path, *, give_up_after: int = 3, since: float | None = None, look_seconds: float = 6.0) -> Decision:
    """What a batch script does next. Looks for up to `look_seconds` whether the newest attempt is alive.

    since: when the job began, in Unix seconds. A job that ended without an attempt of its own, over a wrong option for
    instance, would do so again and again, so it is stopped.
    """
    alive = is_alive(run, look_seconds)
    return decision(read_story(run, alive=alive), alive=alive, give_up_after=give_up_after, since=since)


def decision(story: Story, *, alive: bool, give_up_after: int = 3, since: float | None = None) -> Decision:
    """`decide` of a run that has been read."""
    if not story.pasts:
        return Decision("stop", "no attempt has been made: the job ended before it opened the run; see its output")
    newest = story.pasts[-1]
    which = f"attempt {newest.number}"
    if alive:
        return Decision("running", f"{which} is alive on {newest.host or 'some host'}")
    if newest.kind == "finished":
        return Decision("finished", f"{which} {newest.why}")
    if newest.kind == "refused":
        return Decision("stop", f"{which} was {newest.why}; a person must look")
    if since is not None and newest.started is not None and newest.started < since:
        return Decision("stop", f"{which} is older than this job, which made none of its own; see its output")
    if hopeless := given_up(story, give_up_after):
        return Decision("stop", str(hopeless))
    where = "from the start: there is no checkpoint"
    if story.newest_checkpoint is not None:
        where = f"from the checkpoint of step {story.newest_checkpoint}"
    return Decision("restart", f"{which}: {newest.why}; the next goes on {where}")


def require_hope(run: Path, give_up_after: int = 3) -> None:
    """Raise `GivenUp`, with a diagnosis, when the last attempts all failed at the same step.

    Nothing is said of a run whose newest attempt is still alive: whoever wants to start it is told so elsewhere.
    """
    story = read_story(run, alive=False)
    hopeless = given_up(story, give_up_after)
    if hopeless and not is_alive(run):
        raise hopeless


def pardon(run: Path) -> int:
    """Let failures up to now count no more; the number of the newest attempt. `UsageError` where there is none."""
    records = read_attempts(run)
    if not records:
        raise UsageError(f"{run} has no attempts to pardon")
    (records[-1].folder / PARDONED).touch()
    return records[-1].number


def is_alive(run: Path, look_seconds: float = 6.0) -> bool:
    """Whether the newest attempt lives: it has not said its end, and gives a sign of life while one looks.

    `look_seconds` should cover two beats, of 2 s each.
    """
    records = read_attempts(run)
    if not records or records[-1].ended is not None:
        return False
    identity = records[-1].identity
    return not (identity and is_dead(identity)) and shows_life(records[-1].folder, look_seconds)


def given_up(story: Story, give_up_after: int) -> GivenUp | None:
    """The error that says why another start would only fail again; None where there is hope.

    There is none once `give_up_after` failures in a row came to no step beyond that at which the first of them ended,
    or three times as many came to no new commit. Attempts in between that were preempted or fenced are no failures,
    but what they trained counts as progress.
    """
    pasts = _that_count(story.pasts)
    failures = [past for past in pasts if past.kind in _COUNTED]
    if len(last := failures[-give_up_after:]) == give_up_after:
        step = last[0].reached
        if not any(past.last_step and past.last_step.step > step for past in pasts if past.number > last[0].number):
            return _diagnosis(story, last, f"without a step beyond {step}")
    if len(last := failures[-3 * give_up_after :]) == 3 * give_up_after:
        newest = [commit.step for commit in story.commits if commit.attempt < last[0].number]
        later = [commit.step for commit in story.commits if commit.attempt >= last[0].number]
        if max(later, default=0) <= max(newest, default=0):
            return _diagnosis(story, last, "without a new checkpoint")
    return None


def _that_count(pasts: list[Past]) -> list[Past]:
    """Attempts since the newest that was pardoned or finished. Of a run without folders nobody knows how they ended."""
    settled = [past.number for past in pasts if past.kind == "finished" or _is_pardoned(past)]
    return [past for past in pasts if past.folder is not None and past.number > max(settled, default=0)]


def _is_pardoned(past: Past) -> bool:
    return past.folder is not None and (past.folder / PARDONED).exists()


def _diagnosis(story: Story, failures: list[Past], what: str) -> GivenUp:
    """Each failure, and what they have in common: the host, the rank, the error."""
    said = [past.words[0] if past.words else None for past in failures]
    shared = [
        _shared([past.reached for past in failures], "step"),
        _shared([word.host if word else past.host for word, past in zip(said, failures, strict=True)], "host"),
        _shared([word.rank if word else None for word in said], "rank"),
        _shared([_NUMBERS.sub("#", word.error) if word else None for word in said], "error"),
    ]
    common = "; ".join(text for text in shared if text) or "nothing: neither host nor rank nor error"
    mend = f"mend what they died of, then let it start again: resume-kit retry {story.run}"
    problems = [
        Problem("failure", f"attempt {past.number}, step {past.reached}, {past.host or 'host unknown'}", past.why)
        for past in failures
    ]
    problems.append(Problem("in common", "", common, mend))
    return GivenUp(f"the run failed {len(failures)} times {what}; another start would only fail again", problems)


def _shared(values: list[Hashable], name: str) -> str:
    """``the same host n2 3 of 3 times``, for a value that more than half have; else nothing."""
    value, times = Counter(values).most_common(1)[0]
    if value in (None, "") or 2 * times <= len(values):
        return ""
    return f"{name} {value} ({times} of {len(values)})"
