"""Durable files: what a full or forbidden disk does, and that a crash at any call loses no checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import blocks, files, names, writing
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.errors import CheckpointDamaged, SaveFailed, UsageError
from resume_kit.integrity.verify import deep_problems, quick_problems
from tests.checkpoints import Recipe, commit, left_in, settle, stage

NOBODY = 65534
STEP = 5


# -- writing


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 1000 bytes instead of 16 MiB, so that small images have many."""
    monkeypatch.setattr(writing, "BLOCK_BYTES", 1000)
    for module in (files, writing):
        monkeypatch.setattr(module, "spans", lambda size: blocks.spans(size, 1000))
    return 1000


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5500])
def test_an_image_is_written_whole_and_its_digests_are_those_of_the_image(
    size: int, small_blocks: int, tmp_path: Path
) -> None:
    image = os.urandom(size)
    digests = files.write_image(tmp_path / "x", memoryview(image))
    assert (tmp_path / "x").read_bytes() == image
    assert digests == digest_image(memoryview(image), small_blocks)


def test_the_digests_of_real_blocks_are_those_of_the_image(tmp_path: Path) -> None:
    image = os.urandom(1 << 16) * (blocks.BLOCK_BYTES // (1 << 16)) + b"one more block"
    digests = files.write_image(tmp_path / "x", memoryview(image))
    assert len(digests.blocks) == 2 and digests == digest_image(memoryview(image))


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    image = os.urandom(100)
    digests = files.write_image(tmp_path / "x", memoryview(image))
    assert (tmp_path / "x").read_bytes() == image and digests == digest_image(memoryview(image))


def test_a_longer_file_of_that_name_leaves_no_tail(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"long" * 100)
    files.write_durably(tmp_path / "x", b"short")
    assert (tmp_path / "x").read_bytes() == b"short"


def test_a_file_is_fsynced_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "x").read_bytes()))
    files.write_durably(tmp_path / "x", b"content")
    assert synced == [b"content"]


# -- the disk says no


def test_no_space_is_a_failed_save_with_a_remedy() -> None:
    """/dev/full gives a true ENOSPC at the first byte, without root."""
    with pytest.raises(SaveFailed, match=r"no space left for 5,000 bytes \(No space left on device\)") as error:
        files.write_image(Path("/dev/full"), memoryview(bytes(5000)))
    (problem,) = error.value.problems
    assert problem.where == "/dev/full" and "free space" in problem.remedy and "keep_last" in problem.remedy


def test_space_that_ends_half_way_is_a_failed_save(small_blocks: int, tmp_path: Path) -> None:
    """A real file system that fills up in the middle: a tmpfs of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small file system needs CAP_SYS_ADMIN; /dev/full is tested above ({done.stderr})")
    try:
        with pytest.raises(SaveFailed, match="no space left for 100,000 bytes"):
            files.write_image(disk / "x", memoryview(bytes(100_000)))
        assert 0 < (disk / "x").stat().st_size < 100_000
        with pytest.raises(SaveFailed, match="free: no space left") as error:
            files.require_space(disk, 1)
        assert "free space" in error.value.problems[0].remedy
        with pytest.raises(UsageError, match="free space, or choose another run directory"):
            files.require_writable(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_on_file_size_is_a_failed_save(small_blocks: int, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(SaveFailed, match=r"write failed \(File too large\)"):
            files.write_image(tmp_path / "x", memoryview(bytes(4000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_of_fsync_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveFailed, match=r"write failed \(Input/output error\)"):
        files.write_durably(tmp_path / "x", b"content")


def test_space_is_compared_with_what_is_free(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    files.require_space(tmp_path, free // 2)
    with pytest.raises(SaveFailed, match="not enough space for the checkpoint"):
        files.require_space(tmp_path, free * 2)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's power to write anywhere; a user without it needs no change."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A directory that anyone may read and nobody may write; pytest's own folders are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_writable_run_directory_is_made_and_left_clean(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a" / "run")
    files.require_writable(tmp_path / "a" / "run")
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_a_run_directory_below_a_file_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="the run directory cannot be used") as error:
            files.require_writable(run)
        (problem,) = error.value.problems
        assert problem.where == str(run) and "choose another run directory" in problem.remedy


@pytest.mark.parametrize("name", ["", "run"])
def test_a_run_directory_without_permission_cannot_be_used(name: str, read_only: Path) -> None:
    with as_nobody(), pytest.raises(UsageError, match=r"cannot be written \(Permission denied\)"):
        files.require_writable(read_only / name)


def test_a_file_without_permission_is_a_failed_save(read_only: Path) -> None:
    with as_nobody(), pytest.raises(SaveFailed, match=r"cannot be written \(Permission denied\)") as error:
        files.write_durably(read_only / "x", b"content")
    assert "write permission" in error.value.problems[0].remedy


# -- crashes


class Crash(BaseException):
    """The process is gone: no handler of errors may see it."""


CALLS = ("rename", "fsync", "unlink", "rmdir")


@contextmanager
def crash_before(call: int | None) -> Iterator[list[str]]:
    """Let only the first `call` of the calls that change a disk happen; yields the names of those made."""
    made: list[str] = []

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if len(made) == call:
                raise Crash(f"before {name} number {call}")
            made.append(name)
            return function(*arguments, **options)

        return act

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        yield made


def crashes(prepare: Callable[[], Path], act: Callable[[Path], object]) -> Iterator[tuple[int, Path, list[str]]]:
    """Every crash of `act`, each on what `prepare` makes anew: (calls made, run directory, their names)."""
    call = 0
    while True:
        run = prepare()
        with crash_before(call) as made:
            try:
                act(run)
            except Crash:
                pass
            else:
                assert call == len(made) > 0, "the last round was without a crash"
                return
        yield call, run, made
        call += 1


def manifest_of(checkpoint: Path) -> bytes:
    return (checkpoint / names.MANIFEST).read_bytes()


def publish(run: Path) -> None:
    files.publish(staged(run), run / names.step_directory(STEP))


def staged(run: Path) -> Path:
    return names.ground(run, 2) / names.step_directory(STEP)


def ground(run: Path) -> Path:
    place = names.ground(run, 2)
    place.mkdir(parents=True, exist_ok=True)
    return place


@pytest.fixture
def fresh_run(tmp_path: Path) -> Callable[[str], Path]:
    """Copies of a template run: "first" (a finished staging directory), "again" (also a checkpoint of that step)."""
    templates = {}
    for kind in ("first", "again"):
        templates[kind] = tmp_path / kind
        commit(templates[kind], 3)
        if kind == "again":
            commit(templates[kind], STEP)
        stage(templates[kind], Recipe(STEP, attempt=2, seed=9))
    count = iter(range(10**6))

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(templates[kind], tmp_path / f"{kind}-{next(count)}"))

    return copy


def test_a_publication_replaces_the_checkpoint_and_leaves_nothing_else(fresh_run: Callable[[str], Path]) -> None:
    for kind in ("first", "again"):
        run = fresh_run(kind)
        new = manifest_of(staged(run))
        publish(run)
        assert left_in(run) == ["step-000000003", "step-000000005"]
        assert manifest_of(run / names.step_directory(STEP)) == new
        assert deep_problems(run / names.step_directory(STEP)) == []


def test_whenever_a_crash_hits_a_publication_the_old_or_the_new_one_is_recovered(
    fresh_run: Callable[[str], Path],
) -> None:
    template = fresh_run("again")
    old = manifest_of(template / names.step_directory(STEP))
    new = manifest_of(staged(template))
    assert old != new
    recovered = []
    for call, run, made in crashes(lambda: fresh_run("again"), publish):
        settle(run)
        assert names.committed_steps(run) == [3, STEP], f"after {call} calls: {made}"
        assert deep_problems(run / names.step_directory(STEP)) == []
        assert len(left_in(run)) == 2  # nothing else is left
        recovered.append(manifest_of(run / names.step_directory(STEP)) == new)
    # The rename that commits is the third call: fsync of the staging directory, old aside, new in place.
    assert recovered == [False] * 3 + [True] * (len(recovered) - 3) and len(recovered) > 8


def test_whenever_a_crash_hits_a_first_publication_it_is_there_whole_or_not_at_all(
    fresh_run: Callable[[str], Path],
) -> None:
    seen = []
    for _, run, _ in crashes(lambda: fresh_run("first"), publish):
        before = names.committed_steps(run)
        settle(run)
        assert names.committed_steps(run) == before
        assert all(deep_problems(run / names.step_directory(step)) == [] for step in before)
        seen.append(before)
    assert seen == [[3], [3], [3, STEP]]


def test_a_crash_while_settling_changes_nothing_for_the_next_start(fresh_run: Callable[[str], Path]) -> None:
    """Crash in the publication at each call, then again at each call of the clean-up that follows."""
    publication_calls = sum(1 for _ in crashes(lambda: fresh_run("again"), publish))

    def left_by(call: int) -> Path:
        run = fresh_run("again")
        with crash_before(call), pytest.raises(Crash):
            publish(run)
        return run

    for first in range(publication_calls):
        settled = left_by(first)
        settle(settled)
        expected = manifest_of(settled / names.step_directory(STEP))
        second = 0
        while True:
            run = left_by(first)
            with crash_before(second):
                try:
                    settle(run)
                except Crash:
                    crashed = True
                else:
                    crashed = False
            settle(run)
            assert names.committed_steps(run) == [3, STEP]
            assert manifest_of(run / names.step_directory(STEP)) == expected
            assert quick_problems(run / names.step_directory(STEP)) == []
            if not crashed:
                break
            second += 3  # every third call: this is quadratic


def test_everything_is_durable_before_and_after_the_rename_that_commits(
    fresh_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run("first")
    log: list[str] = []
    rename, sync = os.rename, files.fsync_directory

    def short(path: Path) -> str:
        return "/".join(path.parts[-2:])

    monkeypatch.setattr(os, "rename", lambda a, b: log.append(f"{short(a)} → {short(b)}") or rename(a, b))
    monkeypatch.setattr(files, "fsync_directory", lambda d: log.append(f"fsync {short(d)}") or sync(d))
    publish(run)
    name = names.step_directory(STEP)
    assert log == [f"fsync ground/{name}", f"ground/{name} → {run.name}/{name}", f"fsync {run.parent.name}/{run.name}"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """From now on, call number `number` of a function of `os` fails with an error of the disk."""

    def arrange(name: str, number: int) -> None:
        count = iter(range(10**6))
        function = getattr(os, name)

        def act(*arguments: Any, **options: Any) -> Any:
            if next(count) == number:
                raise OSError(errno.EIO, "Input/output error")
            return function(*arguments, **options)

        monkeypatch.setattr(os, name, act)

    return arrange


def test_an_error_of_the_committing_rename_puts_the_old_one_back(
    fresh_run: Callable[[str], Path], failing: Callable[[str, int], None]
) -> None:
    run = fresh_run("again")
    old = manifest_of(run / names.step_directory(STEP))
    failing("rename", 1)
    with pytest.raises(OSError, match="Input/output error"):
        publish(run)
    assert names.committed_steps(run) == [3, STEP] and manifest_of(run / names.step_directory(STEP)) == old
    assert len(left_in(run)) == 3 and staged(run).is_dir()


@pytest.mark.parametrize("kind", ["first", "again"])
def test_a_commit_that_may_not_be_durable_says_so(
    kind: str, fresh_run: Callable[[str], Path], failing: Callable[[str, int], None]
) -> None:
    run = fresh_run(kind)
    new = manifest_of(staged(run))
    failing("fsync", 1)
    with pytest.raises(SaveFailed, match=r"committed, but not known to be on disk.*Input/output error"):
        publish(run)
    settle(run)
    assert manifest_of(run / names.step_directory(STEP)) == new and names.committed_steps(run) == [3, STEP]


def test_an_old_one_that_cannot_be_deleted_does_not_fail_the_commit(
    fresh_run: Callable[[str], Path], failing: Callable[[str, int], None]
) -> None:
    run = fresh_run("again")
    new = manifest_of(staged(run))
    failing("unlink", 1)
    publish(run)
    assert manifest_of(run / names.step_directory(STEP)) == new
    assert len(left_in(run)) == 3
    settle(run)
    assert len(left_in(run)) == 2


# -- removal


@pytest.mark.parametrize(
    "name",
    [
        "step-5",
        "step-0000000005",
        "step-000000005.bak",
        "step-00000000x",
        "a-step-000000005",
        ".staging-step-000000005",
        ".removed-thesis",
        ".replaced-step-000000005-attempt-1-copy",
        "set-aside",
        "thesis",
    ],
)
def test_a_look_alike_is_not_removed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not named like a checkpoint; nothing was deleted"):
        files.remove_checkpoint(tmp_path / name, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [name, f"{name}/precious"]


@pytest.mark.parametrize("name", ["step-٠٠٠٠٠٠٠٤٢", "step-00000004２", ".staging-step-00000004２-attempt-1"])
def test_digits_of_other_scripts_are_a_look_alike(name: str) -> None:
    assert names.parse_step(name) is None and not names.is_leftover(name)


def test_a_link_is_not_removed_nor_followed(tmp_path: Path) -> None:
    target = commit(tmp_path / "elsewhere", 5)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / target.name
    link.symlink_to(target)
    with pytest.raises(ValueError, match="is a symbolic link; nothing was deleted"):
        files.remove_checkpoint(link, ground(tmp_path / "run"))
    assert link.is_symlink() and deep_problems(target) == []


@pytest.mark.parametrize(
    "name",
    [
        names.step_directory(5),
        ".staging-step-000000005-attempt-1",
        ".replaced-step-000000005-attempt-1",
        ".removed-step-000000005",
        ".removed-.staging-step-000000005-attempt-1",
    ],
)
def test_what_is_ours_is_removed_whole(name: str, run_dir: Path) -> None:
    commit(run_dir, 5).rename(run_dir / name)
    (run_dir / name / "below").mkdir()
    commit(run_dir, 6)
    files.remove_checkpoint(run_dir / name, ground(run_dir))
    assert left_in(run_dir) == [names.step_directory(6)]


@pytest.mark.parametrize("name", ["step-000000005", "replaced-step-000000005", "removed-step-000000005.2"])
def test_what_lies_in_the_ground_is_removed_whole(name: str, run_dir: Path) -> None:
    place = ground(run_dir)
    commit(run_dir, 5).rename(place / name)
    files.remove_checkpoint(place / name, place)
    assert left_in(run_dir) == []


def test_a_half_removed_one_of_the_same_name_is_in_nobodys_way(run_dir: Path) -> None:
    place = ground(run_dir)
    commit(run_dir, 5).rename(place / names.removed_directory(names.step_directory(5)))
    files.remove_checkpoint(commit(run_dir, 5, seed=1), place)
    assert [entry.name for entry in place.iterdir()] == ["removed-step-000000005"]
    settle(run_dir)
    assert left_in(run_dir) == []


def test_a_crash_in_a_removal_never_leaves_what_looks_committed(fresh_run: Callable[[str], Path]) -> None:
    whole = []
    for _, run, _ in crashes(
        lambda: fresh_run("again"), lambda run: files.remove_checkpoint(run / names.step_directory(STEP), ground(run))
    ):
        for step in names.checkpoint_steps(run):
            assert deep_problems(run / names.step_directory(step)) == []
        whole.append(STEP in names.checkpoint_steps(run))
        settle(run)
        assert names.checkpoint_steps(run) == ([3, STEP] if whole[-1] else [3])
        assert len(left_in(run)) == len(names.checkpoint_steps(run))
    assert whole == [True] + [False] * (len(whole) - 1) and len(whole) > 6


# -- what shared file systems do


def test_what_nfs_keeps_for_an_open_file_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing an open file on NFS gives it the name .nfs…, which cannot be removed before it is closed."""
    (tmp_path / "removed-step-000000005").mkdir()
    kept = tmp_path / "removed-step-000000005" / ".nfs0000000000a1b2c3"
    for path in (kept, kept.with_name("rank-00000.safetensors")):
        path.write_bytes(b"x")
    unlink = os.unlink

    def busy(path: str, **options: Any) -> None:
        if path == kept.name:
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", busy)
    files.remove_tree(tmp_path / "removed-step-000000005")
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    kept.rename(kept.with_name("another"))
    monkeypatch.setattr(os, "unlink", lambda *_, **__: fail_with(errno.EACCES))
    with pytest.raises(PermissionError):
        files.remove_tree(tmp_path / "removed-step-000000005")


def fail_with(code: int) -> None:
    raise OSError(code, os.strerror(code))


class LateFileSystem:
    """What another host wrote is seen here only after some looks at it: not at all, by a stale handle, then in part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
        self.looks, self.asked = looks, 0
        self._read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: self.read(path))

    def read(self, path: Path) -> bytes:
        self.asked += 1
        if self.asked < self.looks:
            fail_with(errno.ENOENT)
        if self.asked == self.looks:
            fail_with(errno.ESTALE)
        raw = self._read(path)
        return raw[:-1] if self.asked == self.looks + 1 else raw


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank-00001.index.json").write_bytes(b"index")
    late = LateFileSystem(monkeypatch, looks=3)
    assert files.read_when_visible(tmp_path / "rank-00001.index.json", 5) == b"index"
    assert late.asked == 5


def test_a_file_that_never_comes_is_damage_after_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "VISIBLE_WITHIN", 0.1)
    with pytest.raises(CheckpointDamaged, match="every host must see what another has written"):
        files.read_when_visible(tmp_path / "rank-00001.index.json", 5)


def test_many_late_files_are_waited_for_together(tmp_path: Path) -> None:
    began = time.monotonic()
    for number in range(3):
        with pytest.raises(CheckpointDamaged):
            files.read_when_visible(tmp_path / f"rank-0000{number}.index.json", 5, began + 0.3)
    assert 0.3 <= time.monotonic() - began < 0.9


def test_a_name_that_a_client_believes_is_not_there_is_looked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS client: a name that was not there is asked for again once its directory is listed."""
    ground, listdir, listed = tmp_path / "attempts" / "000001" / "ground", os.listdir, []
    ground.parent.parent.mkdir()

    def look(directory: Any) -> list[str]:
        listed.append(directory)
        ground.mkdir(parents=True, exist_ok=True)
        return listdir(directory)

    monkeypatch.setattr(files, "VISIBLE_WITHIN", 5.0)
    monkeypatch.setattr(os, "listdir", look)
    assert files.is_visible(ground) and listed == [ground.parent.parent]


def test_nothing_is_waited_for_in_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        files.read_when_visible(tmp_path / "step-000000005" / "rank-00001.index.json", 5)
