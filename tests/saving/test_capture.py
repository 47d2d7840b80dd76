"""What a save takes in the training thread: copies of what a forward changes, views of the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import LivePiece, Replica
from resume_kit.errors import InconsistentState
from resume_kit.saving.capture import SaveRequest, Snapshots, take_account


def replica(kind: str, data: torch.Tensor) -> Replica:
    dtype = str(data.dtype).removeprefix("torch.")
    return Replica(TensorSpec(TensorKey(kind, "x"), dtype, tuple(data.shape)), data)


def test_a_buffer_is_kept_as_it_is_now() -> None:
    live = torch.arange(6.0)
    kept = Snapshots().of(replica("buffer", live))
    live.zero_()
    assert kept.data.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_buffer_piece_too() -> None:
    live = torch.arange(6.0)
    spec = TensorSpec(TensorKey("buffer", "x"), "float32", (6,))
    kept = Snapshots().of(LivePiece(spec, Box.whole((6,)), live))
    live.zero_()
    assert kept.data.tolist() == [0, 1, 2, 3, 4, 5] and kept.owned


def test_a_strided_buffer_comes_in_its_own_order() -> None:
    kept = Snapshots().of(replica("buffer", torch.arange(6).view(2, 3).T))
    assert kept.data.is_contiguous() and kept.data.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_everything_else_stays_the_live_memory() -> None:
    live = replica("param", torch.zeros(3))
    assert Snapshots().of(live) is live


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.float64)], ids=["shape", "dtype"])
def test_memory_is_used_again_while_the_buffer_stays_what_it_is(other: torch.Tensor) -> None:
    snapshots = Snapshots()
    first = snapshots.of(replica("buffer", torch.zeros(3)))
    again = snapshots.of(replica("buffer", torch.ones(3)))
    assert again.data.data_ptr() == first.data.data_ptr() and again.data.tolist() == [1, 1, 1]
    changed = snapshots.of(replica("buffer", other))
    assert changed.data.dtype == other.dtype and changed.data.shape == other.shape


# -- the account


def adapter(**changes: Any) -> Any:
    found = {
        "at_step_boundary": True,
        "pieces": lambda: [],
        "replicas": lambda: [replica("buffer", torch.ones(2))],
        "scalars": lambda: {},
        "rng_trackers": lambda: {},
        "topology": {},
    }
    return SimpleNamespace(**{**found, **changes})


def request(*buffers: TensorSpec, partial: bool = False, state: Any = None) -> SaveRequest:
    known: Any = SimpleNamespace(buffers=buffers, partial=partial)
    fields: Any = {"run_id": "", "attempt": 1, "step": 1, "data": {}, "pinned": {}, "gate": None}
    places: Any = {"directory": None, "ground": None}
    return SaveRequest(**places, **fields, description=known, state=state or {}, updates=1)


KNOWN = replica("buffer", torch.ones(2)).spec


def test_the_account_does_not_follow_what_the_loop_changes_later() -> None:
    history = [1, 2]
    account = take_account(request(KNOWN, state={"user": {"history": history}}), adapter(), Snapshots())
    history.append(3)
    assert account.request.state == {"user": {"history": [1, 2]}}


def test_between_two_halves_of_a_step_nothing_is_saved() -> None:
    with pytest.raises(InconsistentState, match="gradients are pending"):
        take_account(request(KNOWN), adapter(at_step_boundary=False), Snapshots())


OTHER = TensorSpec(TensorKey("buffer", "other"), "float32", (1,))


@pytest.mark.parametrize(
    ("known", "partial", "named"),
    [((), False, "buffer/x"), ((), True, "buffer/x"), ((KNOWN, OTHER), False, "buffer/other")],
    ids=["came", "came to a stage", "went"],
)
def test_buffers_that_came_or_went_are_named(known: tuple[TensorSpec, ...], partial: bool, named: str) -> None:
    with pytest.raises(InconsistentState, match="not the one that the kit was made for") as failure:
        take_account(request(*known, partial=partial), adapter(), Snapshots())
    assert [problem.where for problem in failure.value.problems] == [f"{named} float32[{2 if named[-1] == 'x' else 1}]"]


def test_a_stage_of_a_pipeline_need_not_have_every_buffer() -> None:
    take_account(request(KNOWN, OTHER, partial=True), adapter(), Snapshots())
