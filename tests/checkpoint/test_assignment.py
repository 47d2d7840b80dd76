"""Who reads which block for a node: each block once, the ranks' shares even, and only where it saves something."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.checkpoint import assignment, readplan
from resume_kit.checkpoint.assignment import Needs, Share, assign, needs_of
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.readplan import Source, survey
from resume_kit.checkpoint.transfers import Transfer

BLOCK = 1000
FILES = ("rank-00000.safetensors", "rank-00001.safetensors")


@pytest.fixture(autouse=True)
def nothing_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "LEAST_SHARED", 1)


def part(count: int, would_read: int, first: int = 0, file: str = FILES[0]) -> Needs:
    return {file: [(block, BLOCK, would_read) for block in range(first, first + count)]}


def readers(shares: tuple[Share, ...]) -> list[int]:
    return [share.reader for share in shares]


def test_two_halves_are_read_once_in_two_stretches() -> None:
    shares = assign({0: part(10, 500), 1: part(10, 500)})
    assert readers(shares) == [0] * 5 + [1] * 5
    assert [share.takers for share in shares] == [(1,)] * 5 + [(0,)] * 5
    assert [(share.file, share.block, share.nbytes) for share in shares] == [(FILES[0], n, BLOCK) for n in range(10)]


def test_a_long_row_is_cut_so_that_shares_come_out_even() -> None:
    shares = assign({rank: part(100, 250) for rank in range(4)})
    counts = Counter(readers(shares))
    assert max(counts.values()) - min(counts.values()) <= assignment.STRETCH
    long = [list(row) for row in zip(readers(shares), readers(shares)[1:], strict=False) if row[0] != row[1]]
    assert len(long) < 100 / assignment.STRETCH + 1


def test_a_rank_that_reads_much_by_itself_reads_less_for_others() -> None:
    busy = {**part(10, 500), FILES[1]: [(block, BLOCK, BLOCK) for block in range(10)]}
    assert readers(assign({0: busy, 1: part(10, 500)})) == [1] * 10


def test_a_block_is_read_by_one_that_wants_it_for_all_others_that_do() -> None:
    shares = assign({0: part(2, 1000), 1: {**part(2, 1000), FILES[1]: [(7, 300, 300)]}, 5: {FILES[1]: [(7, 300, 300)]}})
    assert [(share.reader, share.takers) for share in shares] == [(0, (1,)), (1, (0,)), (5, (1,))]


@pytest.mark.parametrize(
    ("would_read", "shared"),
    [
        *[((500, 500), True), ((480, 480), True), ((470, 470), False), ((250, 250), False), ((900, 100), False)],
        *[((860, 140), True), ((1000, 1000), True), ((500, 300, 200), True), ((1000, 0), False), ((1000,), False)],
    ],
)
def test_a_block_is_shared_where_all_of_it_is_wanted_and_not_nearly_all_by_one(
    would_read: tuple[int, ...], shared: bool
) -> None:
    assert bool(assign({rank: part(1, wanted) for rank, wanted in enumerate(would_read)})) == shared


def test_little_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "LEAST_SHARED", 10 * BLOCK)
    assert assign({0: part(9, 500), 1: part(9, 500)}) == ()
    assert len(assign({0: part(10, 500), 1: part(10, 500)})) == 10


needs = st.dictionaries(
    st.sampled_from(FILES),
    st.dictionaries(st.integers(0, 40), st.integers(1, BLOCK), min_size=1).map(
        lambda blocks: [(block, BLOCK, would_read) for block, would_read in blocks.items()]
    ),
)


@given(st.dictionaries(st.integers(0, 5), needs, min_size=1), st.randoms())
def test_all_ranks_come_to_the_same_and_read_hardly_more_than_alone(everyone: dict[int, Needs], random: object) -> None:
    ranks = list(everyone)
    random.shuffle(ranks)  # type: ignore[attr-defined]
    shares = assign(everyone)
    assert shares == assign({rank: everyone[rank] for rank in ranks})
    assert len({(share.file, share.block) for share in shares}) == len(shares)
    wanted = {
        (rank, f, block): n for rank, of in everyone.items() for f, blocks in of.items() for block, _, n in blocks
    }
    for share in shares:
        by = {rank: n for (rank, file, block), n in wanted.items() if (file, block) == (share.file, share.block)}
        assert {share.reader, *share.takers} == by.keys() and share.reader not in share.takers
        assert share.nbytes <= 1.05 * sum(by.values())


def test_a_rank_tells_what_it_would_read_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readplan, "PAGE", 10)
    digests = FileDigest(250, 100, ("",) * 3)
    halves = Transfer(0, 0, 0, 4, ((13, 8, 4),))  # gaps of 4 bytes, which a disk reads in any case
    source = Source("f", digests, 250, (halves, Transfer(210, 1, 0, 30)))
    assert needs_of([source], [survey(source)]) == {"f": [(0, 100, 100), (2, 50, 30 + 0)]}
