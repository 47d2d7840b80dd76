"""Sets of ranks as text, strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.planning.holders import format_ranks, holders_of, parse_ranks
from tests.planning.test_reads import at, index_of


@given(st.sets(st.integers(0, 40)))
def test_ranks_read_back(ranks: set[int]) -> None:
    text = format_ranks(ranks)
    assert parse_ranks(text) == sorted(ranks)
    assert format_ranks(parse_ranks(text)) == text


def test_runs_are_short() -> None:
    assert format_ranks([16, 0, 1, 2, 3, 18, 3]) == "0-3,16,18"
    assert format_ranks([]) == ""
    assert format_ranks(range(16384)) == "0-16383"


@pytest.mark.parametrize(
    "text",
    ["0-", "-3", "3-1", "1-1", "0-3,4", "0,1", "4,2", "2,2", "01", "0-03", " 1", "1, 3", "1,", ",", "a", "1-2-3", "+1"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ranks"):
        parse_ranks(text)


def test_ranks_below_a_world_size() -> None:
    assert parse_ranks("0-2,4", below=5) == [0, 1, 2, 4]
    assert parse_ranks("", below=0) == []
    for text in ("0-2,5", "0-5", "5", f"0-{10**12}"):
        with pytest.raises(ValueError, match=r"rank \d+ in '.*', of 5 ranks"):
            parse_ranks(text, below=5)


def test_holders_count_every_kind_stored_or_not() -> None:
    master = TensorSpec(TensorKey("master", "w"), "float32", (10,))
    low = TensorSpec(TensorKey("param", "w"), "bfloat16", (10,))
    other = TensorSpec(TensorKey("buffer", "b"), "float32", (10,))
    indices = [
        index_of(0, at(0, 5, 4096, master)),
        index_of(1, at(5, 10, None, low)),
        index_of(3, at(0, 10, 4096, other), at(0, 1, 4096, master)),
    ]
    assert holders_of(indices) == {"b": "3", "w": "0-1,3"}
