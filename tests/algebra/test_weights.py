"""Are the weights of the fingerprint as good as random odd numbers, for its end? On samples."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resume_kit.algebra.fingerprint import weights, weights_at

SAMPLE = 1 << 14
BITS_OF_INDEX = range(38)  # tensors of up to 2**38 elements


def some_indices() -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 1 << 37, SAMPLE).astype(np.uint64)


def test_the_first_weights() -> None:
    assert [hex(w) for w in weights(0, 3).tolist()] == [
        "0x17fb89ee9dcab42b",
        "0xc99d164addff6dc3",
        "0xe7d92ae6c635060f",
    ]
    assert hex(weights((1 << 40) - 1, 1)[0]) == "0x7ecdc648cdccc949"
    assert weights(5, 4).tolist() == weights(0, 9)[5:].tolist()
    assert (weights(0, 1000) & np.uint64(1)).all()


@pytest.mark.parametrize("bit", BITS_OF_INDEX)
def test_a_bit_of_the_index_changes_every_bit_of_the_weight_half_the_time(bit: int) -> None:
    indices = some_indices()
    changed = weights_at(indices) ^ weights_at(indices ^ np.uint64(1 << bit))
    for position in range(1, 64):
        share = (changed >> np.uint64(position) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 6 * 0.5 / SAMPLE**0.5, f"bit {position}: {share}"


@pytest.mark.parametrize("bit", BITS_OF_INDEX)
def test_weights_at_a_distance_differ_by_no_high_power_of_two_more_often_than_random_ones(bit: int) -> None:
    """Two elements whose values differ by v can be swapped unseen only where v * (w(i) - w(j)) is 0 mod 2**64."""
    difference = weights_at(some_indices() + np.uint64(1 << bit)) - weights_at(some_indices())
    for power in range(2, 9):  # two odd numbers differ by a multiple of 2**p for one pair of 2**(p-1)
        expected = 0.5 ** (power - 1)
        share = (difference % np.uint64(1 << power) == 0).mean()
        assert abs(share - expected) < 6 * (expected / SAMPLE) ** 0.5, f"2**{power}: {share}"


def test_neighbours_have_no_repeated_differences() -> None:
    some = weights(0, 1 << 16)
    for _ in range(2):
        some = np.diff(some)
        assert np.unique(some).size == some.size
