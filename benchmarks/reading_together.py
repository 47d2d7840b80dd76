"""Column slices of a checkpoint, read by ranks alone and together: `python -m benchmarks.reading_together --work DIR`.

The files are those of TP1, rows shared out among the ranks. A plain load reads the same boxes back; the others read
column slices, as TP with so many ranks wants them: each rank alone, and all together, of which the kit does one. No
engine, no GPU; what is measured is the loader, in turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import hardware
from benchmarks.suite import floors, storage
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import files, names
from resume_kit.checkpoint.carrying import ReadAccount
from resume_kit.checkpoint.filesystems import in_memory
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.node import Meeting, Node
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.planning.reads import StoredPieces
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.reading import read_into
from resume_kit.resuming.wanted import Want

_SHAPE = 1024, 4096  # fp32: 16 MiB a tensor, 8 KiB a run for two ranks
_WITHIN, _TIMEOUT = 20.0, 120.0
_ALONE, _TOGETHER = "column slices, alone", "column slices, together"


@dataclass(frozen=True)
class _Job:
    folder: Path
    specs: list[TensorSpec]
    indices: list[RankIndex]
    ranks: int
    repeats: int
    barrier: Any
    names: Any
    results: Any


def _slice(spec: TensorSpec, ranks: int, rank: int, axis: int) -> Box:
    lo, hi = [0, 0], list(spec.shape)
    lo[axis], hi[axis] = (spec.shape[axis] * n // ranks for n in (rank, rank + 1))
    return Box(tuple(lo), tuple(hi))


def _save(folder: Path, specs: list[TensorSpec], ranks: int) -> list[RankIndex]:
    found, random = [], np.random.default_rng(0)
    for rank in range(ranks):
        layout = plan_file([(spec, _slice(spec, ranks, rank, 0)) for spec in specs], {})
        image = random.integers(0, 256, layout.size, np.uint8)
        image[: len(layout.header)] = np.frombuffer(layout.header, np.uint8)
        digest = files.write_image(folder / names.data_file(rank), image.data)
        pieces = tuple(StoredPiece(s.spec, s.box, "0" * 16, s.offset, s.nbytes) for s in layout.slots)
        found.append(RankIndex("run", 1, 1, rank, ranks, digest, pieces, {}, {}))
    return found


def _measure(job: _Job, rank: int) -> None:
    torch.set_num_threads(1)
    ways: dict[str, Callable[[], ReadAccount | None]] = {
        "plain": _reading(job, rank, 0, False),
        _ALONE: _reading(job, rank, 1, False),
        _TOGETHER: _reading(job, rank, 1, True),
    }
    file = job.folder / names.data_file(rank)
    for way in floors.WAYS:
        if way.direct or not in_memory(job.folder):
            ways[f"raw read, {way}"] = lambda way=way: floors.read(file, way) and None
    samples: dict[str, list[float]] = {name: [] for name in ways}
    accounts: dict[str, list[int]] = {}
    for repeat in range(job.repeats + 1):
        for name, read in ways.items():
            if rank == 0:
                storage.drop_cached(job.folder)
            job.barrier.wait()
            start = time.perf_counter()
            account = read()
            job.barrier.wait()
            if repeat:
                samples[name].append(time.perf_counter() - start)
            if account is not None:
                accounts[name] = [account.wanted_bytes, account.read_bytes, account.verified_bytes]
    job.results.put((rank, samples, accounts))


def _reading(job: _Job, rank: int, axis: int, together: bool) -> Callable[[], ReadAccount]:
    stored = StoredPieces(job.indices)
    wants = [Want(spec, _slice(spec, job.ranks, rank, axis)) for spec in job.specs]
    parts = tuple((want, tuple(stored.parts(want.spec.key, want.box))) for want in wants)
    order = ReadOrder(parts, {index.rank: index for index in job.indices})
    places = {(want.spec.key, want.box): [torch.ones(want.box.numel)] for want in wants}

    def read() -> ReadAccount:
        with _node(job, rank) if together else nullcontext() as node:
            return read_into(job.folder, order, places, node=node)

    return read


@contextmanager
def _node(job: _Job, rank: int) -> Iterator[Node]:
    """The ranks' node, which ends once all have read."""
    with Meeting() as meeting:
        job.names[rank] = meeting.name
        job.barrier.wait()
        others = {other: name for other, name in dict(job.names).items() if other != rank}
        with meeting.connect(rank, others, within=_WITHIN, timeout=_TIMEOUT) as node:
            yield node
            job.barrier.wait()


def measure(work: Path, megabytes: int, ranks: int, repeats: int) -> dict[str, Any]:
    """Seconds until all ranks have read, by way: all samples after the first; each rank's bytes (wanted, read,
    checked); and the way that the kit takes in `work` (`kit`). `megabytes` are those of all ranks."""
    folder = work / "reading-together"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    count = max(1, megabytes // (16 * len(kinds)))
    specs = [TensorSpec(TensorKey(kind, f"w{n}"), "float32", _SHAPE) for n in range(count) for kind in kinds]
    try:
        indices = _save(folder, specs, ranks)
        context = multiprocessing.get_context("fork")
        with context.Manager() as manager:
            barrier, results = context.Barrier(ranks), context.Queue()
            job = _Job(folder, specs, indices, ranks, repeats, barrier, manager.dict(), results)
            processes = [context.Process(target=_measure, args=(job, rank)) for rank in range(ranks)]
            for process in processes:
                process.start()
            of_ranks = sorted(results.get() for _ in processes)
            for process in processes:
                process.join()
    finally:
        shutil.rmtree(folder)
    samples = {
        name: [max(pair) for pair in zip(*(r[1][name] for r in of_ranks), strict=True)] for name in of_ranks[0][1]
    }
    found = {name: [r[2][name] for r in of_ranks] for name in of_ranks[0][2]}
    return {"seconds": samples, "bytes": found, "kit": _ALONE if in_memory(work) else _TOGETHER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, nargs="+", help="folders on the file systems to measure")
    parser.add_argument("--megabytes", type=int, default=960, help="of all ranks (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="after a first one, which does not count")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for work in arguments.work:
        kind = storage.file_system(work)
        found[kind] = measure(work, arguments.megabytes, arguments.ranks, arguments.repeats)
        plain = statistics.median(found[kind]["seconds"]["plain"])
        for name, seconds in found[kind]["seconds"].items():
            middle = statistics.median(seconds)
            spread = f"{middle:.3f} s ({min(seconds):.3f}–{max(seconds):.3f})"
            wanted, read, checked = (sum(n) for n in zip(*found[kind]["bytes"].get(name, [[0, 0, 0]]), strict=True))
            of = f", read {read / wanted:.2f} of wanted, {checked / read:.0%} of it checked" if wanted else ""
            taken = "; as the kit reads" if name == found[kind]["kit"] else ""
            print(f"{kind}, {name}: {spread}, {middle / plain:.2f} of plain{of}{taken}", flush=True)
    if arguments.out:
        sizes = {"megabytes": arguments.megabytes, "ranks": arguments.ranks}
        facts = {"date": time.strftime("%Y-%m-%d"), **hardware(), **sizes, "file systems": found}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
