"""A shuffled sample order that can be entered at any position in O(1).

A stored shuffle has to be rebuilt and skipped through on resume. Here the order is a keyed bijection
instead: a balanced Feistel cipher over the smallest even power of two that holds the samples, with cycle
walking back into [0, num_samples) — format-preserving encryption (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002). The round function is the splitmix64 finalizer keyed with (seed, epoch,
round). It shuffles well; it is no cryptography.

The numbers it gives are part of every checkpoint's meaning: changing a constant below changes the data
order of every run that was saved before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from resume_kit.errors import UsageError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_ROUNDS = 8
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(_MIX_1), np.uint64(_MIX_2)

# Below this many samples plain integers are faster than NumPy's cost per call.
_FEW = 48

UInt64Array = npt.NDArray[np.uint64]


def derive_key(*words: int) -> int:
    """A 64-bit key out of integers; order matters, words are taken modulo 2**64."""
    key = 0
    for word in words:
        key = _finalize((key + word + _GOLDEN) & _MASK)
    return key


def check_seed(seed: int) -> int:
    """Return `seed`; raises UsageError unless 0 <= seed < 2**64."""
    if not 0 <= seed <= _MASK:
        raise UsageError(f"seed is {seed}; give an integer in [0, 2**64)")
    return seed


class ShuffledOrder:
    """An endless shuffled order over `num_samples` samples.

    A position is the global count of samples consumed so far; epoch = position // num_samples. Within an
    epoch every sample comes exactly once. Each epoch has its own key and so another permutation (with a
    handful of samples, two epochs can draw the same one by chance).

    Uses no random number generator, global or private. Raises UsageError when num_samples < 1 or the seed
    is outside [0, 2**64).
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if not 1 <= num_samples < 1 << 62:
            raise UsageError(f"num_samples is {num_samples}; a shuffled order needs 1 to 2**62 - 1 samples")
        self.num_samples = num_samples
        self.seed = check_seed(seed)
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def __repr__(self) -> str:
        return f"ShuffledOrder({self.num_samples}, seed={self.seed})"

    def sample_at(self, position: int) -> int:
        """The sample id at a global position; raises UsageError when position < 0."""
        return self.samples(position, 1)[0]

    def samples(self, start: int, count: int) -> list[int]:
        """The sample ids at positions [start, start + count), across epoch ends; raises UsageError on < 0."""
        if start < 0 or count < 0:
            raise UsageError(f"samples(start={start}, count={count}): both must be at least 0")
        ids: list[int] = []
        position, stop = start, start + count
        while position < stop:
            epoch, first = divmod(position, self.num_samples)
            last = min(self.num_samples, first + stop - position)
            keys = [derive_key(self.seed, epoch, number) for number in range(_ROUNDS)]
            walk = self._walk_few if last - first <= _FEW else self._walk_many
            ids.extend(walk(first, last, keys))
            position += last - first
        return ids

    def _walk_few(self, first: int, last: int, keys: list[int]) -> list[int]:
        bits, mask = self._half_bits, (1 << self._half_bits) - 1
        ids = []
        for value in range(first, last):
            inside = False
            while not inside:
                left, right = value >> bits, value & mask
                for key in keys:
                    left, right = right, left ^ (_finalize(right ^ key) & mask)
                value = (left << bits) | right
                inside = value < self.num_samples
            ids.append(value)
        return ids

    def _walk_many(self, first: int, last: int, keys: list[int]) -> list[int]:
        words = [np.uint64(key) for key in keys]
        values = self._encrypt(np.arange(first, last, dtype=np.uint64), words)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._encrypt(values[outside], words)
            outside = outside[values[outside] >= self.num_samples]
        ids: list[int] = values.tolist()
        return ids

    def _encrypt(self, values: UInt64Array, keys: list[np.uint64]) -> UInt64Array:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_finalize_array(right ^ key) & mask)
        return (left << bits) | right


def _finalize(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _finalize_array(value: UInt64Array) -> UInt64Array:
    value = (value ^ (value >> _SHIFT_1)) * _FACTOR_1
    value = (value ^ (value >> _SHIFT_2)) * _FACTOR_2
    return value ^ (value >> _SHIFT_3)
