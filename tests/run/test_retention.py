"""What may be deleted, and that nothing else ever is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.checkpoint import names
from resume_kit.errors import UsageError
from resume_kit.integrity.verify import quick_problems
from resume_kit.run.retention import Retention, prune, set_aside, settle_leftovers
from tests.checkpoints import Recipe, commit, stage

STEPS = st.sets(st.integers(0, 400), max_size=30)
POLICIES = st.builds(Retention, keep_last=st.integers(2, 6), keep_every=st.none() | st.integers(1, 50))

LOOK_ALIKES = [
    "step-42",
    "step-0000000042",
    "step-000000042.bak",
    "step-000000042 ",
    "my-step-000000042",
    "Step-000000042",
    "step-00000004x",
    ".staging-step-000000042",
    ".staging-step-42-attempt-1",
    ".staging-step-000000042-attempt-",
    ".staging-step-000000042-attempt-1.tar",
    ".replaced-step-000000042-attempt-one",
    ".removed-",
    ".removed-my-thesis",
    ".removed-step-000000042~",
    "set-aside",
    "notes",
]


def old_torn(step: int, attempt: int) -> str:
    """What versions without grounds left in the run directory."""
    return f".staging-step-{step:09d}-attempt-{attempt}"


def old_replaced(step: int, attempt: int) -> str:
    return f".replaced-step-{step:09d}-attempt-{attempt}"


def old_removed(name: str) -> str:
    return f".removed-{name}"


def ground(run: Path, attempt: int = 1) -> Path:
    place = names.ground(run, attempt)
    place.mkdir(parents=True, exist_ok=True)
    return place


def look_alikes(run: Path) -> dict[str, bytes]:
    for name in LOOK_ALIKES:
        (run / name).mkdir(parents=True)
        (run / name / "precious").write_bytes(name.encode())
    (run / "step-000000043").write_bytes(b"a file, not a directory")
    (run / ".staging-step-000000043-attempt-1").write_bytes(b"this too")
    return contents(run)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def checkpoint(run: Path, name: str) -> dict[str, bytes]:
    return contents(run / name)


def damage(run: Path, step: int) -> None:
    (run / names.step_directory(step) / names.index_file(0)).write_bytes(b"no longer an index")


# -- decisions


@given(STEPS, POLICIES)
def test_decisions_keep_the_newest_and_every_multiple_and_nothing_else(steps: set[int], policy: Retention) -> None:
    doomed = policy.expendable(random.Random(1).sample(sorted(steps), len(steps)))
    assert doomed == sorted(set(doomed)) and set(doomed) <= steps
    for step in steps:
        among_last = sum(other > step for other in steps) < policy.keep_last
        multiple = policy.keep_every is not None and step % policy.keep_every == 0
        assert (step not in doomed) == (among_last or multiple)


@given(STEPS, POLICIES)
def test_deciding_twice_changes_nothing(steps: set[int], policy: Retention) -> None:
    kept = steps - set(policy.expendable(steps))
    assert policy.expendable(kept) == []


@given(STEPS, POLICIES)
def test_pruning_after_every_save_keeps_what_one_pruning_keeps(steps: set[int], policy: Retention) -> None:
    there: set[int] = set()
    for step in sorted(steps):
        there.add(step)
        there -= set(policy.expendable(there))
    assert there == steps - set(policy.expendable(steps))


@pytest.mark.parametrize("keep_last", [1, 0, -3])
def test_fewer_than_two_are_refused(keep_last: int) -> None:
    with pytest.raises(UsageError, match=f"keep_last is {keep_last}; keep at least 2"):
        Retention(keep_last=keep_last)


@pytest.mark.parametrize("keep_every", [0, -5])
def test_a_period_below_one_is_refused(keep_every: int) -> None:
    with pytest.raises(UsageError, match=f"keep_every is {keep_every}"):
        Retention(keep_every=keep_every)


# -- pruning


def test_prune_deletes_what_is_expendable_whole_and_touches_no_other_name(run_dir: Path) -> None:
    others = look_alikes(run_dir)
    for step in (1, 2, 3, 4, 5):
        commit(run_dir, step)
    kept = {f"{names.step_directory(s)}/{k}": v for s in (2, 4, 5) for k, v in checkpoint(
        run_dir, names.step_directory(s)).items()}  # fmt: skip
    assert prune(run_dir, Retention(keep_last=2, keep_every=2), ground(run_dir)) == [1, 3]
    assert contents(run_dir) == {**others, **kept}
    assert prune(run_dir, Retention(keep_last=2, keep_every=2), ground(run_dir)) == []


def test_a_dry_run_deletes_nothing(run_dir: Path) -> None:
    for step in (1, 2, 3):
        commit(run_dir, step)
    before = contents(run_dir)
    assert prune(run_dir, Retention(keep_last=2), ground(run_dir), dry_run=True) == [1]
    assert contents(run_dir) == before


@pytest.mark.parametrize("good", [1, 2])
def test_the_last_good_one_stays_whatever_the_policy_says(good: int, run_dir: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        commit(run_dir, step)
    for step in range(good + 1, 6):
        damage(run_dir, step)
    doomed = prune(run_dir, Retention(keep_last=2), ground(run_dir))
    assert good not in doomed and doomed == [step for step in (1, 2, 3) if step != good]
    assert quick_problems(run_dir / names.step_directory(good)) == []
    assert names.committed_steps(run_dir) == [good, 4, 5]


def test_a_directory_without_a_manifest_neither_counts_nor_goes(run_dir: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(run_dir, step)
    for step in (1, 4):
        (run_dir / names.step_directory(step) / names.MANIFEST).unlink()
    assert prune(run_dir, Retention(keep_last=2), ground(run_dir)) == []
    assert names.checkpoint_steps(run_dir) == [1, 2, 3, 4]


def test_prune_leaves_a_linked_checkpoint_and_its_target(run_dir: Path, tmp_path: Path) -> None:
    commit(tmp_path / "elsewhere", 1)
    run_dir.mkdir()
    link = run_dir / names.step_directory(1)
    link.symlink_to(tmp_path / "elsewhere" / link.name)
    for step in (2, 3, 4):
        commit(run_dir, step)
    before = contents(tmp_path / "elsewhere")
    assert prune(run_dir, Retention(keep_last=2), ground(run_dir)) == [2]
    assert link.is_symlink() and contents(tmp_path / "elsewhere") == before


# -- what dead attempts leave


def test_a_replaced_checkpoint_comes_back_when_its_replacement_never_came(run_dir: Path) -> None:
    committed = commit(run_dir, 5)
    before = checkpoint(run_dir, committed.name)
    replaced, torn = old_replaced(5, 2), old_torn(5, 2)
    committed.rename(run_dir / replaced)
    stage(run_dir, Recipe(5, attempt=2, seed=9)).rename(run_dir / torn)
    assert names.committed_steps(run_dir) == []
    assert settle_leftovers(run_dir, ground(run_dir)) == sorted([replaced, torn])
    assert sorted(entry.name for entry in run_dir.iterdir()) == [names.ATTEMPTS, committed.name]
    assert checkpoint(run_dir, committed.name) == before and quick_problems(committed) == []


def test_a_replaced_checkpoint_goes_once_its_replacement_stands(run_dir: Path) -> None:
    old = commit(run_dir, 5)
    old.rename(run_dir / old_replaced(5, 2))
    new = commit(run_dir, 5, attempt=2, seed=9)
    before = checkpoint(run_dir, new.name)
    assert settle_leftovers(run_dir, ground(run_dir)) == [old_replaced(5, 2)]
    assert contents(run_dir) == {f"{new.name}/{name}": raw for name, raw in before.items()}


def test_torn_and_half_deleted_checkpoints_go_and_look_alikes_stay(run_dir: Path) -> None:
    others = look_alikes(run_dir)
    leftovers = sorted([
        old_torn(7, 1),
        old_torn(8, 123),
        old_removed(names.step_directory(3)),
        old_removed(old_torn(7, 2)),
        old_removed(old_replaced(7, 2)),
    ])  # fmt: skip
    for name in leftovers:
        (run_dir / name / "below").mkdir(parents=True)
        (run_dir / name / names.data_file(0)).write_bytes(b"torn")
    assert settle_leftovers(run_dir, ground(run_dir)) == leftovers
    assert contents(run_dir) == others and not any((run_dir / name).exists() for name in leftovers)
    assert settle_leftovers(run_dir, ground(run_dir)) == []


@pytest.mark.parametrize(
    "name",
    [
        old_torn(4, 1),
        old_replaced(4, 1),
        old_replaced(5, 1),
        old_removed(names.step_directory(4)),
    ],
)
def test_a_link_that_is_named_like_a_leftover_is_left_alone(name: str, run_dir: Path, tmp_path: Path) -> None:
    target = commit(tmp_path / "elsewhere", 5)
    commit(run_dir, 5)
    before = contents(target)
    (run_dir / name).symlink_to(target)
    here = contents(run_dir)
    settle_leftovers(run_dir, ground(run_dir))
    settle_leftovers(run_dir, ground(run_dir))
    assert contents(target) == before and contents(run_dir) == here
    # A link that was moved aside for its replacement comes back like any other; the target never moves.
    comes_back = name == old_replaced(4, 1)
    assert (run_dir / (names.step_directory(4) if comes_back else name)).is_symlink()
    assert names.checkpoint_steps(run_dir) == ([4, 5] if comes_back else [5])


# -- setting aside


def set_aside_by(run: Path, *, after: int, attempt: int) -> list[int]:
    ground(run, attempt)
    return set_aside(run, after=after, attempt=attempt)


def test_later_checkpoints_are_moved_whole_and_earlier_ones_stay(run_dir: Path) -> None:
    others = look_alikes(run_dir)
    for step in (10, 20, 30, 40):
        commit(run_dir, step)
    (run_dir / names.step_directory(40) / names.MANIFEST).unlink()  # damaged ones go as well
    before = {step: checkpoint(run_dir, names.step_directory(step)) for step in (10, 20, 30, 40)}
    assert set_aside_by(run_dir, after=20, attempt=3) == [30, 40]
    assert names.checkpoint_steps(run_dir) == [10, 20]
    places = {step: names.step_directory(step) for step in (10, 20)}
    places |= {step: f"set-aside/{names.step_directory(step)}.attempt-3" for step in (30, 40)}
    moved = {f"{places[step]}/{name}": raw for step, files in before.items() for name, raw in files.items()}
    assert contents(run_dir) == {**others, **moved}


def test_nothing_later_is_nothing_to_do(run_dir: Path) -> None:
    commit(run_dir, 10)
    before = contents(run_dir)
    assert set_aside_by(run_dir, after=10, attempt=1) == []
    assert contents(run_dir) == before and not (run_dir / names.SET_ASIDE).exists()


def test_the_same_step_can_be_set_aside_by_many_attempts(run_dir: Path) -> None:
    saved = []
    for attempt in (1, 2, 3):
        commit(run_dir, 30, attempt=attempt, seed=attempt)
        saved.append(checkpoint(run_dir, names.step_directory(30)))
        set_aside_by(run_dir, after=0, attempt=attempt)
    places = [run_dir / names.SET_ASIDE / f"step-000000030.attempt-{attempt}" for attempt in (1, 2, 3)]
    assert [contents(place) for place in places] == saved


def test_setting_aside_never_overwrites_what_is_there(run_dir: Path) -> None:
    """An attempt's number comes again when the journal was lost."""
    saved = []
    for seed in (1, 2, 3):
        commit(run_dir, 30, seed=seed)
        saved.append(checkpoint(run_dir, names.step_directory(30)))
        assert set_aside_by(run_dir, after=0, attempt=1) == [30]
    places = [run_dir / names.SET_ASIDE / f"step-000000030.attempt-1{end}" for end in ("", ".2", ".3")]
    assert [contents(place) for place in places] == saved


def test_what_was_set_aside_is_neither_elected_nor_pruned(run_dir: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        commit(run_dir, step)
    set_aside_by(run_dir, after=3, attempt=1)
    aside = contents(run_dir / names.SET_ASIDE)
    assert prune(run_dir, Retention(keep_last=2), ground(run_dir)) == [1]
    assert settle_leftovers(run_dir, ground(run_dir)) == []
    assert contents(run_dir / names.SET_ASIDE) == aside and names.committed_steps(run_dir) == [2, 3]
