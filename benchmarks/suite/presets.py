"""What is measured under which name: workloads, their sizes, ranks and peers, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resume_kit.errors import UsageError


@dataclass(frozen=True)
class Leg:
    """Another topology that resumes a workload's checkpoint, in a process group of its own.

    saves: it trains a step and saves, so that the next leg starts from its checkpoint.
    """

    name: str
    ranks: int
    settings: tuple[str, ...] = ()
    saves: bool = False


@dataclass(frozen=True)
class WorkloadSpec:
    """A training run to measure on. `settings` override the configuration file, as `--set` of the entries does."""

    name: str
    engine: Literal["deepspeed", "megatron"]
    config: str
    ranks: int
    settings: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True)
class Preset:
    """Workloads and how they are measured.

    device: `cpu` hides the GPUs. repeats: of every save and load, after a first one that is reported apart.
    phases: alternations of training with and without saves, of `phase_steps` steps each, a save every `save_every`.
    effect: systems that save then, by their keys.
    """

    name: str
    about: str
    workloads: tuple[WorkloadSpec, ...]
    device: Literal["any", "cpu"] = "any"
    repeats: int = 5
    phases: int = 2
    phase_steps: int = 20
    save_every: int = 10
    effect: tuple[str, ...] = ("overlapped", "dcp-thread", "torch-checkpointing", "megatron-async")

    def workload(self, name: str) -> WorkloadSpec:
        """Raises `UsageError` for a name that it has not."""
        for spec in self.workloads:
            if spec.name == name:
                return spec
        raise UsageError(f"preset {self.name} has no workload {name!r}; it has {', '.join(self.names)}")

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.workloads]


DEEPSPEED_PEERS = ("deepspeed", "deepspeed-fast", "dcp", "dcp-thread", "dcp-pinned", "torch-checkpointing")
MEGATRON_PEERS = ("megatron-plain", "megatron-async", "megatron-reshardable", "dcp", "dcp-thread")

ZERO, MEGATRON = "configs/zero3_{}.yaml", "configs/megatron_{}.yaml"


def _settings(words: str) -> tuple[str, ...]:
    """Settings of a workload: those of all, which leave what they measure alone, and `words`."""
    return ("run.deterministic=false", "data.num_workers=0", "data.max_bytes=8000000", *words.split())


_SMOKE = Preset(
    name="smoke",
    about="one CPU rank and kilobytes: whether the suite itself works",
    device="cpu",
    repeats=1,
    phases=1,
    phase_steps=2,
    save_every=1,
    workloads=(WorkloadSpec("zero3", "deepspeed", ZERO.format("tiny"), 1, _settings(""), ("dcp", "deepspeed-fast")),),
)

_CPU_TINY = Preset(
    name="cpu-tiny",
    about="two CPU ranks with gloo, about 150 MB a rank; shows the workings, not a GPU's speed",
    device="cpu",
    phase_steps=8,
    save_every=4,
    workloads=(
        WorkloadSpec(
            "zero3",
            "deepspeed",
            ZERO.format("tiny"),
            2,
            _settings(
                "micro_batch_size=1 data.sequence_length=32 model.vocab_size=32768 model.n_embd=512 model.n_head=8"
            ),
            ("dcp-process", *DEEPSPEED_PEERS),
            (Leg("zero3-on-3", 3),),
        ),
        WorkloadSpec(
            "megatron-tp2",
            "megatron",
            MEGATRON.format("tiny"),
            2,
            _settings(
                "micro_batch_size=1 global_batch_size=1 data.sequence_length=32 init=megatron parallel.tensor=2 "
                "model.layers=2 model.vocabulary=32768 model.hidden_size=512 model.attention_heads=8"
            ),
            MEGATRON_PEERS,
            (Leg("megatron-pp2", 2, ("parallel.tensor=1", "parallel.pipeline=2")),),
        ),
    ),
)

_GPU_SMALL = Preset(
    name="gpu-small",
    about="one GPU, about 1.3 GB of state: seconds",
    phase_steps=10,
    save_every=5,
    workloads=(
        WorkloadSpec(
            "zero3",
            "deepspeed",
            ZERO.format("1b"),
            1,
            _settings(
                "model.hidden_size=768 model.intermediate_size=2048 model.num_hidden_layers=8 "
                "model.num_attention_heads=12 model.num_key_value_heads=12"
            ),
            ("dcp-process", *DEEPSPEED_PEERS),
        ),
        WorkloadSpec(
            "megatron",
            "megatron",
            MEGATRON.format("1b"),
            1,
            _settings(
                "model.hidden_size=768 model.ffn_hidden_size=2048 model.layers=8 model.attention_heads=12 "
                "model.query_groups=12 global_batch_size=2"
            ),
            MEGATRON_PEERS,
        ),
    ),
)

_GPU_500M = Preset(
    name="gpu-500m",
    about="one GPU, 0.55 billion parameters, 6.6 GB of state, steps long enough to write it beneath ten of them",
    workloads=(
        WorkloadSpec(
            "zero3",
            "deepspeed",
            ZERO.format("1b"),
            1,
            _settings(
                "micro_batch_size=4 gradient_accumulation_steps=2 model.hidden_size=1536 model.intermediate_size=4096 "
                "model.num_hidden_layers=16"
            ),
            DEEPSPEED_PEERS,
        ),
        WorkloadSpec(
            "megatron",
            "megatron",
            MEGATRON.format("1b"),
            1,
            _settings(
                "micro_batch_size=2 global_batch_size=8 model.hidden_size=1536 model.ffn_hidden_size=4096 "
                "model.layers=16 model.query_groups=16"
            ),
            MEGATRON_PEERS,
        ),
    ),
)

_GPU_1B = Preset(
    name="gpu-1b",
    about="one GPU of 40 GB or more, 1.1 billion parameters, about 13 GB of state",
    workloads=(
        WorkloadSpec("zero3", "deepspeed", ZERO.format("1b"), 1, _settings(""), DEEPSPEED_PEERS),
        WorkloadSpec(
            "megatron", "megatron", MEGATRON.format("1b"), 1, _settings("global_batch_size=2"), MEGATRON_PEERS
        ),
    ),
)

_GPU_8X = Preset(
    name="gpu-8x",
    about="eight GPUs of one host, 2.7 billion parameters, about 33 GB of state; resharding to other topologies",
    repeats=3,
    phase_steps=10,
    save_every=5,
    effect=("overlapped",),
    workloads=(
        WorkloadSpec(
            "zero3",
            "deepspeed",
            ZERO.format("1b"),
            8,
            _settings(
                "model.hidden_size=2560 model.intermediate_size=6912 model.num_hidden_layers=32 "
                "model.num_attention_heads=32 model.num_key_value_heads=32"
            ),
            ("deepspeed", "dcp-thread"),
            (Leg("zero3-on-6", 6, saves=True), Leg("zero3-on-4", 4, saves=True), Leg("zero3-on-8", 8)),
        ),
        WorkloadSpec(
            "megatron-tp2-pp2-dp2",
            "megatron",
            MEGATRON.format("1b"),
            8,
            _settings(
                "global_batch_size=8 parallel.tensor=2 parallel.pipeline=2 model.layers=32 model.hidden_size=2560 "
                "model.ffn_hidden_size=6912 model.attention_heads=32 model.query_groups=8"
            ),
            ("megatron-plain", "megatron-async", "megatron-reshardable"),
            (
                Leg("megatron-tp8", 8, ("parallel.tensor=8", "parallel.pipeline=1")),
                Leg("megatron-tp4-pp2", 8, ("parallel.tensor=4", "parallel.pipeline=2")),
                Leg("megatron-pp8", 8, ("parallel.tensor=1", "parallel.pipeline=8")),
                Leg("megatron-dp8", 8, ("parallel.tensor=1", "parallel.pipeline=1")),
            ),
        ),
    ),
)

PRESETS = {preset.name: preset for preset in (_SMOKE, _CPU_TINY, _GPU_SMALL, _GPU_500M, _GPU_1B, _GPU_8X)}
