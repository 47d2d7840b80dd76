"""How two checkpoints differ, told from their manifests. Pure: values in, frozen values out. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.integrity.differences import ABSENT, differences

#: How `canonical.encode` marks values that plain JSON cannot say; of no interest in a path.
_TAGS = re.compile(r"\.?\$(?:tuple|float|bytes|items)")


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """One leaf that is not the same in both; values in the encoded form of the manifest."""

    path: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Section:
    """The differences of one part of two manifests. `training_state` says whether it decides the training."""

    name: str
    training_state: bool
    differences: tuple[ValueDifference, ...]


@dataclass(frozen=True, slots=True)
class TensorDifferences:
    """Tensors that only one has, that have another dtype or shape, and whose content differs."""

    only_a: tuple[TensorKey, ...]
    only_b: tuple[TensorKey, ...]
    respecified: tuple[tuple[TensorSpec, TensorSpec], ...]
    changed: tuple[TensorKey, ...]
    same: int

    @property
    def none(self) -> bool:
        return not (self.only_a or self.only_b or self.respecified or self.changed)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`provenance` (run, attempt, time) never counts as a difference."""

    tensors: TensorDifferences
    sections: tuple[Section, ...]
    provenance: tuple[ValueDifference, ...]

    @property
    def same_training_state(self) -> bool:
        """Whether training goes on alike from either: tensors, step, state, RNG, data and position."""
        return self.tensors.none and not any(s.differences for s in self.sections if s.training_state)

    @property
    def identical(self) -> bool:
        """Whether nothing but the provenance differs."""
        return self.tensors.none and not any(s.differences for s in self.sections)


def compare(a: Manifest, b: Manifest) -> Comparison:
    """Compare two checkpoints. Tensors by fingerprint, RNG by each rank's digest: no data is read.

    Which rank owns what and which weights are left to their master does not matter.
    """
    return Comparison(
        tensors=_tensors(a, b),
        sections=(
            _section("step", True, {"step": a.step}, {"step": b.step}),
            _section("state", True, _without(a.state, "scalars"), _without(b.state, "scalars")),
            _section("optimizer scalars", True, a.state.get("scalars", {}), b.state.get("scalars", {})),
            _section("data", True, _without(a.data, "global_batch_size"), _without(b.data, "global_batch_size")),
            _section("rng", True, _rng(a), _rng(b)),
            _section("batch", False, _only(a.data, "global_batch_size"), _only(b.data, "global_batch_size")),
            _section("engine", False, a.engine, b.engine),
            _section("configuration", False, _without(a.pinned, "versions"), _without(b.pinned, "versions")),
            _section("versions", False, a.pinned.get("versions", {}), b.pinned.get("versions", {})),
            _section("tied weights", False, a.aliases, b.aliases),
            _section("gate", False, a.gate, b.gate),
        ),
        provenance=tuple(_values(_provenance(a), _provenance(b))),
    )


def count_by_kind(keys: tuple[TensorKey, ...]) -> dict[str, int]:
    """How many of `keys` are of each kind, kinds in order."""
    return dict(sorted(Counter(key.kind for key in keys).items()))


def _tensors(a: Manifest, b: Manifest) -> TensorDifferences:
    old, new = a.by_key(), b.by_key()
    common = sorted(old.keys() & new.keys())
    respecified = [key for key in common if old[key].spec != new[key].spec]
    same_spec = [key for key in common if old[key].spec == new[key].spec]
    changed = [key for key in same_spec if old[key].fingerprint != new[key].fingerprint]
    return TensorDifferences(
        only_a=tuple(sorted(old.keys() - new.keys())),
        only_b=tuple(sorted(new.keys() - old.keys())),
        respecified=tuple((old[key].spec, new[key].spec) for key in respecified),
        changed=tuple(changed),
        same=len(same_spec) - len(changed),
    )


def _section(name: str, training_state: bool, a: object, b: object) -> Section:
    return Section(name, training_state, tuple(_values(a, b)))


def _values(a: object, b: object) -> Iterator[ValueDifference]:
    """Encoded values are compared: there a NaN equals itself."""
    for path, old, new in differences(a, b):
        yield ValueDifference(_TAGS.sub("", path), old, new)


def _without(part: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k != key}


def _only(part: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: part.get(key, ABSENT)}


def _rng(manifest: Manifest) -> dict[str, str]:
    return {f"rank {entry.rank}": entry.rng_digest for entry in manifest.ranks}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    return {"run_id": manifest.run_id, "attempt": manifest.attempt, "created": manifest.created}
