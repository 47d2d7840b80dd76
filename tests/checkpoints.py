"""Genuine committed checkpoints without torch or an engine: the real format modules, NumPy data.

The model has two sharded weights, of which every rank owns a flat range, and a buffer that rank 0 owns. The
low-precision weights are casts of their masters, so they are proved and not stored, as a save does it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint import canonical, files, names
from resume_kit.checkpoint.blocks import FileDigest
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.manifest import Manifest, RankEntry
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.integrity.assembly import assemble
from resume_kit.recovery import grounds
from resume_kit.recovery.attempts import Token
from resume_kit.run.retention import settle_leftovers

RUN_ID = "0123456789ab"
WEIGHTS: dict[str, tuple[int, ...]] = {"layers.0.weight": (8, 6), "layers.0.bias": (7,)}
BUFFER = "norm.running_mean"
CREATED = 1_700_000_000.0
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-08, "weight_decay": 0.1}

Pieces = list[tuple[TensorSpec, Box, np.ndarray, bool]]


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint holds. Two with the same recipe hold the same training state."""

    step: int
    ranks: int = 2
    attempt: int = 1
    run_id: str = RUN_ID
    created: float = CREATED
    seed: int = 0
    lr: float = 0.003
    zero_stage: int = 3
    position: int | None = None
    rng_seed: int = 0
    gate: Mapping[str, float] | None = field(default_factory=lambda: {"loss": 2.5, "grad_norm": 1.25})
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(WEIGHTS))
    config: Mapping[str, Any] = field(default_factory=lambda: {"layers": 1, "dropout": 0.1})
    versions: Mapping[str, str] = field(default_factory=lambda: {"python": "3.11.7", "torch": "2.9.0"})
    user: Mapping[str, Any] = field(default_factory=dict)


def commit(run: Path, step: int, **recipe: Any) -> Path:
    """Save and commit a checkpoint of `step` in `run`; returns its directory."""
    return publish(run, stage(run, Recipe(step, **recipe)))


def stage(run: Path, recipe: Recipe) -> Path:
    """The finished directory in its attempt's ground, as it stands just before the rename that commits it."""
    staging = names.ground(run, recipe.attempt) / names.step_directory(recipe.step)
    staging.mkdir(parents=True)
    owned = _owned(recipe)
    indices, written = [], []
    for rank in range(recipe.ranks):
        index = write_rank(staging, recipe, rank, owned[rank])
        raw = index.to_bytes()
        files.write_durably(staging / names.index_file(rank), raw)
        indices.append(index)
        written.append(raw)
    assembly = assemble(indices, {TensorKey("buffer", BUFFER)})
    assert not assembly.problems, assembly.problems
    manifest = Manifest(
        run_id=recipe.run_id,
        attempt=recipe.attempt,
        step=recipe.step,
        created=recipe.created,
        engine={"engine": "deepspeed", "zero_stage": recipe.zero_stage, "world_size": recipe.ranks},
        tensors=assembly.tensors,
        ranks=tuple(
            RankEntry(
                index.rank,
                index.data.size,
                index.data.whole,
                len(raw),
                canonical.digest(raw),
                canonical.digest(canonical.dumps(index.rng)),
            )
            for index, raw in zip(indices, written, strict=True)
        ),
        aliases={"head.weight": "layers.0.weight"},
        state=canonical.encode(_state(recipe, assembly.scalars)),
        data=canonical.encode(_data(recipe)),
        pinned=canonical.encode(_pinned(recipe)),
        gate=canonical.encode(None if recipe.gate is None else dict(recipe.gate)),
        requires=("cast-of-master",),
    )
    files.write_durably(staging / names.MANIFEST, manifest.to_bytes())
    return staging


def publish(run: Path, staging: Path) -> Path:
    """Commit what `stage` made."""
    final = run / staging.name
    files.publish(staging, final)
    with suppress(OSError):
        for folder in (staging.parent, staging.parent.parent, run / names.ATTEMPTS):  # where nothing else is left
            folder.rmdir()
    return final


def settle(run: Path) -> Token:
    """What the next start does with all that dead attempts have left."""
    token = Token.take(run, world_size=1, run_id=None, take_over=True)
    settle_leftovers(run, token.ground)
    assert grounds.clear(token.ground) == []
    return token


def left_in(run: Path) -> list[str]:
    """All that is in a run directory, but for the journal and the attempts, and what lies in the attempts' grounds."""
    grounds_of = run.glob(f"{names.ATTEMPTS}/*/{names.GROUND}/*")
    others = (entry for entry in run.iterdir() if entry.name not in (names.ATTEMPTS, names.JOURNAL))
    return sorted(str(entry.relative_to(run)) for entry in (*others, *grounds_of))


def resign(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a signed document and sign it anew: what a forger or another version would have written."""
    document = json.loads(path.read_bytes())
    del document["digest"]
    change(document)
    path.write_bytes(canonical.sign(document))


def flip(path: Path, position: int, bit: int) -> None:
    """Turn over one bit of a file in place; once more puts it back."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 `values` rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _owned(recipe: Recipe) -> list[Pieces]:
    """Per rank, its pieces with their data, and whether the data is stored."""
    owned: list[Pieces] = [[] for _ in range(recipe.ranks)]
    generator = np.random.default_rng([recipe.seed, recipe.step])
    for name, shape in recipe.weights.items():
        whole = {
            kind: generator.standard_normal(shape, dtype=np.float32) for kind in ("master", "exp_avg", "exp_avg_sq")
        }
        tensors = [(kind, "float32", data, True) for kind, data in whole.items()]
        tensors.append(("param", "bfloat16", to_bfloat16(whole["master"]), False))
        for kind, dtype, data, stored in tensors:
            spec = TensorSpec(TensorKey(kind, name), dtype, tuple(shape))
            for rank in range(recipe.ranks):
                start, stop = (spec.numel * (rank + edge) // recipe.ranks for edge in (0, 1))
                for box in boxes_of_flat_range(shape, start, stop):
                    owned[rank].append((spec, box, data[box.slices].reshape(-1), stored))
    spec = TensorSpec(TensorKey("buffer", BUFFER), "float32", (4,))
    owned[0].append((spec, Box.whole(spec.shape), generator.standard_normal(4, dtype=np.float32), True))
    return owned


def write_rank(staging: Path, recipe: Recipe, rank: int, owned: Pieces) -> RankIndex:
    layout = plan_file(
        [(spec, box) for spec, box, _, stored in owned if stored],
        {
            "format": "resume_kit",
            "step": str(recipe.step),
            "rank": str(rank),
            "world_size": str(recipe.ranks),
        },
    )
    image = bytearray(layout.size)
    image[: len(layout.header)] = layout.header
    slots = {(slot.spec, slot.box): slot for slot in layout.slots}
    pieces = []
    for spec, box, data, stored in owned:
        slot = slots[spec, box] if stored else None
        if slot is not None:
            image[slot.offset : slot.offset + slot.nbytes] = data.tobytes()
        share = fingerprint.to_hex(fingerprint.fingerprint_of_box(data, spec.shape, box))
        pieces.append(StoredPiece(spec, box, share, slot.offset if slot else None, slot.nbytes if slot else 0))
    digests: FileDigest = files.write_image(staging / names.data_file(rank), memoryview(image))
    step = {"step": {"device": "cpu", "dtype": "float32", "value": float(recipe.step)}}
    return RankIndex(
        run_id=recipe.run_id,
        attempt=recipe.attempt,
        step=recipe.step,
        rank=rank,
        world_size=recipe.ranks,
        data=digests,
        pieces=tuple(pieces),
        scalars=dict.fromkeys(recipe.weights, step),
        rng=canonical.encode({"python": random.Random(f"{recipe.rng_seed} {recipe.step} {rank}").getstate()}),
    )


def _state(recipe: Recipe, scalars: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "groups": [{**SETTINGS, "lr": recipe.lr}],
        "counters": {"global_steps": recipe.step, "global_samples": 8 * recipe.step, "skipped_steps": 0},
        "scheduler": {"class": "WarmupLR", "state": {"last_batch_iteration": recipe.step - 1}},
        "scaler": {"cur_scale": 1.0, "dynamic": False},
        "user": dict(recipe.user),
        "scalars": dict(scalars),
    }


def _data(recipe: Recipe) -> dict[str, Any]:
    return {
        "fingerprint": {"content": "9ebea803a9f64f7ccb796bc1b71d32a4", "seed": 1234, "num_samples": 125000},
        "global_batch_size": 8,
        "position": 8 * recipe.step if recipe.position is None else recipe.position,
    }


def _pinned(recipe: Recipe) -> dict[str, Any]:
    return {
        "config": dict(recipe.config),
        "groups": [{**SETTINGS, "lr": 0.0, "members": list(recipe.weights)}],
        "model": {"n_embd": 8},
        "optimizer": "AdamW",
        "versions": dict(recipe.versions),
    }
