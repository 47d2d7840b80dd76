"""Megatron models as geometry tables, without any engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resume_kit.planning.layouts.geometry import Geometry, Weight


@dataclass(frozen=True)
class Gpt:
    layers: int = 2
    hidden: int = 8
    ffn: int = 12
    heads: int = 2
    groups: int = 2
    vocabulary: int = 16
    experts: int = 0
    gated: bool = True
    tied: bool = False

    @property
    def geometry(self) -> Geometry:
        hidden = self.hidden
        weights: dict[str, Weight] = {}

        def add(name: str, shape: tuple[int, ...], axis: int | None, **options: Any) -> None:
            order = weights[next(reversed(weights))].order + 1 if weights else 0
            if options.get("gated") == "up":
                order -= 1
            weights[name] = Weight(shape, order, axis, **options)

        place = "both" if self.tied else "first"
        add("embedding.word_embeddings.weight", (self.vocabulary, hidden), 0, place=place)
        add("embedding.position_embeddings.weight", (10, hidden), None, place="first")
        for layer in range(self.layers):
            prefix = f"decoder.layers.{layer}."
            add(f"{prefix}input_layernorm.weight", (hidden,), None, layer=layer)
            qkv = hidden + 2 * hidden // self.heads * self.groups
            add(f"{prefix}self_attention.linear_proj.weight", (hidden, hidden), 1, layer=layer)
            add(f"{prefix}self_attention.linear_qkv.weight", (qkv, hidden), 0, layer=layer)
            add(f"{prefix}self_attention.linear_qkv.bias", (qkv,), 0, layer=layer)
            add(f"{prefix}pre_mlp_layernorm.weight", (hidden,), None, layer=layer)
            if self.experts:
                add(f"{prefix}mlp.router.weight", (self.experts, hidden), None, layer=layer)
            for expert in range(self.experts) if self.experts else [None]:
                mlp = f"{prefix}mlp." if expert is None else f"{prefix}mlp.experts.{expert}."
                for half in ("gate", "up") if self.gated else (None,):
                    suffix = f".{half}" if half else ""
                    shape = (self.ffn, hidden)
                    add(f"{mlp}linear_fc1.weight{suffix}", shape, 0, layer=layer, expert=expert, gated=half)
                add(f"{mlp}linear_fc2.weight", (hidden, self.ffn), 1, layer=layer, expert=expert)
        add("decoder.final_layernorm.weight", (hidden,), None, place="last")
        if not self.tied:
            add("output_layer.weight", (self.vocabulary, hidden), 0, place="last")
        return Geometry(self.layers, self.heads, self.groups, self.experts, self.vocabulary, self.tied, weights)
