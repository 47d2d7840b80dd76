"""A Megatron model as the checkpoint describes it: which weight lies where, and on which axis it is split."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Place = Literal["first", "last", "both", "layer"]
Gated = Literal["gate", "up"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One logical weight.

    order: its rank in module traversal order; the gate and the up half of one fc1 have the same. That of an expert's
        weight is compared with the same expert's only, beyond coming before or after the layer's other weights.
    axis: the dimension that tensor parallelism splits; None where each of its ranks has the whole.
    place: the stage: the first, the last, both (a tied embedding, owned by the first), or that of `layer`.
    trainable: False for a frozen weight, which is in no optimizer.
    """

    shape: tuple[int, ...]
    order: int
    axis: int | None = None
    place: Place = "layer"
    layer: int | None = None
    expert: int | None = None
    gated: Gated | None = None
    trainable: bool = True


@dataclass(frozen=True)
class Geometry:
    """`experts` 0 stands for a dense model; `vocabulary` is the padded one."""

    layers: int
    attention_heads: int
    query_groups: int
    experts: int
    vocabulary: int
    tied_embeddings: bool
    weights: Mapping[str, Weight]

    @classmethod
    def from_document(
        cls, document: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], frozen: Container[str] = ()
    ) -> Geometry:
        """From `pinned.geometry` of a manifest and the global shapes of its weights. ValueError names what is off."""
        weights = {}
        for name, entry in document["weights"].items():
            if name not in shapes:
                raise ValueError(f"the geometry names {name}, which is not among the weights")
            place, gated = entry["place"], entry["gated"]
            if place not in get_args(Place) or (gated is not None and gated not in get_args(Gated)):
                raise ValueError(f"the geometry has {name} at {place!r}, gated {gated!r}")
            if place == "layer" and not 0 <= entry["layer"] < document["layers"]:
                raise ValueError(f"the geometry has {name} in layer {entry['layer']} of {document['layers']}")
            weights[name] = Weight(
                tuple(shapes[name]),
                entry["order"],
                entry["axis"],
                cast(Place, place),
                entry["layer"],
                entry["expert"],
                cast(Gated | None, gated),
                name not in frozen,
            )
        return cls(
            document["layers"],
            document["attention_heads"],
            document["query_groups"],
            document["experts"],
            document["vocabulary"],
            document["tied_embeddings"],
            weights,
        )

    def to_document(self) -> dict[str, Any]:
        """The inverse of `from_document`."""
        return {
            "layers": self.layers,
            "attention_heads": self.attention_heads,
            "query_groups": self.query_groups,
            "experts": self.experts,
            "vocabulary": self.vocabulary,
            "tied_embeddings": self.tied_embeddings,
            "weights": {
                name: {
                    "order": weight.order,
                    "axis": weight.axis,
                    "place": weight.place,
                    "layer": weight.layer,
                    "expert": weight.expert,
                    "gated": weight.gated,
                }
                for name, weight in self.weights.items()
            },
        }
