"""What a planner needs to lay a Megatron model out on any topology, the same whatever the topology of today."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resume_kit.engines.megatron.logical import LocalWeight

_LAYER = 10_000_000_000  # the room of a layer in the order, far more than its parameters take
_AFTER = 1 << 60  # where what follows the layers begins
_EXPERTS = 1_000_000  # where a layer's experts begin
_EXPERT = 1_000  # the room of an expert
_BEHIND = 5_000_000_000  # where what follows a layer's experts begins


def geometry(model: Any, weights: Sequence[LocalWeight]) -> dict[str, Any]:
    """The model's figures, and of each weight of this rank where it belongs.

    `order` sorts weights as every rank builds them; `axis` is the one that tensor parallelism splits; `place` is
    `layer`, or the stage that has it: `first`, `last`, or `both` for an embedding that is the output layer too.
    """
    config = model.config
    tied = bool(model.share_embeddings_and_output_weights)
    own = [weight for weight in weights if not weight.later_copy]
    return {
        "layers": config.num_layers,
        "attention_heads": config.num_attention_heads,
        "query_groups": config.num_query_groups or config.num_attention_heads,
        "experts": config.num_moe_experts or 0,
        "vocabulary": model.vocab_size,
        "tied_embeddings": tied,
        "weights": {
            part.name: {
                "order": order,
                "axis": weight.axis,
                "place": _place(weight, tied=tied),
                "layer": weight.layer,
                "expert": weight.expert,
                "gated": part.name.rsplit(".", 1)[1] if len(weight.parts) > 1 else None,
            }
            for weight, order in zip(own, _orders(own), strict=True)
            for part in weight.parts
        },
    }


def _orders(weights: Sequence[LocalWeight]) -> list[int]:
    """Numbers by section (before the layers, a layer, an expert in it, after the layers), and within it."""
    seen: dict[tuple[int, int], int] = {}
    with_experts: set[int] = set()
    orders = []
    for weight in weights:
        section = 0 if weight.physical.startswith("embedding.") else -1 if weight.layer is None else weight.layer + 1
        start = section * _LAYER if section >= 0 else _AFTER
        if weight.expert is not None:
            with_experts.add(section)
            start += _EXPERTS + weight.expert * _EXPERT
        elif section in with_experts:
            start += _BEHIND
        number = seen.setdefault((section, start), 0)
        seen[section, start] += 1
        orders.append(start + number)
    return orders


def _place(weight: LocalWeight, *, tied: bool) -> str:
    if weight.layer is not None:
        return "layer"
    if not weight.physical.startswith("embedding."):
        return "last"
    return "both" if tied and weight.physical == "embedding.word_embeddings.weight" else "first"
