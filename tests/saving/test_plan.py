"""The plan of a rank's file: what is stored where, what is measured, and the bytes that the arena copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.layout import plan_file, read_header
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import LivePiece, Replica
from resume_kit.saving.plan import Copied, Holdings, SavePlan, plan_save, shares_of, signature

CPU = torch.device("cpu")
METADATA = {"format": "resume_kit", "step": "000000007"}
NOTHING_COPIED = Copied((), 1)
ROWS, COLUMNS = 4, 6


def piece(kind: str, name: str, data: torch.Tensor, **options: object) -> LivePiece:
    dtype = str(data.dtype).removeprefix("torch.")
    return LivePiece(
        TensorSpec(TensorKey(kind, name), dtype, (ROWS, COLUMNS)), Box.whole((ROWS, COLUMNS)), data, **options
    )


@pytest.fixture
def engine() -> list[LivePiece]:
    """Two weights as ZeRO keeps them: one flat buffer a kind, the weights cast from their masters."""
    numel = ROWS * COLUMNS
    flats = {kind: torch.randn(2 * numel) for kind in ("master", "exp_avg")}
    pieces = []
    for number, name in enumerate(("a", "b")):
        of = {kind: flat[number * numel : (number + 1) * numel] for kind, flat in flats.items()}
        master = piece("master", name, of["master"])
        low = piece("param", name, of["master"].bfloat16(), cast_of=master)
        pieces += [master, low, piece("exp_avg", name, of["exp_avg"])]
    return pieces


def planned(pieces: list[LivePiece], copied: Copied = NOTHING_COPIED) -> tuple[SavePlan, Holdings]:
    holdings = Holdings(tuple(pieces), (), ())
    return plan_save(holdings, copied, METADATA, CPU), holdings


def test_every_piece_lies_where_its_offset_says(engine: list[LivePiece]) -> None:
    plan, holdings = planned([*engine, piece("param", "frozen", torch.randn(ROWS * COLUMNS).bfloat16())])
    image = bytearray(plan.layout.size)
    image[: len(plan.layout.header)] = plan.layout.header
    for offset, data in plan.sources(holdings.every):
        image[offset : offset + data.numel()] = bytes(data.numpy())
    for number, offset in zip(plan.saved, plan.offsets, strict=True):
        held = holdings.every[number]
        assert (offset is None) == (held.cast_of is not None)
        if offset is not None:
            assert bytes(image[offset : offset + held.data.nbytes]) == bytes(held.data.view(torch.uint8).numpy())
    assert len(read_header(memoryview(image))) == 5


def test_kinds_are_grouped_so_that_a_flat_buffer_is_one_copy(engine: list[LivePiece]) -> None:
    plan, holdings = planned(engine)
    assert [slot.spec.key.kind for slot in plan.layout.slots] == ["exp_avg", "exp_avg", "master", "master"]
    sources = plan.sources(holdings.every)
    assert [(data.numel(), data.data_ptr()) for _, data in sources] == [
        (8 * ROWS * COLUMNS, engine[2].data.data_ptr()),
        (8 * ROWS * COLUMNS, engine[0].data.data_ptr()),
    ]
    assert [offset for offset, _ in sources] == [plan.layout.slots[0].offset, plan.layout.slots[2].offset]


def test_neighbours_in_the_file_that_are_not_in_memory_stay_apart(engine: list[LivePiece]) -> None:
    moved = [replace(held, data=held.data.clone()) if held.spec.key.name == "b" else held for held in engine]
    plan, holdings = planned(moved)
    assert len(plan.sources(holdings.every)) == 4


def test_a_piece_without_elements_takes_no_copy(engine: list[LivePiece]) -> None:
    spec = TensorSpec(TensorKey("master", "void"), "float32", (0, 3))
    plan, holdings = planned([*engine, LivePiece(spec, Box.whole(spec.shape), torch.empty(0))])
    assert len(plan.saved) == 7
    assert all(data.numel() for _, data in plan.sources(holdings.every))


def test_only_weights_without_a_master_are_frozen(engine: list[LivePiece]) -> None:
    assert not planned(engine)[0].frozen
    assert planned([*engine, piece("param", "teacher", torch.zeros(ROWS * COLUMNS))])[0].frozen


def test_copies_are_measured_where_some_rank_has_one_and_never_saved(engine: list[LivePiece]) -> None:
    further = piece("param", "a", engine[1].data.clone(), copy=1, restored=False)
    uncounted = piece("param", "a", engine[1].data.clone(), copy=None, restored=False)
    pieces = [*engine, further, uncounted]
    alone, _ = planned(pieces)
    assert alone.saved == alone.measured == tuple(range(6))
    compared, _ = planned(pieces, Copied((TensorKey("param", "a"),), 2))
    assert compared.saved == tuple(range(6)) and compared.measured == tuple(range(7))
    assert compared.cast == (1, 4)


def test_a_plan_serves_until_something_lies_elsewhere(engine: list[LivePiece]) -> None:
    before = signature(Holdings(tuple(engine), (), ()))
    assert signature(Holdings(tuple(engine), (), ())) == before
    engine[0] = replace(engine[0], data=engine[0].data.clone())
    assert signature(Holdings(tuple(engine), (), ())) != before


def test_the_ranks_share_what_all_hold_and_each_saves_its_own() -> None:
    def replica(name: str, numel: int, **options: bool) -> Replica:
        return Replica(TensorSpec(TensorKey("buffer", name), "float32", (numel,)), torch.zeros(numel), **options)

    replicas = [
        replica("large", 100),
        replica("small", 1),
        replica("small too", 1),
        replica("statistics", 2, per_rank=True),
        replica("alike", 2, per_rank=True),
        replica("proved only", 50, restored=False),
    ]
    differing = {TensorKey("buffer", "statistics")}
    found = [[held.spec.key.name for held in shares_of(replicas, differing, rank, 2)] for rank in range(2)]
    assert found == [["large", "statistics@rank0"], ["small", "small too", "statistics@rank1", "alike"]]


# -- the header of the next save


def test_relabelling_changes_the_metadata_and_moves_nothing() -> None:
    spec = TensorSpec(TensorKey("master", "w"), "float32", (3,))
    layout = plan_file([(spec, Box.whole((3,)))], METADATA)
    later = layout.relabelled({**METADATA, "step": "000000008"})
    assert later == plan_file([(spec, Box.whole((3,)))], {**METADATA, "step": "000000008"}).header != layout.header
    assert read_header(memoryview(later)) == read_header(memoryview(layout.header))
    assert layout.relabelled(METADATA) == layout.header


def test_metadata_that_would_move_the_pieces_is_refused() -> None:
    layout = plan_file([], METADATA)
    with pytest.raises(ValueError, match="does not fit"):
        layout.relabelled({**METADATA, "note": "x" * 5000})
