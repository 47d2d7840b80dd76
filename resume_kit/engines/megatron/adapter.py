"""The kit's view of a Megatron-core engine: tensor, pipeline, expert and data parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines import rng
from resume_kit.engines.adapter import Forward, GateResult, LivePiece, ModelDescription, Replica
from resume_kit.engines.megatron import gate
from resume_kit.engines.megatron.engine import MegatronEngine
from resume_kit.engines.megatron.forward import gpt_loss
from resume_kit.engines.megatron.geometry import geometry
from resume_kit.engines.megatron.grid import Grid
from resume_kit.engines.megatron.groups import LogicalGroups
from resume_kit.engines.megatron.logical import keep_float_biases, local_buffers, local_weights, unwrapped
from resume_kit.engines.megatron.ownership import Ownership, masters_of, single_optimizers
from resume_kit.engines.megatron.support import (
    model_config,
    require_supported,
    schedule_config,
    schedule_state,
    split_config,
)
from resume_kit.engines.pieces import dtype_name, hook_updates, make_room, split_state, weight_spec
from resume_kit.engines.schedules import position_problems, require_position, samples_of_a_step
from resume_kit.errors import Problem


class MegatronAdapter:
    """Implements `EngineAdapter` for a `MegatronEngine`."""

    def __init__(self, engine: MegatronEngine) -> None:
        self._grid = Grid.of_megatron()
        require_supported(engine, self._grid)
        self._engine = engine
        self._model = unwrapped(engine.model_chunks[0])
        self._ddp = engine.model_chunks[0].ddp_config
        keep_float_biases(engine.model_chunks)
        self._weights = local_weights(engine.model_chunks, self._grid)
        self._masters = masters_of(engine.optimizer)
        self._ownership = Ownership(self._grid, distributed=self._ddp.use_distributed_optimizer)
        self._groups = LogicalGroups(engine.optimizer, self._weights, engine.scheduler)

    @property
    def topology(self) -> dict[str, Any]:
        grid = self._grid
        return {
            "engine": "megatron",
            "world_size": grid.world,
            "tensor_parallel": grid.tensor,
            "pipeline_parallel": grid.pipeline,
            "virtual_pipeline": grid.virtual,
            "expert_parallel": grid.expert,
            "expert_tensor_parallel": grid.expert_tensor,
            "data_parallel": grid.data,
            "sequence_parallel": bool(self._model.config.sequence_parallel),
            "distributed_optimizer": bool(self._ddp.use_distributed_optimizer),
        }

    @property
    def device(self) -> torch.device:
        return self._weights[0].weight.device

    @property
    def step(self) -> int:
        return self._engine.steps

    @property
    def updates(self) -> int:
        return self._engine.steps - self._engine.skipped

    @property
    def at_step_boundary(self) -> bool:
        return True

    @property
    def reports_loss(self) -> bool:
        return self._grid.last_stage and self._grid.tensor_rank == 0

    @property
    def learning_rate(self) -> float:
        return self._groups.learning_rate

    @property
    def grad_norm(self) -> float | None:
        return self._engine.grad_norm

    @property
    def default_forward(self) -> Forward:
        return gpt_loss

    def describe(self) -> ModelDescription:
        trainable = {part.name for w in self._weights if w.weight.requires_grad for part in w.parts}
        model, spreading = model_config(self._model)
        gradients, gradient_spreading = split_config(self._ddp)
        single = single_optimizers(self._engine.optimizer)
        optimizer, optimizer_spreading = split_config(self._engine.optimizer.config)
        scheduler = self._engine.scheduler
        tied = bool(self._model.share_embeddings_and_output_weights)
        return ModelDescription(
            weights=tuple(
                dict.fromkeys(weight_spec(p.name, w.weight.dtype, p.shape) for w in self._weights for p in w.parts)
            ),
            trainable=frozenset(trainable),
            master_dtypes=dict.fromkeys(sorted(trainable), "float32"),
            buffers=tuple(
                TensorSpec(TensorKey("buffer", name), dtype_name(data.dtype), tuple(data.shape))
                for name, data in local_buffers(self._engine.model_chunks)
            ),
            aliases={"output_layer.weight": "embedding.word_embeddings.weight"} if tied else {},
            groups=self._groups.describe(),
            pinned={
                "model": model,
                "gradients": gradients,
                "geometry": geometry(self._model, self._weights),
                "optimizer": type(single[0].optimizer).__name__ if single else None,
                "optimizer config": optimizer,
                "scheduler": None if scheduler is None else type(scheduler).__name__,
                "schedule": schedule_config(scheduler),
                "parallel": {**spreading, **optimizer_spreading, **gradient_spreading},
            },
            partial=True,
        )

    def settle(self) -> None:
        """A gather that overlaps the next forward is finished; any other was done with the update."""
        if self._ddp.overlap_param_gather:
            self._gather()

    def _gather(self) -> None:
        for chunk in self._engine.model_chunks:
            chunk.start_param_sync(force_sync=True)

    def pieces(self) -> list[LivePiece]:
        pieces: list[LivePiece] = []
        for weight in self._weights:
            pieces += self._ownership.pieces(weight, self._masters.get(id(weight.weight)))
        pieces += [self._ownership.buffer(name, data) for name, data in local_buffers(self._engine.model_chunks)]
        return pieces

    def replicas(self) -> list[Replica]:
        """None: what ranks hold alike, they hold by stage and slice, as copies of pieces."""
        return []

    def scalars(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for weight in self._weights:
            master = self._masters.get(id(weight.weight))
            if master is not None:
                for part in weight.parts:
                    found[part.name] = split_state(master.tensor, master.state, part.name)[1]
        return found

    def state(self) -> dict[str, Any]:
        scheduler = self._engine.scheduler
        return {
            "groups": self._groups.values(),
            "counters": {"steps": self._engine.steps, "skipped_steps": self._engine.skipped},
            "scheduler": None
            if scheduler is None
            else {"class": type(scheduler).__name__, "state": schedule_state(scheduler)},
            "scaler": self._scaler(),
        }

    def prepare_load(self, kinds: Mapping[str, Mapping[str, str]], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        for weight in self._weights:
            master = self._masters.get(id(weight.weight))
            if master is not None:
                name = weight.parts[0].name
                make_room(master.state, master.tensor, kinds.get(name, {}), scalars.get(name, {}))

    def publish(self) -> None:
        self.settle()  # finishes what is pending; the gather after it takes what was just written
        for weight in self._weights:
            self._ownership.gather(weight, self._masters.get(id(weight.weight)))
        if self._ddp.use_distributed_optimizer and max(self._grid.data, self._grid.expert_data) > 1:
            self._gather()

    def schedule_problems(self, saved: Mapping[str, Any], offset: int, samples_per_step: int) -> list[Problem]:
        schedule, position = saved.get("scheduler"), None
        if schedule:
            position = int(schedule["state"]["num_steps"]) // samples_of_a_step(saved, samples_per_step)
        live = self._engine.scheduler is not None
        return position_problems(live=live, saved=schedule, position=position, offset=offset)

    def advance_schedule(self, saved: Mapping[str, Any], offset: int, samples_per_step: int) -> None:
        require_position(self.schedule_problems(saved, offset, samples_per_step))
        scheduler = self._engine.scheduler
        if scheduler is not None:
            counted = int(saved["scheduler"]["state"]["num_steps"])
            scheduler.num_steps = counted + offset * samples_of_a_step(saved, samples_per_step)
            scheduler.step(increment=0)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._engine.steps = state["counters"]["steps"]
        self._engine.skipped = state["counters"]["skipped_steps"]
        if self._engine.scheduler is not None:
            for name, value in state["scheduler"]["state"].items():
                setattr(self._engine.scheduler, name, value)
        self._groups.load(state["groups"])
        for one in single_optimizers(self._engine.optimizer):
            if state["scaler"] and one.grad_scaler is not None:
                for name, value in state["scaler"].items():
                    live = getattr(one.grad_scaler, name)
                    live.fill_(value) if isinstance(live, torch.Tensor) else setattr(one.grad_scaler, name, value)

    def rng_trackers(self) -> dict[str, rng.Tracker]:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        tracker = get_cuda_rng_tracker()

        def getter(name: str) -> Callable[[], bytes]:
            return lambda: tracker.states_[name].cpu().numpy().tobytes()

        def setter(name: str) -> Callable[[bytes], None]:
            return lambda data: tracker.states_.__setitem__(name, torch.frombuffer(bytearray(data), dtype=torch.uint8))

        return {name: (getter(name), setter(name)) for name in sorted(tracker.get_states())}

    def rng_stream(self, generator: str) -> str:
        return ", ".join(f"{axis} {coordinate}" for axis, coordinate in self._grid.stream(generator).items())

    def rank_of_stream(self, generator: str, topology: Mapping[str, Any]) -> int | None:
        return self._grid.rank_of_stream(generator, topology)

    def before_update(self, hook: Callable[[list[dict[str, Any]]], Callable[[], None]]) -> None:
        hook_updates([one.optimizer for one in single_optimizers(self._engine.optimizer)], hook)

    def run_gate(self, forward: Forward, batch: Any) -> GateResult:
        self.settle()
        return gate.forward_backward(self._engine, self._weights, self._grid, forward, batch, self.rng_trackers())

    def _scaler(self) -> dict[str, Any] | None:
        single = single_optimizers(self._engine.optimizer)
        scaler = getattr(single[0], "grad_scaler", None) if single else None
        if scaler is None or not scaler.state_dict():
            return None
        return {
            name: value.item() if isinstance(value, torch.Tensor) else value
            for name, value in vars(scaler).items()
            if name in ("_scale", "_growth_tracker", "_hysteresis_tracker")
        }
