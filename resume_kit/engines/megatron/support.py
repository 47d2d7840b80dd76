"""Which Megatron engines the adapter can save whole, and which part of their configuration shapes training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.engines.megatron.engine import MegatronEngine
from resume_kit.engines.megatron.grid import Grid
from resume_kit.engines.megatron.logical import unwrapped
from resume_kit.engines.megatron.ownership import single_optimizers
from resume_kit.errors import Problem, UsageError

#: Fields of a configuration that say how work is spread, overlapped, recomputed or drawn, not what is trained.
_SPREADING = re.compile(
    r".*_func|.*(parallel|pipeline|overlap|p2p|microbatch|recompute|offload|graph|dispatcher|communication|timer|tp_comm"
    r"|distribut|gloo|nccl|init_method|initialization|gradient_accumulation_fusion|deallocate|barrier|log_|_log|print"
    r"|stage|bucket|gather|fsdp|hierarch|config_logger|hybrid|inference|flash_decode|batch_invariant).*"
)

_PLAIN = (bool, int, float, str, type(None))

_REFUSED_MODEL = (
    ("fp8", "fp8 weights"),
    ("fp4", "fp4 weights"),
    ("mtp_num_layers", "multi-token prediction layers"),
    ("moe_grouped_gemm", "grouped experts (moe_grouped_gemm)"),
    ("heterogeneous_block_specs", "heterogeneous layers"),
)


def require_supported(engine: MegatronEngine, grid: Grid) -> None:
    """Raise `UsageError` listing every feature whose state would be lost or misread."""
    from megatron.core import parallel_state

    problems = []

    def refuse(what: str, remedy: str) -> None:
        problems.append(Problem("engine", "Megatron", what, remedy))

    if not grid.follows_default_order:
        refuse("ranks in another order than tp-cp-ep-dp-pp", "initialise model parallelism with the default order")
    if parallel_state.get_context_parallel_world_size() > 1:
        refuse("context parallelism", "set context_parallel_size to 1")
    for chunk in engine.model_chunks:
        if not hasattr(chunk, "ddp_config") or not hasattr(chunk, "buffers"):
            refuse(f"a {type(chunk).__name__} as model chunk", "wrap each chunk in DistributedDataParallel")
            continue
        if chunk.ddp_config.use_megatron_fsdp:
            refuse("Megatron's FSDP", "use DistributedDataParallel")
        if chunk.ddp_config.num_distributed_optimizer_instances > 1:
            refuse("several distributed optimizer instances", "set num_distributed_optimizer_instances to 1")
    config = unwrapped(engine.model_chunks[0]).config
    for name, what in _REFUSED_MODEL:
        if getattr(config, name, None):
            refuse(what, f"leave {name} off")
    for one in single_optimizers(engine.optimizer):
        settings = getattr(one, "config", None)
        if getattr(settings, "use_precision_aware_optimizer", False):
            refuse("the precision-aware optimizer", "set use_precision_aware_optimizer to false")
        if getattr(settings, "optimizer_cpu_offload", False):
            refuse("optimizer offload to the CPU", "set optimizer_cpu_offload to false")
        if getattr(settings, "fp16", False) and len(single_optimizers(engine.optimizer)) > 1:
            refuse("fp16 with expert parallelism: two loss scalers", "train in bf16")
    if problems:
        raise UsageError("this Megatron engine cannot be saved whole", list(dict.fromkeys(problems)))


#: Attributes of a GPTModel that its TransformerConfig does not tell.
_OF_MODEL = (
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "rotary_scaling",
    "fp16_lm_cross_entropy",
    "max_sequence_length",
)


def model_config(gpt: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what shapes the model, how work is spread) of a GPTModel, plain values only."""
    config = gpt.config
    model, spreading = split_config(config)
    model |= {name: getattr(gpt, name) for name in _OF_MODEL if isinstance(getattr(gpt, name, None), _PLAIN)}
    frequencies = getattr(getattr(gpt, "rotary_pos_emb", None), "inv_freq", None)
    if frequencies is not None:
        model["rotary frequencies"] = canonical.digest(frequencies.detach().float().cpu().numpy().tobytes())
    if config.activation_func is not None:
        model["activation_func"] = getattr(config.activation_func, "__name__", str(config.activation_func))
    return model, spreading


def split_config(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what shapes training, how work is spread) of a configuration dataclass, plain values only."""
    shaping: dict[str, Any] = {}
    spreading: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Enum):
            shaping[field.name] = value.name
        elif isinstance(value, _PLAIN):
            (spreading if _SPREADING.fullmatch(field.name) else shaping)[field.name] = value
        elif isinstance(value, list | tuple) and all(isinstance(v, bool | int | float | str) for v in value):
            (spreading if _SPREADING.fullmatch(field.name) else shaping)[field.name] = list(value)
        elif str(value).startswith("torch.") and "dtype" in field.name:
            shaping[field.name] = str(value)
    return shaping, spreading


#: What an OptimizerParamScheduler computes the LR from, and leaves out of its state_dict().
_UNSAVED = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")


def schedule_state(scheduler: Any) -> dict[str, Any]:
    """All that an OptimizerParamScheduler computes with, its position too."""
    return {**scheduler.state_dict(), **{name: getattr(scheduler, name) for name in _UNSAVED}}


def schedule_config(scheduler: Any) -> Mapping[str, Any] | None:
    """The parameters of an OptimizerParamScheduler, without its position and those that it does not look at."""
    if scheduler is None:
        return None
    left_out = {"num_steps"}
    if scheduler.start_wd == scheduler.end_wd:
        left_out |= {"wd_incr_steps", "wd_incr_style"}
    if scheduler.lr_decay_style != "WSD":
        left_out |= {"wsd_decay_steps", "lr_wsd_decay_style"}
    return {key: value for key, value in schedule_state(scheduler).items() if key not in left_out}
