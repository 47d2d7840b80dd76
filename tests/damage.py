"""Damage done to committed checkpoints on purpose, as disks, people and other programs do it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical


def flip_random_bit(checkpoint: Path, rng: random.Random) -> Path:
    """Flip one random bit of one random file; return the file."""
    path = rng.choice(sorted(checkpoint.iterdir()))
    flip_bit(path, rng.randrange(path.stat().st_size * 8))
    return path


def flip_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".swap")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def resign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a signed document and sign it again: what another writer, not a fault, would do."""
    document = json.loads(path.read_bytes())
    del document["digest"]
    change(document)
    path.write_bytes(canonical.sign(document))


def resign_index(checkpoint: Path, rank: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a rank's index and make the manifest agree with it."""
    path = checkpoint / f"rank-{rank:05d}.index.json"
    resign(path, change)
    raw = path.read_bytes()

    def adopt(manifest: dict[str, Any]) -> None:
        entry = manifest["ranks"][rank]
        entry["index"]["bytes"], entry["index"]["digest"] = len(raw), canonical.digest(raw)
        entry["rng"] = canonical.digest(canonical.dumps(json.loads(raw)["rng"]))

    resign(checkpoint / "manifest.json", adopt)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data missing": (lambda c: (c / "rank-00001.safetensors").unlink(), "rank-00001.safetensors"),
    "data truncated": (lambda c: truncate(c / "rank-00000.safetensors"), "rank-00000.safetensors"),
    "data grown": (lambda c: os.truncate(c / "rank-00001.safetensors", 10**6), "rank-00001.safetensors"),
    "data swapped": (
        lambda c: swap(c / "rank-00000.safetensors", c / "rank-00001.safetensors"),
        "rank-00000.safetensors",
    ),
    "data flipped": (lambda c: flip_bit(c / "rank-00001.safetensors", 70_001), "rank-00001.safetensors"),
    "index missing": (lambda c: (c / "rank-00000.index.json").unlink(), "rank-00000.index.json"),
    "index truncated": (lambda c: truncate(c / "rank-00001.index.json"), "rank-00001.index.json"),
    "index swapped": (
        lambda c: swap(c / "rank-00000.index.json", c / "rank-00001.index.json"),
        "rank-00000.index.json",
    ),
    "manifest missing": (lambda c: (c / "manifest.json").unlink(), "manifest.json"),
    "manifest truncated": (lambda c: truncate(c / "manifest.json"), "manifest.json"),
    "manifest empty": (lambda c: (c / "manifest.json").write_bytes(b""), "manifest.json"),
    "manifest of other types": (lambda c: resign(c / "manifest.json", lambda d: d.update(ranks=7)), "manifest.json"),
    "manifest of another step": (lambda c: resign(c / "manifest.json", lambda d: d.update(step=3)), "manifest.json"),
}

#: Not damage but a reader or a run that does not fit: refused, no fallback.
MISFITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown schema": (lambda c: resign(c / "manifest.json", lambda d: d.update(schema=99)), "schema version 99"),
    "unknown feature": (
        lambda c: resign(c / "manifest.json", lambda d: d.update(requires=["quantum"])),
        "requires features that this resume_kit does not know: quantum",
    ),
    "no rng record": (
        lambda c: resign_index(c, 1, lambda d: d.update(rng={})),
        "rank 1: the checkpoint has no RNG record",
    ),
    "other versions": (
        lambda c: resign(c / "manifest.json", lambda d: d["pinned"]["versions"].update(deepspeed="0.1")),
        "deepspeed: saved with 0.1",
    ),
}
