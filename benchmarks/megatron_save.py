"""A Megatron save of resume_kit beside megatron-core's own formats: the same state, in turns, in one process group.

    torchrun --nproc-per-node 2 -m benchmarks.megatron_save --config configs/megatron_1b.yaml --work /scratch \
        --set parallel.tensor=2 --repeats 5 --out benchmarks/results/NAME.json

What is timed is the blocking call, from a barrier to a barrier: for resume_kit `kit.save()`, with the comparison of
copies, the gate, fingerprints, digests, fsync and commit in it; for megatron-core building the sharded state dict and
`dist_checkpointing.save`, followed by an fsync of its files, which it does not do itself. `dp_reshardable` is its plain
format, `fully_reshardable` the one that can change tensor and pipeline parallelism. First saves are kept apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.resume_run import hardware
from launch.config import load_as
from launch.megatron_config import MegatronConfig
from launch.megatron_training import Training, build
from launch.train_megatron import prepare_environment
from resume_kit import Policy, ResumeKit, Retention
from resume_kit.engines.megatron import MegatronEngine
from resume_kit.environment import software_versions

FORMATS = ("dp_reshardable", "fully_reshardable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--work", required=True, type=Path, help="a folder on the file system to write to")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    run = options.work / "megatron-save"
    config = load_as(MegatronConfig, options.config, [*options.set, f"run.dir={run / 'kit'}"])
    prepare_environment(config)
    training = build(config)
    if dist.get_rank() == 0:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
    dist.barrier()
    engine = MegatronEngine(training.chunks, training.optimizer, training.scheduler)
    kit = ResumeKit(
        engine, training.loader, Policy(), run_dir=run / "kit", retention=Retention(keep_last=2), show=lambda _: None
    )
    kit.resume()
    batches = iter(training.loader)
    for _ in range(2):
        result = training.step(batches)
        engine.stepped(result.successful, result.grad_norm)
        kit.step(result.loss)

    savers: dict[str, Callable[[], None]] = {"resume_kit": lambda: _ours(kit, phases)}
    for name in filter(None, options.formats.split(",")):
        savers[f"megatron-core {name}"] = lambda name=name: _theirs(training, name, run / name)  # type: ignore[misc]
    phases: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in savers}
    for _ in range(options.repeats + 1):
        for name, save in savers.items():
            seconds[name].append(_timed(save))
    share = _size(run / "kit") // dist.get_world_size()
    raw = [_timed(lambda: _raw(run, share)) for _ in range(3)]
    if dist.get_rank() == 0:
        sizes = {"resume_kit": _size(next((run / "kit").glob("step-*")))}
        sizes |= {f"megatron-core {name}": _size(run / name) for name in options.formats.split(",") if name}
        _write(options, training, seconds, phases, raw, sizes)
        shutil.rmtree(run, ignore_errors=True)
    training.loader.close()
    dist.barrier()
    dist.destroy_process_group()


def _timed(work: Callable[[], None]) -> float:
    """Seconds from a barrier to a barrier, the same on every rank but for noise."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def _ours(kit: ResumeKit, phases: list[dict[str, float]]) -> None:
    phases.append(dict(kit.save().seconds))


def _theirs(training: Training, name: str, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    metadata = {"distrib_optim_sharding_type": name, "distrib_optim_fully_reshardable_mem_efficient": False}
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()
    state: dict[str, Any] = {}
    for number, chunk in enumerate(training.chunks):
        inner = chunk.module
        inner = inner.module if hasattr(inner, "module") else inner
        key = "model" if len(training.chunks) == 1 else f"model{number}"
        state[key] = inner.sharded_state_dict(metadata=metadata)
    model = state["model"] if len(training.chunks) == 1 else state
    state["optimizer"] = training.optimizer.sharded_state_dict(model, metadata=metadata)
    dist_checkpointing.save(state, str(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _raw(folder: Path, nbytes: int) -> None:
    """The floor: each rank writes its share from memory with four threads, and fsyncs."""
    mine = folder / f"raw-{dist.get_rank()}"
    descriptor = os.open(mine, os.O_CREAT | os.O_WRONLY, 0o644)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: os.pwrite(descriptor, _BLOCK, at), range(0, nbytes, len(_BLOCK))))
    os.fsync(descriptor)
    os.close(descriptor)
    mine.unlink()


_BLOCK = os.urandom(1 << 20) * 16


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _write(
    options: argparse.Namespace,
    training: Training,
    seconds: dict[str, list[float]],
    phases: list[dict[str, float]],
    raw: list[float],
    sizes: dict[str, int],
) -> None:
    plain = seconds.get("megatron-core dp_reshardable")
    document = {
        "what": "seconds of a blocking save, in turns in one run; first saves apart",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": software_versions(),
        "config": str(options.config),
        "settings": options.set,
        "topology": training.describe(),
        "file system": str(options.work),
        "ranks": dist.get_world_size(),
        "bytes": sizes,
        "first": {name: values[0] for name, values in seconds.items()},
        "seconds": {name: _spread(values[1:]) for name, values in seconds.items()},
        "all seconds": seconds,
        "phases of resume_kit on rank 0, last save": phases[-1],
        "raw write and fsync of the same bytes": _spread(raw),
    }
    if plain:
        ours, theirs = statistics.median(seconds["resume_kit"][1:]), statistics.median(plain[1:])
        document["resume_kit ÷ megatron-core dp_reshardable"] = ours / theirs
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in ("first", "seconds", "bytes") if key in document}, indent=1))


if __name__ == "__main__":
    main()
