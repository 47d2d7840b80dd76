"""Which DeepSpeed engines the adapter can save whole, and which part of their configuration shapes training."""

from __future__ import annotations

from typing import Any

from resume_kit.errors import Problem, UsageError

#: Top-level keys of a DeepSpeed configuration that change what is printed or measured, not what is trained.
_OBSERVING = frozenset(
    {
        "steps_per_print",
        "wall_clock_breakdown",
        "dump_state",
        "memory_breakdown",
        "tensorboard",
        "wandb",
        "comet",
        "csv_monitor",
        "flops_profiler",
        "comms_logger",
        "checkpoint",
        "nebula",
        "autotuning",
    }
)

#: Sections whose own state the adapter does not capture.
_STATEFUL = frozenset(
    {"curriculum_learning", "progressive_layer_drop", "data_efficiency", "compression_training", "eigenvalue"}
)


def training_config(engine: Any) -> dict[str, Any]:
    """The engine's configuration as given by the user, without the parts that only observe."""
    given = engine._config._param_dict
    return {key: value for key, value in given.items() if key not in _OBSERVING}


def require_supported(engine: Any) -> None:
    """Raise `UsageError` listing every feature whose state would be lost or misread."""
    problems = []

    def refuse(what: str, remedy: str) -> None:
        problems.append(Problem("engine", "DeepSpeed", what, remedy))

    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage not in (1, 2, 3):
        refuse(f"ZeRO stage {stage}", "set zero_optimization.stage to 1, 2 or 3")
    elif not hasattr(optimizer, "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"):
        refuse(
            f"its optimizer is {type(optimizer).__name__}, not a ZeRO optimizer",
            "give DeepSpeed an optimizer, and for bf16 with ZeRO-1 leave data_types.grad_accum_dtype unset",
        )
    if stage == 3 and (
        getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False)
    ):
        refuse("state offloaded to NVMe", "offload to cpu instead")
    offload = engine._config._param_dict.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("ratio", 1.0) < 1.0 or offload.get("super_offload"):
        refuse(
            "offload_optimizer with ratio below 1, or super_offload: part of its state would not be saved",
            "leave both out",
        )
    if type(getattr(optimizer, "optimizer", None)).__name__.startswith("Muon"):
        refuse("Muon: its momentum moves outside of the optimizer's own step", "use Adam, AdamW, SGD, Lion or Adagrad")
    if stage == 3 and engine.zero_hpz_partition_size() > 1:
        refuse("hierarchical partitioning (zero_hpz_partition_size > 1)", "set it to 1")
    if stage in (1, 2) and getattr(optimizer, "round_robin_gradients", False):
        refuse("round_robin_gradients: DeepSpeed's fragment mapping names the wrong weights", "switch it off")
    if engine._config._param_dict.get("zero_optimization", {}).get("zenflow"):
        refuse("zenflow: its state would not be saved", "switch it off")
    if engine.mp_world_size > 1 or getattr(engine, "pipeline_parallelism", False):
        refuse("model or pipeline parallelism", "use data parallel ranks only")
    if engine.has_moe_layers:
        refuse("mixture-of-experts layers", "use a dense model")
    if engine.training_dataloader is not None:
        refuse("a DeepSpeed data loader (training_data=): its state would not be saved", "use a ResumableLoader")
    for feature in sorted(_STATEFUL & engine._config._param_dict.keys()):
        section = engine._config._param_dict[feature]
        if isinstance(section, dict) and section.get("enabled", True):
            refuse(f"{feature}: its state would not be saved", "switch it off")
    if problems:
        raise UsageError("this DeepSpeed engine cannot be saved whole", problems)
