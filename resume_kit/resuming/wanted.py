"""What a rank wants from a checkpoint: which box of which tensor, before the live optimizer tensors exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.manifest import Manifest, TensorEntry
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import EngineAdapter
from resume_kit.policy.judgement import MODEL_KINDS


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a tensor. `required` is False for a low-precision weight that follows from its master."""

    spec: TensorSpec
    box: Box
    required: bool = True


def optimizer_kinds(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Optimizer tensors of the checkpoint: weight name → kind → dtype."""
    kinds: dict[str, dict[str, str]] = {}
    for entry in manifest.tensors:
        if entry.spec.key.kind not in MODEL_KINDS:
            kinds.setdefault(entry.spec.key.name, {})[entry.spec.key.kind] = entry.spec.dtype
    return kinds


def stored_key(key: TensorKey, entries: Mapping[TensorKey, TensorEntry], rank: int) -> TensorKey:
    """The key under which the checkpoint holds a replica: this rank's own version where the ranks differed.

    A rank that the save did not have takes the version of rank 0.
    """
    for owner in (rank, 0):
        own = TensorKey(key.kind, f"{key.name}@rank{owner}")
        if own in entries:
            return own
    return key


def plain_key(key: TensorKey) -> TensorKey:
    """The key of a replica's logical tensor, without the rank whose own version it is."""
    return TensorKey(key.kind, key.name.split("@rank")[0])


def wants_of(adapter: EngineAdapter, manifest: Manifest, rank: int) -> Iterator[Want]:
    """All boxes that this rank must get. A weight that is saved in another dtype follows from its master."""
    entries = manifest.by_key()
    kinds = optimizer_kinds(manifest)
    for piece in adapter.pieces():
        key = piece.spec.key
        if key.kind not in MODEL_KINDS or not piece.restored:
            continue
        entry = entries.get(key)
        if entry is None or entry.spec == piece.spec or piece.cast_of is None:
            yield Want(piece.spec, piece.box, required=piece.cast_of is None)
        if key.kind == "master":
            for kind, dtype in kinds.get(key.name, {}).items():
                yield Want(TensorSpec(TensorKey(kind, key.name), dtype, piece.spec.shape), piece.box)
    for replica in adapter.replicas():
        if replica.restored:
            spec = replace(replica.spec, key=stored_key(replica.spec.key, entries, rank))
            yield Want(spec, Box.whole(spec.shape))
