"""One rank's account of what it saved: pieces, where they lie in its data file, digests and RNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.records import TensorKey, TensorSpec

FORMAT = "resume_kit.index"
SCHEMA = 2


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A box of a tensor that this rank owns.

    `offset` is the absolute byte offset in the data file. It is None for a low-precision weight that was
    proved, bit by bit, to be the cast of its master at the time of saving: only its fingerprint is kept.
    """

    spec: TensorSpec
    box: Box
    fingerprint: str
    offset: int | None
    nbytes: int

    @property
    def key(self) -> TensorKey:
        return self.spec.key

    @property
    def stored(self) -> bool:
        return self.offset is not None


@dataclass(frozen=True)
class RankIndex:
    """`rng` maps a generator's name to its encoded state; `scalars` a tensor's name to its optimizer scalars.

    `carried` holds RNG records of ranks of earlier topologies, in the order of the manifest's `carried`.
    """

    run_id: str
    attempt: int
    step: int
    rank: int
    world_size: int
    data: FileDigest
    pieces: tuple[StoredPiece, ...]
    scalars: dict[str, Any]
    rng: dict[str, Any]
    carried: tuple[dict[str, Any], ...] = ()

    @property
    def data_file(self) -> str:
        return names.data_file(self.rank)

    def to_bytes(self) -> bytes:
        """The signed canonical JSON; pieces refer to the table of tensors by number."""
        specs = list(dict.fromkeys(piece.spec for piece in self.pieces))
        number = {spec: i for i, spec in enumerate(specs)}
        return canonical.sign(
            {
                "format": FORMAT,
                "schema": SCHEMA,
                "run_id": self.run_id,
                "attempt": self.attempt,
                "step": self.step,
                "rank": self.rank,
                "world_size": self.world_size,
                "data": {
                    "file": self.data_file,
                    "bytes": self.data.size,
                    "block_bytes": self.data.block_bytes,
                    "blocks": list(self.data.blocks),
                },
                "tensors": [[s.key.kind, s.key.name, s.dtype, list(s.shape)] for s in specs],
                "pieces": [[number[p.spec], str(p.box), p.fingerprint, p.offset, p.nbytes] for p in self.pieces],
                "scalars": self.scalars,
                "rng": self.rng,
                "carried": list(self.carried),
            }
        )


def parse_index(raw: bytes, path: Path) -> RankIndex:
    """A rank index from its bytes; `CheckpointDamaged` names `path` when they are not what was written."""
    document = canonical.parse_signed(raw, path)
    if document.get("format") != FORMAT or document.get("schema") != SCHEMA:
        raise canonical.damaged(path, f"format {document.get('format')!r} schema {document.get('schema')!r}")
    try:
        data = document["data"]
        specs = [
            TensorSpec(TensorKey(kind, name), dtype, tuple(shape)) for kind, name, dtype, shape in document["tensors"]
        ]
        return RankIndex(
            run_id=document["run_id"],
            attempt=document["attempt"],
            step=document["step"],
            rank=document["rank"],
            world_size=document["world_size"],
            data=FileDigest(data["bytes"], data["block_bytes"], tuple(data["blocks"])),
            pieces=tuple(
                StoredPiece(specs[tensor], Box.parse(box), fingerprint, offset, nbytes)
                for tensor, box, fingerprint, offset, nbytes in document["pieces"]
            ),
            scalars=document["scalars"],
            rng=document["rng"],
            carried=tuple(document.get("carried", ())),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise canonical.damaged(path, f"a field is missing or malformed: {error!r}") from None
