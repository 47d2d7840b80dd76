"""A state that contradicts itself is never committed; the checkpoint before stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import left_in
from tests.conftest import Ranks
from tests.jobs import Job, text_file, train
from tests.ranks import RankFailure


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("overlap", "claimed by ranks 0, 1"),
        ("drift-weight", "the replicas have drifted apart"),
        ("zero-saved-moments", "every element of every exp_avg is zero after 3 updates"),
        ("adam-step-astray", "rank 0 has step=3.0, rank 1 step=4.0"),
        ("nan-state", "the gate is not finite"),
        ("flip-saved-weight", "rank 1, param/"),
        ("late-buffer", "buffer/late"),
        ("extra-step-counter", "rank 1 is at step 2, rank 0 at step 1"),
    ],
)
def test_nothing_is_committed(fault: str, expected: str, ranks: Ranks, tmp_path: Path) -> None:
    stage = 3 if fault == "flip-saved-weight" else 1
    job = Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), stage=stage, steps=4, save_every=3)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), [fault])
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.InconsistentState"
        assert expected in outcome.error
    assert left_in(Path(job.run_dir)) == []
