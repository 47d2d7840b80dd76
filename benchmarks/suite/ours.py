"""The kit as a measured system: one kit, saving in its three ways, loading with proof."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.suite.results import Group
from benchmarks.suite.storage import size_of
from benchmarks.suite.workloads import Batches, Workload
from resume_kit import Policy, ResumeKit, Retention, Saving
from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.saving.options import Returns

WAYS: tuple[Returns, ...] = ("overlapped", "staged", "committed")

#: Stages of a resume that make up a load with proof.
_PROVED = ("preflight", "load", "prove")


#: The first save alone runs its gate, a forward and backward, which is measured by itself.
_GATE_EVERY = 1 << 30


class Trainer:
    """A workload under a kit: steps that the kit knows of, and the kit's saves and resumes."""

    def __init__(self, workload: Workload, run_dir: Path, **policy: Any) -> None:
        self.workload = workload
        self.kit = ResumeKit(
            workload.engine,
            workload.loader,
            Policy.from_mapping({"preset": "flexible", **policy}),
            run_dir=run_dir,
            saving=Saving(gate_every=_GATE_EVERY),
            retention=Retention(keep_last=2),
            config=workload.pinned(),
            show=lambda _: None,
        )
        self._batches: Batches = iter(())
        self.resume()

    def resume(self) -> Mapping[str, float]:
        """Resume the newest checkpoint, if there is one; seconds by stage on this rank."""
        self.kit.resume()
        self._batches = iter(self.workload.loader)
        assert self.kit.report is not None
        return dict(self.kit.report.seconds)

    def step(self) -> dict[str, Any]:
        """One optimizer step, told to the kit; its record."""
        record = self.kit.step(self.workload.step(self._batches))
        assert record is not None
        return record

    def close(self) -> None:
        self.kit.close()
        self.workload.loader.close()


class Ours:
    """A way of the kit to save. Only the last one loads too: what the ways leave behind is the same."""

    group: Group = "ours"
    note = ""
    fsyncs = True

    def __init__(self, trainer: Trainer, way: Returns) -> None:
        self.name = f"resume_kit, {way}"
        self.loads = way == WAYS[-1]
        self._trainer, self._way = trainer, way
        self._phases: Mapping[str, float] = {}

    def available(self) -> str | None:
        return None

    def save(self, step: int) -> None:
        commit = self._trainer.kit.save(returns=self._way)
        self._phases = commit.seconds if commit else {}

    def wait(self) -> None:
        if commit := self._trainer.kit.wait():
            self._phases = commit.seconds

    def folder(self) -> Path:
        run = self._trainer.kit.run_dir
        return run / names.step_directory(names.committed_steps(run)[-1])

    def load(self) -> Mapping[str, float]:
        """Stages of a resume: `load` reads and writes the live state; with proof it includes preflight and proof."""
        seconds = self._trainer.resume()
        proved = sum(seconds[stage] for stage in _PROVED)
        return {"load": seconds["load"], "load with proof": proved, **{f"resume: {k}": v for k, v in seconds.items()}}

    def nbytes(self) -> int:
        return size_of(self.folder())

    def parameters(self) -> int:
        """Elements of the weights in the newest save."""
        return sum(entry.spec.numel for entry in self.manifest().tensors if entry.spec.key.kind == "param")

    def manifest(self) -> Manifest:
        """That of the newest save."""
        return read_manifest(self.folder())

    def trim(self) -> None:
        """Delete all saves but the newest: at size, memory file systems hold few. On one rank."""
        run = self._trainer.kit.run_dir
        for step in names.committed_steps(run)[:-1]:
            shutil.rmtree(run / names.step_directory(step))

    def details(self) -> Mapping[str, float]:
        """This rank's seconds of each phase; rank 0's names, for the ranks may know of different ones."""
        known: list[Any] = [sorted(self._phases)]
        dist.broadcast_object_list(known, src=0)
        return {f"save: {name}": float(self._phases.get(name, 0.0)) for name in known[0]}

    def close(self) -> None: ...


def topology_text(engine: Mapping[str, Any]) -> str:
    """`ZeRO-3 on 8` or `TP2 PP2 DP2`, from a manifest's account of the engine."""
    if "zero_stage" in engine:
        return f"ZeRO-{engine['zero_stage']} on {engine['world_size']}"
    sizes = {"TP": "tensor_parallel", "PP": "pipeline_parallel", "DP": "data_parallel", "EP": "expert_parallel"}
    shown = [f"{short}{engine[name]}" for short, name in sizes.items() if engine.get(name, 1) > 1]
    return " ".join(shown) or "one rank"
