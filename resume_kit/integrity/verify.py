"""Is a committed checkpoint whole? Quick: manifest, indices, sizes, coverage. Deep: every byte of data as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

import numpy as np

from resume_kit.algebra import fingerprint
from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.layout import entry_name, read_header
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.checkpoint.reading import check_data_file, check_ranges, read_index
from resume_kit.checkpoint.sharing import Shared, default_readers, share_out
from resume_kit.errors import CheckpointDamaged, Problem, ResumeKitError
from resume_kit.integrity.assembly import assemble

#: `progress(done, total)` in bytes.
Progress = Callable[[int, int], None]


#: What reading a signed document raises when its fields are of other types than the format says.
MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


def quick_problems(directory: Path) -> list[Problem]:
    """All that is wrong with a checkpoint, without reading tensor data. Empty for a good one; never raises."""
    return _found(directory, lambda: _indices(directory, read_manifest(directory))[1])


def deep_problems(directory: Path, progress: Progress = lambda _done, _total: None) -> list[Problem]:
    """`quick_problems`, and every byte of every data file against its digests, header and fingerprints."""

    def look() -> list[Problem]:
        indices, problems = _indices(directory, read_manifest(directory))
        total = sum(index.data.size for index in indices)
        done = 0
        lock = Lock()

        def on_block(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                progress(done, total)

        for index in indices:
            path = directory / index.data_file
            try:
                check_ranges(path, index.data, [(0, index.data.size)], on_block=on_block)
            except CheckpointDamaged as damage:
                problems += damage.problems
            else:
                problems += _content_problems(path, index)
        return problems

    return _found(directory, look)


def _found(directory: Path, look: Callable[[], list[Problem]]) -> list[Problem]:
    try:
        return look()
    except OSError as error:
        if not isinstance(error, ResumeKitError):
            where = str(error.filename or directory)
            return [Problem("integrity", where, f"cannot be read: {error.strerror or error}", "check permissions")]
        return _problems_of(error, directory)
    except ResumeKitError as error:
        return _problems_of(error, directory)
    except MALFORMED as error:
        what = f"a manifest, index or data file is malformed: {error!r}"
        return [Problem("integrity", str(directory), what, canonical.RESTORE)]


def _problems_of(error: ResumeKitError, directory: Path) -> list[Problem]:
    return list(error.problems) or [Problem("integrity", str(directory), error.headline, canonical.RESTORE)]


def _indices(directory: Path, manifest: Manifest) -> tuple[list[RankIndex], list[Problem]]:
    indices, problems = [], list(_strangers(directory, manifest))
    for rank in range(manifest.world_size):
        for check in (read_index, check_data_file):
            try:
                found = check(directory, manifest, rank)
                if isinstance(found, RankIndex):
                    indices.append(found)
            except CheckpointDamaged as damage:
                problems += damage.problems
    if len(indices) == manifest.world_size:
        owned = {entry.spec.key for entry in manifest.tensors if entry.owner is not None}
        assembly = assemble(indices, owned)
        problems += assembly.problems
        if assembly.tensors != manifest.tensors:
            path = str(directory / names.MANIFEST)
            problems.append(Problem("ownership", path, "the indices and the manifest tell different things"))
        for index in indices:
            if canonical.digest(canonical.dumps(index.rng)) != manifest.ranks[index.rank].rng_digest:
                path = str(directory / names.index_file(index.rank))
                problems.append(Problem("rng", path, "the RNG record is not the one in the manifest"))
            entry = manifest.ranks[index.rank]
            if index.data.whole != entry.data_digest or index.data.size != entry.data_bytes:
                path = str(directory / names.index_file(index.rank))
                problems.append(Problem("integrity", path, "its block digests are not those of the manifest's file"))
    return indices, problems


def _strangers(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    expected = {names.MANIFEST}
    for rank in range(manifest.world_size):
        expected |= {names.data_file(rank), names.index_file(rank)}
    for entry in sorted(directory.iterdir()):
        if entry.name not in expected:
            yield Problem("integrity", str(entry), "does not belong to this checkpoint", "move it elsewhere")


def _content_problems(path: Path, index: RankIndex) -> list[Problem]:
    """The safetensors header and every stored piece's fingerprint against the index."""
    with path.open("rb") as file:
        image = np.memmap(file, dtype=np.uint8, mode="r").data
    try:
        header = read_header(image)
    except ValueError as error:
        return list(canonical.damaged(path, str(error)).problems)
    base = 8 + int.from_bytes(image[:8], "little")
    found: list[tuple[int, Problem]] = []

    def check(pieces: Shared[StoredPiece]) -> None:
        for piece in pieces:
            if piece.offset is None:
                continue
            entry = header.get(entry_name(piece.spec, piece.box), {})
            where = [piece.offset - base, piece.offset - base + piece.nbytes]
            if entry.get("data_offsets") != where:
                what = "the file's header has it elsewhere than the index"
                found.append((piece.offset, Problem("integrity", f"{path}, {piece.key}", what)))
            data = np.frombuffer(image[piece.offset : piece.offset + piece.nbytes], dtype=f"u{piece.spec.itemsize}")
            actual = fingerprint.to_hex(fingerprint.fingerprint_of_box(data, piece.spec.shape, piece.box))
            if actual != piece.fingerprint:
                what = f"its bytes have fingerprint {actual}, the tensor had {piece.fingerprint} when it was saved"
                place = f"{path}, {piece.key} [{piece.box}]"
                found.append((piece.offset, Problem("fingerprint", place, what, canonical.RESTORE)))

    share_out(index.pieces, check, min(default_readers(), max(1, len(index.pieces))))
    return [problem for _, problem in sorted(found, key=lambda one: one[0])]
