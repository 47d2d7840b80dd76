"""What to do next with a run: start it again, leave it, or call a person. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from resume_kit.errors import GivenUp, Problem, UsageError
from resume_kit.recovery.attempts import newest_attempt, shows_life
from resume_kit.recovery.history import Past, Story, read_story
from resume_kit.recovery.identity import is_dead

Word = Literal["restart", "finished", "stop", "running"]

Job = tuple[str | None, int]
"""A SLURM job (None outside SLURM), and how often it was started again."""

PARDONED = "pardoned"

#: Failures at the same step that are enough, where the run does not say.
GIVE_UP_AFTER = 3

_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")

#: Ends that count towards giving up. One that was fenced, preempted or refused says nothing of the step it was at.
_COUNTED = ("failed", "hung", "died")


@dataclass(frozen=True)
class Decision:
    """One word for a batch script, and the reason for a person."""

    word: Word
    reason: str


def decide(run: Path, *, give_up_after: int | None = None, job: Job = (None, 0), look_seconds: float = 6.0) -> Decision:
    """What a batch script does next. Looks for up to `look_seconds` whether the newest attempt is alive.

    give_up_after: None takes what the newest attempt was given. job: the SLURM job that asks, and how often it was
    started again. Where the newest attempt is not of this start, the job ended before it opened the run: that happens
    once, but where it happens again and again it is stopped, see `_without_attempt`.
    """
    alive = is_alive(run, look_seconds)
    story = read_story(run, alive=alive)
    if not alive and job[0] is not None and not (story.pasts and story.pasts[-1].slurm == job):
        return _without_attempt(story, job[0], job[1], give_up_after)
    return decision(story, alive=alive, give_up_after=give_up_after)


def decision(story: Story, *, alive: bool, give_up_after: int | None = None) -> Decision:
    """`decide` of a run that has been read, whoever asks."""
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
    if hopeless := given_up(story, give_up_after):
        return Decision("stop", str(hopeless))
    return Decision("restart", f"{which}: {newest.why}; the next goes on {_from(story)}")


def _without_attempt(story: Story, job: str, restarts: int, give_up_after: int | None) -> Decision:
    """For a start of a job that made no attempt: again, while fewer than `give_up_after` in a row made none."""
    if hopeless := given_up(story, give_up_after):
        return Decision("stop", str(hopeless))
    newest = max((past.slurm[1] for past in story.pasts if past.slurm and past.slurm[0] == job), default=-1)
    if newest > restarts:
        return Decision("stop", f"SLURM has started job {job} again meanwhile: the later start decides")
    starts = restarts - newest
    without = f"{starts} {'start of this job has' if starts == 1 else 'starts of this job have'} ended without opening"
    if starts >= _bound(story, give_up_after):
        return Decision("stop", f"{without} the run; see its output")
    return Decision("restart", f"{without} the run; the next goes on {_from(story)}")


def _from(story: Story) -> str:
    if story.newest_checkpoint is None:
        return "from the start: there is no checkpoint"
    return f"from the checkpoint of step {story.newest_checkpoint}"


def require_hope(run: Path, give_up_after: int | None = None) -> Story:
    """The run's story; raises `GivenUp`, with a diagnosis, when the last attempts all failed at the same step.

    Nothing is said of a run whose newest attempt is still alive: whoever wants to start it is told so elsewhere.
    Raises `UsageError` for a `give_up_after` below 1.
    """
    if give_up_after is not None and give_up_after < 1:
        raise UsageError(f"give_up_after is {give_up_after}; it must be at least 1")
    story = read_story(run, alive=False)
    hopeless = given_up(story, give_up_after)
    if hopeless and not is_alive(run):
        raise hopeless
    return story


def pardon(run: Path) -> int:
    """Let failures up to now count no more; the number of the newest attempt. `UsageError` where there is none."""
    newest = newest_attempt(run)
    if newest is None:
        raise UsageError(f"{run} has no attempts to pardon")
    (newest.folder / PARDONED).touch()
    return newest.number


def is_alive(run: Path, look_seconds: float = 6.0) -> bool:
    """Whether the newest attempt lives: it has not said its end, and gives a sign of life while one looks.

    `look_seconds` should cover two beats, of 2 s each.
    """
    newest = newest_attempt(run)
    if newest is None or newest.ended is not None:
        return False
    return not (newest.identity and is_dead(newest.identity)) and shows_life(newest.folder, look_seconds)


def given_up(story: Story, give_up_after: int | None = None) -> GivenUp | None:
    """The error that says why another start would only do as the last ones did; None where there is hope.

    There is none once `give_up_after` failures in a row made no progress: no step beyond that at which the first of
    them ended, no commit beyond the step that an attempt went on from. Under SLURM they must be of two starts of jobs,
    so that a bad node is left once, or three times as many. Attempts in between that were preempted or fenced are no
    failures, but what they trained counts. An attempt that went back to an older checkpoint begins anew. Nor is there
    hope once three times as many failures, going back or not, left the run at no later checkpoint, or three times as
    many attempts in a row, however they ended, came to no step.
    """
    bound, pasts = _bound(story, give_up_after), _that_count(story.pasts)
    if len(last := pasts[-3 * bound :]) == 3 * bound and not any(past.trained for past in last):
        return _before_any_step(story, last)
    line = _since_it_went_back(pasts)
    failures = [past for past in line if past.kind in _COUNTED]
    for number in range(bound, min(3 * bound, len(failures) + 1)):
        last = failures[-number:]
        starts = {past.slurm for past in last}
        if (len(starts) > 1 or starts == {None}) and not _progress(line, last[0]):
            return _diagnosis(story, last, f"without a step beyond {last[0].reached}")
    failures = [past for past in pasts if past.kind in _COUNTED]
    if len(last := failures[-3 * bound :]) == 3 * bound:
        left = [past.left for past in pasts if past.number >= last[0].number and past.left is not None]
        if not any(later > earlier for earlier, later in pairwise(left)):
            return _diagnosis(story, last, f"without a checkpoint beyond that of step {left[-1] if left else 0}")
    return None


def _bound(story: Story, give_up_after: int | None) -> int:
    return give_up_after or story.give_up_after or GIVE_UP_AFTER


def _since_it_went_back(pasts: list[Past]) -> list[Past]:
    """From the last attempt on that went on from an older checkpoint than the one before it had left."""
    begin, left = 0, 0
    for number, past in enumerate(pasts):
        if past.resumed_from is not None and past.resumed_from < left:
            begin = number
        left = left if past.left is None else past.left
    return pasts[begin:]


def _progress(pasts: list[Past], first: Past) -> bool:
    """Whether an attempt after `first` came further than that, or committed."""
    later = [past for past in pasts if past.number > first.number and past.last_step]
    return any(past.reached > first.reached or (past.left or 0) > (past.resumed_from or 0) for past in later)


def _that_count(pasts: list[Past]) -> list[Past]:
    """Attempts since the newest that was pardoned or finished. Of a run without folders nobody knows how they ended."""
    settled = [past.number for past in pasts if past.kind == "finished" or _is_pardoned(past)]
    return [past for past in pasts if past.folder is not None and past.number > max(settled, default=0)]


def _is_pardoned(past: Past) -> bool:
    return past.folder is not None and (past.folder / PARDONED).exists()


def _diagnosis(story: Story, failures: list[Past], what: str) -> GivenUp:
    """Each failure, and what they have in common: the host, the rank, the error."""
    said = [past.words[0] if past.words else None for past in failures]
    # who saw another end is not whom to suspect
    hosts = [past.host if word is None else word.host for word, past in zip(said, failures, strict=True)]
    ranks = [None if word is None else word.rank for word in said]
    second_hand = [word is not None and word.second_hand for word in said]
    shared = [
        _shared([past.reached for past in failures], "step"),
        _shared([None if so else host for so, host in zip(second_hand, hosts, strict=True)], "host"),
        _shared([None if so else rank for so, rank in zip(second_hand, ranks, strict=True)], "rank"),
        _shared([past.silent[0] if len(past.silent) == 1 else None for past in failures], "silent rank"),
        _shared([_NUMBERS.sub("#", word.error) if word else None for word in said], "error"),
    ]
    common = "; ".join(text for text in shared if text) or "nothing: neither host nor rank nor error"
    mend = f"mend what they died of, then let it start again: resume-kit retry {story.run}"
    problems = _ends("failure", failures)
    problems.append(Problem("in common", "", common, mend))
    return GivenUp(f"the run failed {len(failures)} times {what}; another start would only fail again", problems)


def _before_any_step(story: Story, pasts: list[Past]) -> GivenUp:
    what = "the job is asked to stop, or ends, before its first step"
    mend = f"give it the time to come there (--time, --signal, run.deadline), then: resume-kit retry {story.run}"
    problems = [*_ends("attempt", pasts), Problem("first step", "", what, mend)]
    return GivenUp(f"{len(pasts)} attempts in a row came to no step; another start would only do the same", problems)


def _ends(check: str, pasts: list[Past]) -> list[Problem]:
    return [
        Problem(check, f"attempt {past.number}, step {past.reached}, {past.host or 'host unknown'}", past.why)
        for past in pasts
    ]


def _shared(values: list[Hashable], name: str) -> str:
    """``the same host n2 3 of 3 times``, for a value that more than half have; else nothing."""
    value, times = Counter(values).most_common(1)[0]
    if value in (None, "") or 2 * times <= len(values):
        return ""
    return f"{name} {value} ({times} of {len(values)})"
