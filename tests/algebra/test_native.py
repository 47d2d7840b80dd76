"""The C extension against NumPy. It is optional, so these tests are left out where it was not built."""

from __future__ import annotations

import math
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra import fingerprint, native
from resume_kit.algebra.boxes import Box, Runs, flat_runs

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="the C extension was not built (no compiler?)")

AXES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40)), max_size=4)


def unaligned(count: int, itemsize: int, offset: int) -> np.ndarray:
    """Random bits at an address that is `offset` bytes after one that fits."""
    raw = np.random.default_rng(count).integers(0, 256, count * itemsize + 16, np.uint8)
    return raw[offset : offset + count * itemsize].view(f"u{itemsize}")


@given(AXES, st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 8)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_it_sums_as_numpy_does(axes: list[tuple[int, int, int]], arrays: list[tuple[int, int]]) -> None:
    axes = axes if math.prod(extent for extent, _, _ in axes) < 1 << 16 else axes[:2]
    shape = tuple(extent for extent, _, _ in axes)
    box = Box(
        tuple(min(a, b, extent) for extent, a, b in axes),
        tuple(min(max(a, b), extent) for extent, a, b in axes),
    )
    runs = flat_runs(shape, box)
    data = [unaligned(box.numel, itemsize, offset) for itemsize, offset in arrays]
    group = native.Arrays(tuple(d.ctypes.data for d in data), tuple(d.itemsize for d in data), runs)
    assert native.weighted_sums([group]) == [fingerprint.reference_sum(d, runs) for d in data]


def test_far_indices_do_not_overflow() -> None:
    runs = Runs((1 << 62) - 5, 3, 4, ((1, 4, 1 << 50),))
    data = unaligned(12, 8, 0)
    group = native.Arrays((data.ctypes.data,), (8,), runs)
    assert native.weighted_sums([group]) == [fingerprint.reference_sum(data, runs)]


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_add_up(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(native, "_PART", 1000)
    groups, expected = [], []
    kept = []
    for count in (0, 1, 999, 1000, 1001, 12345):
        data = [unaligned(count, itemsize, 1) for itemsize in (4, 2)]
        runs = flat_runs((count,), Box.whole((count,)))
        kept.append(data)
        groups.append(native.Arrays(tuple(d.ctypes.data for d in data), (4, 2), runs))
        expected += [fingerprint.reference_sum(d, runs) for d in data]
    assert native.weighted_sums(groups, threads) == expected


def test_other_threads_run_meanwhile() -> None:
    data = np.zeros(1 << 24, np.uint8)
    group = native.Arrays((data.ctypes.data,) * 8, (1,) * 8, Runs(0, 1 << 24, 1, ()))
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.0005):
            ticks[0] += 1

    other = threading.Thread(target=tick)
    other.start()
    native.weighted_sums([group], 1)
    done.set()
    other.join()
    assert ticks[0] > 0


def test_a_fork_after_a_call_can_call_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PART", 1000)
    data = unaligned(5000, 4, 0)
    group = native.Arrays((data.ctypes.data,), (4,), Runs(0, 5000, 1, ()))
    expected = native.weighted_sums([group], 2)
    child = os.fork()
    if child == 0:
        os._exit(0 if native.weighted_sums([group], 2) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ((1,) * 9, (1,) * 9, 0, 1, (), 0, 0),
        ((1, 2), (1,), 0, 1, (), 0, 0),
        ((1,), (3,), 0, 1, (), 0, 0),
        ((1,), (1,), 0, 0, (), 0, 1),
        ((1,), (1,), 0, 1, ((0, 1, 1),), 0, 1),
        ((1,), (1,), 0, 1, ((1, 1),), 0, 1),
    ],
    ids=["nine arrays", "one size of two", "three bytes", "empty runs", "no inner", "half an axis"],
)
def test_nonsense_is_refused(arguments: tuple) -> None:
    from resume_kit.algebra import _fingerprint

    with pytest.raises(ValueError, match=r"at most|as many|itemsize|not empty|an axis"):
        _fingerprint.weighted_sums(*arguments)


def test_the_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fingerprint.backend() == f"C, {native.instructions()}"
    monkeypatch.setattr(native, "AVAILABLE", False)
    assert fingerprint.backend() == "NumPy"
