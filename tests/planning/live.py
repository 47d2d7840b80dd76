"""What real engines hold, for comparing with what a layout predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from resume_kit.planning.layouts.geometry import Geometry
from resume_kit.planning.layouts.layout import Layout

#: (name of the weight, box of its master as text, whether the rank owns it)
Holding = tuple[str, str, bool]


def assert_predicted_is_live(layout: Layout, live: Sequence[Iterable[Holding]]) -> None:
    """The layout says of every rank exactly what that rank's engine holds; `live` is in rank order."""
    assert layout.world_size == len(live)
    for rank, holdings in enumerate(live):
        predicted = sorted((held.name, str(held.box), held.owned) for held in layout.held(rank))
        assert predicted == sorted(holdings), f"rank {rank}"


def deepspeed_masters(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """What a DeepSpeed engine of `tests.jobs` holds: masters, and of frozen weights what it owns."""
    from resume_kit.engines.deepspeed.adapter import DeepSpeedAdapter
    from tests.jobs import Job, build

    engine, loader = build(rank, world_size, Job(**options))
    adapter = DeepSpeedAdapter(engine)
    description = adapter.describe()
    held = [
        (piece.spec.key.name, str(piece.box), piece.owned)
        for piece in adapter.pieces()
        if piece.spec.key.kind == "master" or piece.spec.key.name not in description.trainable
    ]
    loader.close()
    return {
        "held": held,
        "shapes": {spec.key.name: spec.shape for spec in description.weights},
        "groups": [list(group["members"]) for group in description.groups],
    }


def megatron_masters(rank: int, world_size: int, cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each case what the adapter of a real Megatron engine holds on this rank, and how it describes the model."""
    from megatron.core import parallel_state

    found = []
    for case in cases:
        found.append(_megatron_masters(**case))
        parallel_state.destroy_model_parallel()
    return found


def _megatron_masters(parallel: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    from launch.megatron_config import MegatronConfig, ModelConfig, ParallelConfig
    from launch.megatron_training import build
    from resume_kit.engines.description import to_plain
    from resume_kit.engines.megatron.adapter import MegatronAdapter
    from resume_kit.engines.megatron.engine import MegatronEngine

    config = MegatronConfig(global_batch_size=16, parallel=ParallelConfig(**parallel), model=ModelConfig(**model))
    training = build(config)
    adapter = MegatronAdapter(MegatronEngine(training.chunks, training.optimizer, training.scheduler))
    held = [
        (piece.spec.key.name, str(piece.box), piece.owned)
        for piece in adapter.pieces()
        if piece.spec.key.kind == "master" and piece.restored
    ]
    training.loader.close()
    return {"held": held, "topology": adapter.topology, "description": to_plain(adapter.describe())}


def geometry_of(ranks: Sequence[Mapping[str, Any]]) -> Geometry:
    """The geometry that the ranks' adapters would pin, as a checkpoint keeps it."""
    from resume_kit.engines.description import united

    description = united([rank["description"] for rank in ranks])
    shapes = {name: tuple(shape) for _, name, _, shape in description["weights"]}
    return Geometry.from_document(description["pinned"]["geometry"], shapes)
