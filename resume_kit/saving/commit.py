"""Rank 0's part of a commit: the whole is checked, the manifest written, the directory renamed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, files, names
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.manifest import Manifest, RankEntry
from resume_kit.engines import rng
from resume_kit.errors import CheckpointDamaged, InconsistentState, Problem, SaveFailed
from resume_kit.integrity.assembly import assemble, require_state
from resume_kit.planning.holders import holders_of
from resume_kit.saving.capture import Capture
from resume_kit.saving.plan import own_name


def commit_checkpoint(capture: Capture, written: list[dict[str, Any]], staging: Path) -> int:
    """On rank 0, after all have written: check the whole, write the manifest, publish. Returns total bytes."""
    request, differing = capture.account.request, capture.differing
    replicas = [replica for replica in capture.holdings.replicas if replica.restored]
    late = time.monotonic() + files.VISIBLE_WITHIN  # for all of them together
    indices = [_read_back(staging, rank, account, late) for rank, account in enumerate(written)]
    whole = {r.spec.key for r in replicas if r.spec.key not in differing}
    own = {own_name(r, rank).spec.key for r in replicas if r.spec.key in differing for rank in range(len(written))}
    assembly = assemble(indices, whole | own)
    description = request.description
    problems = [
        *assembly.problems,
        *require_state(
            assembly.tensors,
            (spec.key.name for spec in description.weights),
            description.groups,
            request.updates,
        ),
    ]
    if problems:
        raise InconsistentState("the checkpoint would not be whole; nothing was committed", problems)
    manifest = Manifest(
        run_id=request.run_id,
        attempt=request.attempt,
        step=request.step,
        created=time.time(),
        engine=dict(capture.account.topology),
        tensors=assembly.tensors,
        ranks=tuple(
            RankEntry(
                index.rank,
                index.data.size,
                index.data.whole,
                account["bytes"],
                account["digest"],
                rng.digest(index.rng),
            )
            for index, account in zip(indices, written, strict=True)
        ),
        aliases=dict(description.aliases),
        state=canonical.encode({**request.state, "scalars": assembly.scalars}, "state"),
        data=canonical.encode(dict(request.data), "data"),
        pinned=canonical.encode(dict(request.pinned), "pinned"),
        gate=canonical.encode(request.gate, "gate"),
        requires=("cast-of-master",) if any(not entry.stored for entry in assembly.tensors) else (),
        holders=holders_of(indices),
        carried=tuple(dict(carried.topology) for carried in request.carried),
    )
    files.write_durably(staging / names.MANIFEST, manifest.to_bytes())
    final = request.directory / names.step_directory(request.step)
    try:
        files.publish(staging, final)
    except OSError as error:
        raise files.write_failed(final, error, manifest.total_bytes) from error
    return manifest.total_bytes


def _read_back(staging: Path, rank: int, account: Mapping[str, Any], deadline: float) -> RankIndex:
    path = staging / names.index_file(rank)
    try:
        raw = files.read_when_visible(path, account["bytes"], deadline)
    except CheckpointDamaged as error:  # nothing was committed that could be damaged
        raise SaveFailed("an index did not arrive", error.problems) from error
    if canonical.digest(raw) != account["digest"]:
        raise SaveFailed(
            "an index did not arrive as it was written",
            [Problem("commit", f"rank {rank}, {path}", "rank 0 reads other bytes", "check the shared file system")],
        )
    return parse_index(raw, path)
