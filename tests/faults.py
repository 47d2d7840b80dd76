"""Faults done to a live run on purpose, each on one rank, to see that the check that exists for it fires."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from tests import save_faults


class Faults:
    """`names` of the form ``what`` (rank 1) or ``what@rank``. Engines are DeepSpeed's or a `MegatronEngine`."""

    def __init__(self, names: list[str], rank: int) -> None:
        self._mine = {name.split("@")[0] for name in names if int(name.partition("@")[2] or 1) == rank}
        self._all = {name.split("@")[0] for name in names}

    def before_kit(self, engine: Any, loader: Any) -> None:
        self.batches = iter(loader) if "iter-before-resume" in self._mine else None

    def before_resume(self, engine: Any, kit: Any) -> None:
        save_faults.apply(self._all, self._mine, engine)
        self._adapter = adapter = kit._adapter
        publish = adapter.publish

        def then(change: Any) -> None:
            def published() -> None:
                publish()
                change()

            adapter.publish = published

        if "flip-moment" in self._mine:
            then(lambda: _flip_bit(next(p.data for p in adapter.pieces() if p.spec.key.kind == "exp_avg")))
        if "flip-master" in self._mine:
            then(lambda: _flip_bit(next(p.data for p in adapter.pieces() if p.spec.key.kind == "master")))
        if "flip-weight" in self._mine:
            then(lambda: _flip_bit(next(p.data for p in adapter.pieces() if p.spec.key.kind == "param")))
        if "flip-copy" in self._mine:
            then(lambda: _flip_bit(next(_copies(adapter))))
        for name, kind in (("flip-copied-moment", "exp_avg"), ("flip-copied-master", "master")):
            if name in self._mine:
                then(lambda kind=kind: _flip_bit(next(_copies(adapter, kind))))
        if "lost-copy" in self._mine:
            every = adapter.pieces
            adapter.pieces = lambda: [p for p in every() if not (p.copy and "mlp.linear_fc1.w" in p.spec.key.name)]
        if "extra-generator" in self._mine:
            _change_generators(lambda states: states.update({"mine": torch.get_rng_state()}))
        if "lost-generator" in self._mine:
            _change_generators(lambda states: states.pop("data-parallel-rng"))
        if "kept-moments" in self._mine:
            then(lambda: _keep_moments(adapter))
        if "zero-moments" in self._mine:
            then(lambda: [p.data.zero_() for p in adapter.pieces() if p.spec.key.kind.startswith("exp_avg")])
        if "wrong-step" in self._mine:
            restore = adapter.load_state

            def lost(state: Any) -> None:
                restore(state)
                for values in _optimizer_states(adapter):
                    values["step"] = torch.tensor(1.0)

            adapter.load_state = lost
        if "other-forward" in self._all:
            inner = kit._forward
            kit._forward = lambda module, batch: inner(
                module, {**batch, "attention_mask": torch.tril(torch.ones_like(batch["input_ids"]))}
            )
        if "dead-seek" in self._all:
            kit._data.seek = lambda position: None
        if "overlap" in self._mine:
            pieces = adapter.pieces

            def greedy() -> list[Any]:
                from dataclasses import replace

                from resume_kit.algebra.boxes import Box
                from resume_kit.checkpoint.records import TensorKey, TensorSpec

                found = pieces()
                owned = {p.spec.key.name for p in found}
                other = next(w for w in adapter.describe().weights if w.key.name not in owned)
                spec = TensorSpec(TensorKey("master", other.key.name), "float32", other.shape)
                stolen = replace(found[0], spec=spec, box=Box.whole(spec.shape), data=torch.zeros(spec.numel))
                return [*found, stolen]

            adapter.pieces = greedy

    def after_resume(self, engine: Any) -> None:
        if "reseed-torch" in self._mine:
            torch.manual_seed(0)
        if "reseed-python" in self._mine:
            random.seed(0)
        if "flip-moment-later" in self._mine:
            _flip_sign(next(p.data for p in self._adapter.pieces() if p.spec.key.kind == "exp_avg"))

    def after_engine_step(self, engine: Any, kit: Any) -> None:
        if "extra-step-counter" in self._mine:
            counter = "steps" if _is_megatron(kit._adapter) else "global_steps"
            setattr(engine, counter, getattr(engine, counter) + 1)
        if "forgotten-step" in self._mine:
            engine.steps -= 1
        for name, kind in (("drift-weight", "param"), ("drift-moment", "exp_avg"), ("drift-master", "master")):
            if name in self._mine and kit.step_number == 3:
                _flip_bit(next(_copies(kit._adapter, kind)))
        if "zero-saved-moments" in self._all and kit.step_number == 3:
            for piece in kit._adapter.pieces():
                if piece.spec.key.kind == "exp_avg":
                    piece.data.zero_()
        if "nan-state" in self._all and kit.step_number == 3:
            for piece in kit._adapter.pieces():
                if piece.spec.key.kind in ("master", "param"):
                    piece.data[0] = float("nan")
            kit._adapter.publish()
        if "flip-saved-weight" in self._mine and kit.step_number == 3:
            _flip_bit(next(p.data for p in kit._adapter.pieces() if p.cast_of is not None))
        if "late-buffer" in self._all and kit.step_number == 3:
            engine.module.register_buffer("late", torch.ones(2))
        if "adam-step-astray" in self._mine and kit.step_number == 3:
            for values in _optimizer_states(kit._adapter):
                values["step"] += 1


def _is_megatron(adapter: Any) -> bool:
    return adapter.topology["engine"] == "megatron"


def _copies(adapter: Any, kind: str = "param") -> Iterator[torch.Tensor]:
    """Memory of this rank with copies of tensors, or of single elements of them, that other ranks own."""
    if kind == "param":
        yield from (replica.data.view(-1) for replica in adapter.replicas() if not replica.restored)
    pieces = adapter.pieces()
    owned = [(p.data.data_ptr(), p.data.data_ptr() + p.data.nbytes) for p in pieces if p.owned]
    for piece in pieces:
        if piece.copy and piece.spec.key.kind == kind:
            for element in (piece.data[:1], piece.data[-1:]):
                if not any(start <= element.data_ptr() < stop for start, stop in owned):
                    yield element


def _optimizer_states(adapter: Any) -> Iterator[dict[str, Any]]:
    """The optimizer's state of every tensor that this rank updates."""
    from resume_kit.engines.megatron.ownership import single_optimizers

    inner = single_optimizers(adapter._engine.optimizer) if _is_megatron(adapter) else [adapter._engine.optimizer]
    for one in inner:
        yield from one.optimizer.state.values()


def _change_generators(change: Any) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    change(states)
    tracker.set_states(states)


def _flip_bit(data: torch.Tensor) -> None:
    with torch.no_grad():
        data.view(torch.uint8)[data.numel() // 2] ^= 1


def _flip_sign(data: torch.Tensor) -> None:
    with torch.no_grad():
        data[data.numel() // 2].neg_()


def _keep_moments(adapter: Any) -> None:
    """Optimizer state that a reset has left behind (DeepSpeed)."""
    for _, flat in adapter._layout.flats():
        adapter._layout.base.state[flat] |= {"exp_avg": torch.ones_like(flat), "step": torch.tensor(4.0)}
