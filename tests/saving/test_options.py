"""Options of saving: what cannot be meant is refused; how much host memory a file image takes."""

from __future__ import annotations

from typing import Any

import pytest

from resume_kit import Saving
from resume_kit.checkpoint.blocks import BLOCK_BYTES
from resume_kit.errors import UsageError


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"returns": "soon"}, "saving.returns is 'soon'; it is one of overlapped, staged, committed"),
        ({"when_busy": "drop"}, "saving.when_busy is 'drop'; it is one of wait, skip"),
        ({"staging": "half"}, "saving.staging is 'half'; it is one of full, bounded"),
        ({"gate_every": 0}, "saving.gate_every is 0; it counts saves, from 1"),
        ({"staging": "bounded"}, "say by how many bytes in saving.host_bytes"),
        ({"host_bytes": 2 * BLOCK_BYTES - 1}, "two blocks, 33,554,432 bytes, are the least"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Saving(**options)
    assert expected in str(refusal.value)


def test_the_defaults_overlap_training_and_stage_all() -> None:
    saving = Saving()
    assert (saving.returns, saving.when_busy, saving.staging) == ("overlapped", "wait", "full")
    assert [saving.arena_bytes(n) for n in (0, 1, BLOCK_BYTES, BLOCK_BYTES + 1)] == [
        0,
        BLOCK_BYTES,
        BLOCK_BYTES,
        2 * BLOCK_BYTES,
    ]


def test_bounded_staging_takes_whole_blocks_up_to_the_bound() -> None:
    saving = Saving(staging="bounded", host_bytes=3 * BLOCK_BYTES + 5)
    assert [saving.arena_bytes(n * BLOCK_BYTES) for n in (1, 3, 4, 100)] == [n * BLOCK_BYTES for n in (1, 3, 3, 3)]


def test_full_staging_beyond_the_bound_is_refused_with_both_remedies() -> None:
    saving = Saving(host_bytes=2 * BLOCK_BYTES)
    assert saving.arena_bytes(2 * BLOCK_BYTES) == 2 * BLOCK_BYTES
    with pytest.raises(UsageError, match=r'saving.host_bytes allows 33,554,432: raise it, or set saving.staging to "b'):
        saving.arena_bytes(2 * BLOCK_BYTES + 1)
