"""Reading together, on real processes: each block read once, its bytes on every rank that wants them, and no hang."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resume_kit.checkpoint import assignment, readplan
from resume_kit.checkpoint.assignment import needs_of
from resume_kit.checkpoint.blocks import BLOCK_BYTES, digest_image
from resume_kit.checkpoint.carrying import ReadAccount, carry_out
from resume_kit.checkpoint.datafile import DataFile
from resume_kit.checkpoint.destination import HostMemory
from resume_kit.checkpoint.node import NeighbourLost, Node
from resume_kit.checkpoint.pages import PAGE
from resume_kit.checkpoint.readplan import Source, plan_reads, survey, window_bytes
from resume_kit.checkpoint.sharing import MOST_WINDOWS
from resume_kit.checkpoint.together import Together, read_together
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.errors import CheckpointDamaged
from tests.checkpoints import flip
from tests.conftest import Ranks
from tests.nodes import connected, in_threads
from tests.ranks import RankFailure

#: Files of `ROWS` rows of `ROW` bytes; a block holds 64 of them, the last one 40.
ROWS, ROW, BLOCK = 1000, 4096, 64 * 4096

#: (file, first row, last row, first byte of a row, last byte of a row)
Wanted = tuple[int, int, int, int, int]


@dataclass
class Outcome:
    """What a rank has in the end: its buffers, what it read and was given, and what it left behind."""

    buffers: list[bytes] = field(default_factory=list)
    account: ReadAccount | None = None
    whole: list[tuple[str, int]] = field(default_factory=list)
    error: str = ""
    text: str = ""
    seconds: float = 0.0
    shortage: str = ""
    windows: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def files(folder: Path, count: int) -> list[np.ndarray]:
    """Data files, with what is in them: [rows, bytes of a row]."""
    found = []
    for number in range(count):
        content = np.random.default_rng(number).integers(1, 256, (ROWS, ROW), np.uint8)
        (folder / f"file-{number}").write_bytes(content.tobytes())
        found.append(content)
    return found


def sources_of(folder: Path, wanted: Sequence[Wanted]) -> tuple[list[Source], list[memoryview]]:
    transfers: dict[int, list[Transfer]] = {}
    buffers = []
    for target, (file, top, bottom, left, right) in enumerate(wanted):
        rows, width = bottom - top, right - left
        grid = ((rows, ROW, width),) if width < ROW else ()
        length = width if grid else rows * width
        transfers.setdefault(file, []).append(Transfer(top * ROW + left, target, 0, length, grid))
        buffers.append(memoryview(bytearray(rows * width)))
    sources = []
    for file in sorted(transfers):
        image = (folder / f"file-{file}").read_bytes()
        digests = digest_image(memoryview(image), BLOCK)
        sources.append(Source(f"file-{file}", digests, len(image), tuple(transfers[file])))
    return sources, buffers


def traces() -> list[str]:
    """Threads, descriptors and mappings that a reading together may leave behind."""
    gc.collect()  # what interrupted it refers to itself, and to what it was about to keep
    found = [thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "taker"))]
    found += [line.split()[-2] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:resume" in line]
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        found += [target] if "memfd:resume" in target or "file-" in target else []
    return found


def read(node: Node, folder: Path, wanted: Sequence[Wanted], *, readers: int = 2) -> Outcome:
    sources, buffers = sources_of(folder, wanted)
    destination, outcome, began = HostMemory(buffers), Outcome(), time.monotonic()
    touched = [survey(source) for source in sources]
    try:
        with read_together(node, needs_of(sources, touched), window_bytes(sources), destination) as together:
            plan = plan_reads(sources, touched, together.shared)
            outcome.account = carry_out(plan, folder, destination, readers=readers, together=together)
    except (CheckpointDamaged, NeighbourLost, KeyboardInterrupt) as error:
        node.abort()
        outcome.error, outcome.text = type(error).__name__, str(error)
    outcome.seconds = time.monotonic() - began
    outcome.shortage = node.shortage
    outcome.buffers = [bytes(buffer) for buffer in buffers]
    return outcome


def rank_reads(
    rank: int, world_size: int, folder: str, wanted: Sequence[Sequence[Wanted]], fault: str = "", cached: bool = True
) -> Outcome:
    """One rank of a node; `fault` is what happens to its last rank, `cached` what the page cache is said to hold."""
    DataFile.in_page_cache = lambda *_: cached  # type: ignore[method-assign]
    readplan.PAGE, assignment.LEAST_SHARED = 1, 1  # or these small blocks would all be read whole, and alone
    whole: list[tuple[str, int]] = []
    read_block = DataFile.read_block

    def noting(self: DataFile, memory: memoryview, block: int, *given: Any) -> None:
        whole.append((self.path.name, block))
        if fault == "interrupted" and rank == world_size - 1 and len(whole) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        read_block(self, memory, block, *given)

    give, given = Together.give, []

    def give_or_die(self: Together, *args: Any) -> None:
        given.append(args)
        if fault == "killed" and rank == world_size - 1 and len(given) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        give(self, *args)

    DataFile.read_block, Together.give = noting, give_or_die  # type: ignore[method-assign]
    short = fault if rank == world_size - 1 else ""
    with short_of_memory(short), connected(Path(folder), rank, world_size) as node:
        if fault == "failed before" and rank == world_size - 1:
            node.abort()
            return Outcome(error="before")
        outcome = read(node, Path(folder), wanted[rank])
        outcome.whole = whole
        outcome.windows = sorted({window for window, *_ in given})
        (Path(folder) / f"{rank}.done").touch()
        while fault in ("", "damaged", *SHORT) and len([*Path(folder).glob("*.done")]) < world_size:
            time.sleep(0.002)  # connections last until all have ended, as in a run
    outcome.left = traces()
    return outcome


#: What a rank may have no memory for.
SHORT = ("its needs", "its first window", "its second window")


@contextmanager
def short_of_memory(fault: str) -> Iterator[None]:
    """This process as one that has no memory for what `fault` names of `SHORT`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "its needs":  # no file, and no such memory, may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, limits[1]))
    posix_fallocate, first = os.posix_fallocate, {"its first window": 0, "its second window": BLOCK}.get(fault)

    def allocate(descriptor: int, offset: int, nbytes: int) -> None:
        if nbytes == BLOCK and offset == first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        posix_fallocate(descriptor, offset, nbytes)

    os.posix_fallocate = allocate
    yield
    os.posix_fallocate = posix_fallocate
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def columns(parts: int, part: int, files: int) -> list[Wanted]:
    """A tensor-parallel rank's part of tensors that `files` ranks saved, each some columns of them."""
    per_file = parts // files
    file, place = divmod(part, per_file)
    return [(file, 0, ROWS, ROW // per_file * place, ROW // per_file * (place + 1))]


CASES: dict[str, tuple[int, list[list[Wanted]]]] = {
    "TP1 to TP2": (1, [columns(2, part, 1) for part in range(2)]),
    "TP2 to TP4": (2, [columns(4, part, 2) for part in range(4)]),
    "flat ranges of two ranks to TP2": (2, [[(f, 0, ROWS, at, at + ROW // 2) for f in (0, 1)] for at in (0, ROW // 2)]),
    "replicas": (1, [[(0, 0, ROWS, 0, ROW)]] * 3),
    "replicas of a slice": (1, [[(0, 0, ROWS, 1024, 3072)]] * 2),
    "uneven": (2, [[(0, 0, ROWS, 0, ROW), (1, 0, 300, 0, 100)], [(0, 100, 900, 0, 2048)], [(1, 7, 9, 5, 50)], []]),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_its_bytes_and_each_shared_block_is_read_once(
    case: str, cached: bool, ranks: Ranks, tmp_path: Path
) -> None:
    count, wanted = CASES[case]
    contents = files(tmp_path, count)
    outcomes: list[Outcome] = ranks.run(rank_reads, len(wanted), str(tmp_path), wanted, "", cached, timeout=60)
    for outcome, parts in zip(outcomes, wanted, strict=True):
        assert outcome.error == "" and outcome.left == []
        for buffer, (file, top, bottom, left, right) in zip(outcome.buffers, parts, strict=True):
            assert buffer == contents[file][top:bottom, left:right].tobytes()
    accounts = [outcome.account for outcome in outcomes]
    assert all(accounts)
    total = sum(account.wanted_bytes for account in accounts if account)
    brought = [account.read_bytes for account in accounts if account]
    assert sum(brought) <= 1.05 * total
    if case == "uneven":
        return
    blocks = Counter(block for outcome in outcomes for block in outcome.whole)
    assert set(blocks.values()) == {1} and len(blocks) == count * -(-ROWS * ROW // BLOCK)
    assert sum(brought) == sum(account.verified_bytes for account in accounts if account) == count * ROWS * ROW
    assert not any(account.unverified for account in accounts if account)
    assert max(brought) - min(brought) <= assignment.STRETCH * BLOCK / 2 + BLOCK


def test_what_one_rank_alone_wants_is_read_by_itself_as_ever(ranks: Ranks, tmp_path: Path) -> None:
    count, wanted = CASES["uneven"]
    files(tmp_path, count)
    outcomes: list[Outcome] = ranks.run(rank_reads, len(wanted), str(tmp_path), wanted, timeout=60)
    first, second, third, fourth = (outcome.account for outcome in outcomes)
    assert first and second and third and fourth
    assert first.read_bytes + second.read_bytes <= 1.01 * ROWS * ROW + 300 * 100  # file 0 once, for both
    assert first.unverified == (("file-1", 0, 5 * BLOCK),) and third.unverified == (("file-1", 0, BLOCK),)
    assert fourth == ReadAccount(0, 0, 0, ())


# -- failures


@pytest.mark.parametrize("block", [0, 7, 15])
def test_a_bad_block_fails_all_ranks_and_reaches_none(block: int, ranks: Ranks, tmp_path: Path) -> None:
    count, wanted = CASES["TP1 to TP2"]
    contents = files(tmp_path, count)
    outcomes = ranks.run(rank_reads_damaged, 2, str(tmp_path), wanted, block, timeout=60)
    assert sorted(outcome.error for outcome in outcomes) == ["CheckpointDamaged", "NeighbourLost"]
    for part, outcome in enumerate(outcomes):
        if outcome.error == "CheckpointDamaged":
            assert f"file-0: the content of bytes {block * BLOCK:,}.." in outcome.text
        else:
            assert "of this node was needed for reading together" in outcome.text
        rows = np.frombuffer(outcome.buffers[0], np.uint8).reshape(ROWS, ROW // 2)
        assert not rows[block * 64 : block * 64 + 64].any()
        for number in range(-(-ROWS // 64)):  # a block is there, or nothing of it
            found = rows[number * 64 : number * 64 + 64]
            expected = contents[0][number * 64 : number * 64 + 64, part * ROW // 2 : (part + 1) * ROW // 2]
            assert not found.any() or np.array_equal(found, expected)
        assert outcome.left == [] and outcome.seconds < 10


def rank_reads_damaged(rank: int, world_size: int, folder: str, wanted: Sequence[Sequence[Wanted]], block: int) -> Any:
    """As `rank_reads`, with a bit flipped after the digests were taken."""
    original = globals()["sources_of"]

    def sources_then_flip(place: Path, parts: Sequence[Wanted]) -> Any:
        found = original(place, parts)
        (place / f"{rank}.digested").touch()
        while len([*place.glob("*.digested")]) < world_size:
            time.sleep(0.002)
        if rank == 0:
            flip(place / "file-0", block * BLOCK + 17, 3)
            (place / "flipped").touch()
        while not (place / "flipped").exists():
            time.sleep(0.002)
        return found

    globals()["sources_of"] = sources_then_flip
    return rank_reads(rank, world_size, folder, wanted, "damaged")


@pytest.mark.parametrize("fault", ["killed", "failed before", "interrupted"])
def test_a_rank_that_dies_or_fails_ends_the_others_in_seconds(fault: str, ranks: Ranks, tmp_path: Path) -> None:
    wanted = [columns(4, part, 1) for part in range(4)]
    files(tmp_path, 1)
    began = time.monotonic()
    if fault == "killed":
        group = ranks.start(rank_reads, 4, str(tmp_path), wanted, fault)
        assert group.wait(timeout=30) == [0, 0, 0, -9]
        outcomes = [found.value for found in group.outcomes()[:3]]
    else:
        *outcomes, last = ranks.run(rank_reads, 4, str(tmp_path), wanted, fault, timeout=30)
        assert last.error == {"interrupted": "KeyboardInterrupt", "failed before": "before"}[fault]
        assert last.left == []
    assert time.monotonic() - began < 10
    assert [outcome.error for outcome in outcomes] == ["NeighbourLost"] * 3
    assert all(outcome.left == [] for outcome in outcomes)


def rank_waits(rank: int, world_size: int, folder: str) -> tuple[str, float]:
    """Rank 1 is there, and does nothing."""
    with connected(Path(folder), rank, world_size, timeout=0.3) as node:
        began = time.monotonic()
        if rank:
            time.sleep(1.5)
            return "", 0.0
        outcome = read(node, Path(folder), columns(2, 0, 1))
        return outcome.text, time.monotonic() - began


def test_a_rank_that_stands_still_is_waited_for_no_longer_than_the_bound(ranks: Ranks, tmp_path: Path) -> None:
    files(tmp_path, 1)
    (text, seconds), _ = ranks.run(rank_waits, 2, str(tmp_path), timeout=30)
    assert "rank 1 of this node was needed for reading together: it sent nothing within 0.3 s" in text
    assert 0.3 <= seconds < 1.5


def rank_reads_slowly(rank: int, world_size: int, folder: str, wanted: Sequence[Sequence[Wanted]]) -> Outcome:
    readplan.PAGE, assignment.LEAST_SHARED = 1, 1
    read_block = DataFile.read_block

    def slowly(*given: Any) -> None:
        time.sleep(0.15)
        read_block(*given)

    DataFile.read_block = slowly  # type: ignore[method-assign]
    with connected(Path(folder), rank, world_size, timeout=0.8) as node:
        outcome = read(node, Path(folder), wanted[rank], readers=1)
        (Path(folder) / f"{rank}.done").touch()
        while len([*Path(folder).glob("*.done")]) < world_size:
            time.sleep(0.002)
    return outcome


def test_a_rank_that_reads_for_another_first_is_not_taken_for_one_that_stands_still(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Rank 0 reads eight blocks for rank 1, which takes twice as long as the bound, and then eight for rank 2."""
    contents = files(tmp_path, 2)
    whole = [(file, 0, ROWS, 0, ROW) for file in (0, 1)]
    outcomes: list[Outcome] = ranks.run(rank_reads_slowly, 3, str(tmp_path), [whole, whole[:1], whole[1:]], timeout=30)
    assert [outcome.text for outcome in outcomes] == [""] * 3
    assert [len(outcome.buffers) for outcome in outcomes] == [2, 1, 1]
    assert outcomes[2].buffers[0] == contents[1].tobytes()


@pytest.mark.parametrize(
    ("fault", "why"), [("its needs", "File too large"), ("its first window", "No space left on device")]
)
def test_a_node_of_which_a_rank_has_no_memory_to_share_reads_each_by_itself(
    fault: str, why: str, ranks: Ranks, tmp_path: Path
) -> None:
    count, wanted = CASES["TP2 to TP4"]
    contents = files(tmp_path, count)
    outcomes: list[Outcome] = ranks.run(rank_reads, 4, str(tmp_path), wanted, fault, timeout=60)
    for outcome, ((file, top, bottom, left, right),) in zip(outcomes, wanted, strict=True):
        assert outcome.error == "" and outcome.left == [] and outcome.windows == []
        assert outcome.buffers == [contents[file][top:bottom, left:right].tobytes()]
        assert outcome.account and outcome.account.read_bytes <= 1.05 * outcome.account.wanted_bytes
        assert outcome.account.unverified  # as where each rank reads by itself
    assert [outcome.shortage for outcome in outcomes[:3]] == [""] * 3
    assert outcomes[3].shortage == f"no memory to share with the other ranks of its node: {why}"


def test_a_rank_without_memory_for_more_windows_goes_on_with_those_it_has(ranks: Ranks, tmp_path: Path) -> None:
    count, wanted = CASES["TP1 to TP2"]
    contents = files(tmp_path, count)
    outcomes: list[Outcome] = ranks.run(rank_reads, 2, str(tmp_path), wanted, "its second window", timeout=60)
    for part, outcome in enumerate(outcomes):
        assert outcome.error == outcome.shortage == "" and outcome.left == []
        assert outcome.buffers == [contents[0][:, part * ROW // 2 : (part + 1) * ROW // 2].tobytes()]
        assert outcome.account and outcome.account.read_bytes == outcome.account.verified_bytes
    assert outcomes[1].windows == [0] and len(outcomes[1].whole) > 3


def test_the_window_that_was_reserved_before_all_reading_is_the_first_to_be_used() -> None:
    needs = {"file": [(block, BLOCK_BYTES, BLOCK_BYTES // 2) for block in range(8)]}

    def work(node: Node) -> tuple[int, int]:
        with read_together(node, needs, BLOCK_BYTES, HostMemory([])) as together:
            number, _ = together.window()
            return number, os.fstat(node.memory[node.rank]).st_blocks * 512

    assert in_threads(2, work) == [(0, BLOCK_BYTES + PAGE)] * 2  # with the page of what a rank wants


def refuses(rank: int, world_size: int, folder: str) -> str:
    from resume_kit.checkpoint import node

    if rank == 0:
        node._check_owner = lambda _: (_ for _ in ()).throw(PermissionError("a process of user 7"))  # type: ignore[assignment]
    with connected(Path(folder), rank, world_size):
        return "connected"


def test_who_belongs_to_another_user_is_not_let_in(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(refuses, 2, str(tmp_path), timeout=30, grace=12)
    assert "PermissionError" in caught.value.error_types[0] and "user 7" in caught.value.outcomes[0].error


def few_descriptors(rank: int, world_size: int) -> list[str]:
    """Six ranks of eight windows each as threads of one process that may have 200 descriptors."""
    from resume_kit.checkpoint import together

    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    together.default_windows = lambda: MOST_WINDOWS  # type: ignore[attr-defined]

    def work(node: Node) -> str:
        with read_together(node, {}, PAGE, HostMemory([])):
            return "read"

    return [str(found) for found in in_threads(6, work)]


def test_a_node_of_many_ranks_needs_few_descriptors(ranks: Ranks) -> None:
    """Those that are on their way count too: no more may be than one process may have open."""
    assert ranks.run(few_descriptors, 1, timeout=30) == [["read"] * 6]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert traces() == []
