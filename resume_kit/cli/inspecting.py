"""``resume-kit inspect CKPT``: what a checkpoint holds, as its manifest says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from resume_kit.checkpoint.manifest import Manifest, TensorEntry
from resume_kit.cli.listing import engine_text
from resume_kit.cli.opening import open_checkpoint, open_manifest
from resume_kit.cli.output import FINE, Outcome, facts, heading, printable, size_text, table, time_text
from resume_kit.cli.values import decoded, in_line, mapping, sequence
from resume_kit.integrity.differences import brief


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CKPT", help="a checkpoint; of a run, its newest")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def execute(arguments: argparse.Namespace) -> Outcome:
    directory = open_checkpoint(arguments.path)
    manifest = open_manifest(directory)
    document = _document(directory, manifest)
    text = [*_text(directory, manifest, document)]
    if arguments.tensors:
        document["tensors"] = [_tensor(entry) for entry in manifest.tensors]
        text += [heading("tensors"), _tensor_table(manifest)]
    return Outcome(FINE, document, text)


def _document(directory: Path, manifest: Manifest) -> dict[str, Any]:
    state, pinned = manifest.state, manifest.pinned
    return {
        "path": str(directory),
        "step": manifest.step,
        "run_id": manifest.run_id,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "engine": manifest.engine,
        "requires": list(manifest.requires),
        "bytes": manifest.total_bytes,
        "ranks": [
            {"rank": entry.rank, "data_bytes": entry.data_bytes, "index_bytes": entry.index_bytes}
            for entry in manifest.ranks
        ],
        "kinds": _kinds(manifest),
        "aliases": manifest.aliases,
        "groups": [_group(manifest, number) for number in range(len(sequence(state.get("groups"))))],
        "optimizer": pinned.get("optimizer"),
        "optimizer_scalars": _scalars(state.get("scalars")),
        "state": {k: decoded(v) for k, v in state.items() if k not in ("groups", "scalars")},
        "data": decoded(manifest.data),
        "pinned": {k: decoded(v) for k, v in pinned.items() if k not in ("groups", "versions", "optimizer")},
        "versions": decoded(pinned.get("versions", {})),
        "gate": decoded(manifest.gate),
    }


def _kinds(manifest: Manifest) -> list[dict[str, Any]]:
    """Per kind of tensor: how many, elements, bytes in the files, and bytes left to the master's cast."""
    kinds: dict[str, dict[str, Any]] = {}
    for entry in manifest.tensors:
        kind = entry.spec.key.kind
        row = kinds.setdefault(kind, dict.fromkeys(("tensors", "elements", "bytes_stored", "bytes_cast"), 0))
        row["tensors"] += 1
        row["elements"] += entry.spec.numel
        row["bytes_stored" if entry.stored else "bytes_cast"] += entry.spec.numel * entry.spec.itemsize
    return [{"kind": kind, **row} for kind, row in sorted(kinds.items())]


def _group(manifest: Manifest, number: int) -> dict[str, Any]:
    """An optimizer group as it stood: its LR, settings, and how many weights it was constructed with."""
    settings = dict(mapping(decoded(sequence(manifest.state.get("groups"))[number])))
    built = sequence(manifest.pinned.get("groups"))
    members = mapping(built[number]).get("members") if number < len(built) else None
    lr = settings.pop("lr", None)
    return {"lr": lr, "members": len(members) if isinstance(members, list) else None, **settings}


def _scalars(scalars: object) -> list[dict[str, Any]]:
    """Optimizer scalars that tensors share, with the number of tensors that have them."""
    distinct: list[dict[str, Any]] = []
    for values in mapping(scalars).values():
        shown = {key: mapping(value).get("value", value) for key, value in mapping(values).items()}
        row = next((row for row in distinct if row["values"] == shown), None)
        if row is None:
            row = {"values": shown, "tensors": 0}
            distinct.append(row)
        row["tensors"] += 1
    return distinct


def _tensor(entry: TensorEntry) -> dict[str, Any]:
    spec = entry.spec
    return {
        "kind": spec.key.kind,
        "name": spec.key.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "fingerprint": entry.fingerprint,
        "stored": entry.stored,
        "owner": entry.owner,
    }


def _text(directory: Path, manifest: Manifest, document: dict[str, Any]) -> Iterator[RenderableType]:
    yield facts(_summary(directory, manifest, document))
    yield heading("ranks")
    rows = [(r["rank"], size_text(r["data_bytes"]), size_text(r["index_bytes"])) for r in document["ranks"]]
    yield table(("rank", "data", "index"), rows, right=("rank", "data", "index"))
    yield heading("state by kind")
    yield table(
        ("kind", "tensors", "elements", "stored", "left to the master's cast"),
        [
            (
                row["kind"],
                row["tensors"],
                f"{row['elements']:,}",
                size_text(row["bytes_stored"]),
                size_text(row["bytes_cast"]),
            )
            for row in document["kinds"]
        ],
        right=("tensors", "elements", "stored", "left to the master's cast"),
    )
    yield heading(f"optimizer {document['optimizer'] or ''}".rstrip())
    yield table(
        ("group", "LR", "weights", "settings"),
        [
            (number, group["lr"], "?" if group["members"] is None else group["members"], _settings(group))
            for number, group in enumerate(document["groups"])
        ],
        right=("group", "LR", "weights"),
    )
    for row in document["optimizer_scalars"]:
        yield f"{printable(in_line(row['values']))} on {row['tensors']} tensors"


def _settings(group: dict[str, Any]) -> str:
    return in_line({key: value for key, value in group.items() if key not in ("lr", "members")})


def _summary(directory: Path, manifest: Manifest, document: dict[str, Any]) -> Iterator[tuple[str, object]]:
    yield "checkpoint", directory
    yield "step", manifest.step
    yield "run", f"{manifest.run_id}, attempt {manifest.attempt}"
    yield "saved", time_text(manifest.created)
    yield "engine", f"{engine_text(manifest.engine)}, {manifest.world_size} ranks"
    yield "size", f"{size_text(manifest.total_bytes)} ({manifest.total_bytes:,} bytes)"
    if manifest.requires:
        yield "requires", ", ".join(manifest.requires)
    if manifest.aliases:
        yield "tied", in_line(manifest.aliases)
    for name, value in document["state"].items():
        yield name, in_line(value)
    data = mapping(document["data"])
    for name, value in data.items():
        yield f"data {name}" if name != "fingerprint" else "data", in_line(value)
    for name, value in document["pinned"].items():
        yield f"pinned {name}", brief(value, 100)
    yield "versions", in_line(document["versions"])
    yield "gate", "not recorded" if manifest.gate is None else in_line(document["gate"])


def _tensor_table(manifest: Manifest) -> RenderableType:
    def rows() -> Iterator[tuple[object, ...]]:
        for entry in manifest.tensors:
            spec = entry.spec
            owner = "sharded" if entry.owner is None else f"rank {entry.owner}"
            where = owner if entry.stored else f"{owner}, cast of master"
            yield spec.key.kind, spec.key.name, spec.dtype, list(spec.shape), entry.fingerprint, where

    return table(("kind", "name", "dtype", "shape", "fingerprint", "owner"), rows())
