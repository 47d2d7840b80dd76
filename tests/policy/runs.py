"""Facts of two small runs, one of each engine, and a way to say what is different in another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.integrity.differences import ABSENT
from resume_kit.policy.judgement import RunFacts

WEIGHTS = {"wte.weight": (256, 16), "h.0.weight": (16, 16), "h.0.bias": (16,)}
FROZEN = "wpe.weight"


def specs(*rows: tuple[str, str, str, tuple[int, ...]]) -> dict[TensorKey, TensorSpec]:
    found = [TensorSpec(TensorKey(kind, name), dtype, shape) for kind, name, dtype, shape in rows]
    return {spec.key: spec for spec in found}


TENSORS = specs(
    *(("param", name, "bfloat16", shape) for name, shape in WEIGHTS.items()),
    *(("master", name, "float32", shape) for name, shape in WEIGHTS.items()),
    ("param", FROZEN, "bfloat16", (64, 16)),
    ("buffer", "running", "float32", (3,)),
    ("buffer", "seen", "int64", ()),
)

DATA = {
    "fingerprint": {"content": "9ebea803", "seed": 7, "num_samples": 1000, "sequence_length": 32},
    "global_batch_size": 8,
}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"}

DEEPSPEED = RunFacts(
    topology={"engine": "deepspeed", "zero_stage": 3, "world_size": 2},
    pinned={
        "model": {"n_layer": 1, "resid_pdrop": 0.1, "torch_dtype": "float32"},
        "module structure": "4f1c",
        "optimizer": "AdamW",
        "scheduler": "WarmupLR",
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 3, "sub_group_size": 9000},
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.1, "betas": [0.9, 0.95]}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.003, "warmup_num_steps": 5}},
        },
        "config": {"seed": 7, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    },
    groups=(
        {
            "members": ["wte.weight", "h.0.weight", "h.0.bias"],
            "lr": 0.0,
            "initial_lr": 0.003,
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "amsgrad": False,
        },
    ),
    versions=VERSIONS,
    data=DATA,
    tensors=TENSORS,
    aliases={"lm_head.weight": "wte.weight"},
)

MEGATRON = RunFacts(
    topology={
        "engine": "megatron",
        "world_size": 8,
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "virtual_pipeline": 1,
        "expert_parallel": 1,
        "expert_tensor_parallel": 2,
        "data_parallel": 2,
        "sequence_parallel": False,
        "distributed_optimizer": True,
    },
    pinned={
        "model": {"hidden_size": 16, "hidden_dropout": 0.1, "params_dtype": "bfloat16"},
        "optimizer config": {"lr": 0.003, "min_lr": 0.0, "weight_decay": 0.1, "adam_eps": 1e-8, "clip_grad": 1.0},
        "geometry": {"layers": 4, "vocabulary": 256, "weights": {"h.0.weight": {"order": 1, "axis": 0}}},
        "optimizer": "AdamW",
        "scheduler": "OptimizerParamScheduler",
        "schedule": {"max_lr": 0.003, "lr_decay_steps": 1000, "start_wd": 0.1, "lr_decay_style": "cosine"},
        "parallel": {"overlap_grad_reduce": False},
        "config": {"seed": 7, "micro_batch_size": 1},
    },
    groups=(
        {"members": ["wte.weight", "h.0.weight"], "lr": 0.003, "max_lr": 0.003, "min_lr": 0.0, "wd_mult": 1.0},
        {"members": ["h.0.bias"], "lr": 0.003, "max_lr": 0.003, "min_lr": 0.0, "wd_mult": 0.0},
    ),
    versions=VERSIONS,
    data=DATA,
    tensors=TENSORS,
    aliases={},
)


def but(facts: RunFacts, changes: Mapping[str, Any]) -> RunFacts:
    """`facts` with other values at `section/key/…` paths; `ABSENT` takes the key away."""
    changed: dict[str, Any] = {}
    for path, value in changes.items():
        section, *keys = path.split("/")
        place = changed.setdefault(section, copy.deepcopy(getattr(facts, section)))
        for key in keys[:-1]:
            place = place[int(key) if isinstance(place, tuple) else key]
        if value == ABSENT:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
    return replace(facts, **changed)


def with_tensors(facts: RunFacts, *rows: tuple[str, str, str, tuple[int, ...]]) -> RunFacts:
    """`facts` with these tensors, in place of those of the same key or besides the rest."""
    return replace(facts, tensors={**facts.tensors, **specs(*rows)})


def without_tensors(facts: RunFacts, *keys: tuple[str, str]) -> RunFacts:
    return replace(facts, tensors={key: spec for key, spec in facts.tensors.items() if tuple(key) not in keys})
