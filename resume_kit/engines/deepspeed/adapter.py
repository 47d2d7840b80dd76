"""The kit's view of a DeepSpeed engine, ZeRO stages 1, 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines import rng
from resume_kit.engines.adapter import Forward, GateResult, LivePiece, ModelDescription, Replica
from resume_kit.engines.deepspeed import gate
from resume_kit.engines.deepspeed.fragments import Partitioning
from resume_kit.engines.deepspeed.structure import structure
from resume_kit.engines.deepspeed.support import require_supported, training_config
from resume_kit.engines.deepspeed.zero3 import Zero3Partitioning
from resume_kit.engines.deepspeed.zero12 import Zero12Partitioning
from resume_kit.engines.forward import causal_lm_loss
from resume_kit.engines.pieces import (
    dtype_name,
    flat_pieces,
    hook_updates,
    hyperparameters,
    make_room,
    set_hyperparameters,
    split_state,
    weight_spec,
)
from resume_kit.engines.schedules import (
    advance_torch_schedule,
    first_rates,
    torch_schedule_problems,
    torch_schedule_settings,
)
from resume_kit.errors import Problem

#: `micro_steps` is not among them: between steps it is a multiple of the accumulation, which may change.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class DeepSpeedAdapter:
    """Implements `EngineAdapter` for the engine that `deepspeed.initialize` returned."""

    def __init__(self, engine: Any) -> None:
        require_supported(engine)
        self._engine = engine
        self._module: torch.nn.Module = engine.module
        self._names = {id(p): _plain(name) for name, p in self._module.named_parameters()}
        self._stage: int = engine.zero_optimization_stage()
        layout: type[Zero3Partitioning | Zero12Partitioning] = (
            Zero3Partitioning if self._stage == 3 else Zero12Partitioning
        )
        self._layout: Partitioning = layout(engine.optimizer, self._names, self._module)

    @property
    def topology(self) -> dict[str, Any]:
        return {
            "engine": "deepspeed",
            "zero_stage": self._stage,
            "world_size": torch.distributed.get_world_size(),
        }

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def step(self) -> int:
        return int(self._engine.global_steps)

    @property
    def updates(self) -> int:
        return int(self._engine.global_steps - self._engine.skipped_steps)

    @property
    def at_step_boundary(self) -> bool:
        return bool(self._engine.micro_steps % self._engine.gradient_accumulation_steps() == 0)

    @property
    def reports_loss(self) -> bool:
        return True

    @property
    def default_forward(self) -> Forward:
        return causal_lm_loss

    @property
    def learning_rate(self) -> float:
        return float(self._layout.base.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def describe(self) -> ModelDescription:
        members = self._layout.members()
        flats = self._layout.flats()
        masters = {
            name: dtype_name(next(flat.dtype for group, flat in flats if group == index))
            for index, names in enumerate(members)
            for name in names
        }
        module_config: Any = getattr(self._module, "config", None)
        model = module_config.to_dict() if hasattr(module_config, "to_dict") else {}
        groups = [hyperparameters(group) for group in self._layout.base.param_groups]
        rates = first_rates(self._engine.lr_scheduler, [group["lr"] for group in groups])
        schedule = torch_schedule_settings(self._engine.lr_scheduler)
        return ModelDescription(
            weights=tuple(self._weight_specs()),
            trainable=frozenset(masters),
            master_dtypes=masters,
            buffers=tuple(replica.spec for replica in self._buffers()),
            aliases=self._aliases(),
            groups=tuple(
                {"members": names, **group, "lr": rate}
                for names, group, rate in zip(members, groups, rates, strict=True)
            ),
            pinned={
                "model": {k: v for k, v in model.items() if k not in ("transformers_version", "_name_or_path")},
                "module structure": canonical.digest(structure(self._module).encode()),
                "optimizer": type(self._layout.base).__name__,
                "scheduler": None if self._engine.lr_scheduler is None else type(self._engine.lr_scheduler).__name__,
                **({"schedule": schedule} if schedule else {}),
                "deepspeed": training_config(self._engine),
            },
        )

    def settle(self) -> None:
        """Nothing is pending between two steps."""

    def pieces(self) -> list[LivePiece]:
        pieces: list[LivePiece] = []
        for fragment in self._layout.fragments():
            master_spec = TensorSpec(
                TensorKey("master", fragment.name), dtype_name(fragment.flat.dtype), fragment.shape
            )
            master = fragment.flat.detach().narrow(0, fragment.flat_start, fragment.numel)
            masters = {piece.box: piece for piece in flat_pieces(master_spec, fragment.start, master)}
            pieces += masters.values()
            low = weight_spec(fragment.name, fragment.low_precision.dtype, fragment.shape)
            pieces += flat_pieces(low, fragment.start, fragment.low_precision, masters)
            tensors, _ = self._optimizer_state(fragment.flat, fragment.name)
            for kind, tensor in tensors.items():
                spec = TensorSpec(TensorKey(kind, fragment.name), dtype_name(tensor.dtype), fragment.shape)
                pieces += flat_pieces(spec, fragment.start, tensor.narrow(0, fragment.flat_start, fragment.numel))
        return pieces + self._layout.frozen()[0]

    def replicas(self) -> list[Replica]:
        return self._layout.frozen()[1] + list(self._buffers()) + self._layout.copies()

    def scalars(self) -> dict[str, dict[str, Any]]:
        return {f.name: self._optimizer_state(f.flat, f.name)[1] for f in self._layout.fragments()}

    def state(self) -> dict[str, Any]:
        scheduler = self._engine.lr_scheduler
        return {
            "groups": [hyperparameters(group) for group in self._layout.base.param_groups],
            "counters": {name: int(getattr(self._engine, name)) for name in _COUNTERS},
            "scheduler": None
            if scheduler is None
            else {"class": type(scheduler).__name__, "state": scheduler.state_dict()},
            "scaler": self._scaler(),
        }

    def prepare_load(self, kinds: Mapping[str, Mapping[str, str]], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        members = self._layout.members()
        inside: dict[int, list[str]] = {}
        for fragment in self._layout.fragments():
            inside.setdefault(id(fragment.flat), []).append(fragment.name)
        for group, flat in self._layout.flats():
            name = inside.get(id(flat), members[group])[0]
            make_room(self._layout.base.state[flat], flat, kinds.get(name, {}), scalars.get(name, {}))

    def publish(self) -> None:
        self._layout.publish()

    def schedule_problems(self, saved: Mapping[str, Any], offset: int, samples_per_step: int) -> list[Problem]:
        return torch_schedule_problems(self._engine.lr_scheduler, saved["scheduler"], offset)

    def advance_schedule(self, saved: Mapping[str, Any], offset: int, samples_per_step: int) -> None:
        advance_torch_schedule(self._engine.lr_scheduler, saved["scheduler"], offset)

    def load_state(self, state: Mapping[str, Any]) -> None:
        for group, saved in zip(self._layout.base.param_groups, state["groups"], strict=True):
            set_hyperparameters(group, saved)
        for name, value in state["counters"].items():
            setattr(self._engine, name, value)
        self._engine.micro_steps = self._engine.global_steps * self._engine.gradient_accumulation_steps()
        if self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(state["scheduler"]["state"])
        for name, value in (state["scaler"] or {}).items():
            setattr(self._engine.optimizer.loss_scaler, name, value)

    def rng_trackers(self) -> dict[str, rng.Tracker]:
        from deepspeed.runtime.activation_checkpointing import checkpointing

        tracker = checkpointing.get_cuda_rng_tracker()

        def getter(name: str) -> Callable[[], bytes]:
            return lambda: tracker.states_[name].cpu().numpy().tobytes()

        def setter(name: str) -> Callable[[bytes], None]:
            return lambda data: tracker.states_.__setitem__(name, torch.frombuffer(bytearray(data), dtype=torch.uint8))

        return {name: (getter(name), setter(name)) for name in sorted(tracker.get_states())}

    def rng_stream(self, generator: str) -> str:
        return f"rank {torch.distributed.get_rank()}"

    def rank_of_stream(self, generator: str, topology: Mapping[str, Any]) -> int | None:
        rank = torch.distributed.get_rank()
        return rank if rank < topology["world_size"] else None

    def before_update(self, hook: Callable[[list[dict[str, Any]]], Callable[[], None]]) -> None:
        hook_updates([self._layout.base], hook)

    def run_gate(self, forward: Forward, batch: Any) -> GateResult:
        result = gate.forward_backward(self._module, forward, batch, self.rng_trackers())
        self._layout.settle()
        return result

    def _weight_specs(self) -> Iterator[TensorSpec]:
        for weight in self._module.parameters():
            shape = tuple(getattr(weight, "ds_shape", weight.shape))
            yield weight_spec(self._names[id(weight)], weight.dtype, shape)

    def _aliases(self) -> dict[str, str]:
        """Further names of tied weights → the name that the checkpoint uses."""
        every = self._module.named_parameters(remove_duplicate=False)
        return {_plain(name): self._names[id(p)] for name, p in every if _plain(name) != self._names[id(p)]}

    def _buffers(self) -> Iterator[Replica]:
        for name, buffer in self._module.named_buffers():
            spec = TensorSpec(TensorKey("buffer", _plain(name)), dtype_name(buffer.dtype), tuple(buffer.shape))
            yield Replica(spec, buffer, per_rank=True)

    def _optimizer_state(self, flat: torch.Tensor, owner: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return split_state(flat, self._layout.base.state.get(flat, {}), owner)

    def _scaler(self) -> dict[str, Any] | None:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is None or not hasattr(scaler, "__dict__"):
            return None
        return {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)}


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts in front."""
    return name.replace("_orig_mod.", "")
