"""What is measured under which name: workloads, their sizes, ranks and peers, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resume_kit.errors import UsageError


@dataclass(frozen=True)
class Leg:
    """Another topology that resumes a workload's checkpoint, in a process group of its own.

    saves: it trains a step and saves, so that the next leg starts from its checkpoint. continues: it is the workload's
    own topology, and trains the steps again that the workload has trained from that checkpoint.
    """

    name: str
    ranks: int
    settings: tuple[str, ...] = ()
    saves: bool = False
    continues: bool = False


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

    @property
    def continues(self) -> bool:
        """Whether it trains some steps after the checkpoint of its legs twice, for a leg to train them once more."""
        return any(leg.continues for leg in self.legs)


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


def _settings(words: str, *, deterministic: bool = False) -> tuple[str, ...]:
    """Settings of a workload: those of all, which leave what they measure alone, and `words`.

    deterministic: so that steps can be compared; while systems are measured it is off, see suite/continuation.py.
    """
    repeatable = f"run.deterministic={str(deterministic).lower()}"
    return (repeatable, "data.num_workers=0", "data.max_bytes=8000000", *words.split())


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
    about="one GPU, 0.5 billion parameters, 6.2 GB of state; steps that the GPU bounds, ten as long as a write",
    workloads=(
        WorkloadSpec(
            "zero3",
            "deepspeed",
            ZERO.format("1b"),
            1,
            _settings(
                "micro_batch_size=144 gradient_accumulation_steps=2 data.sequence_length=256 model.vocab_size=8192 "
                "model.hidden_size=2560 model.intermediate_size=6912 model.num_hidden_layers=6 "
                "model.num_attention_heads=20 model.num_key_value_heads=20"
            ),
            DEEPSPEED_PEERS,
        ),
        WorkloadSpec(
            "megatron",
            "megatron",
            MEGATRON.format("1b"),
            1,
            _settings(
                "micro_batch_size=72 global_batch_size=288 data.sequence_length=256 model.vocabulary=8192 "
                "model.hidden_size=2560 model.ffn_hidden_size=6912 model.layers=6 model.attention_heads=20 "
                "model.query_groups=20"
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

_ZERO_RANKS = {8: (6, 4, 8), 2: (1, 2)}
"""Ranks of a run -> those that resume it under ZeRO-3, one after the other."""

_LAYOUTS = {8: ((2, 2), (8, 1), (4, 2), (1, 8), (1, 1)), 2: ((2, 1), (1, 2), (1, 1))}
"""Ranks of a run -> tensor and pipeline sizes of a Megatron run, and of those that resume it."""


def _several(
    name: str, ranks: int, about: str, zero: str, megatron: str, *, device: Literal["any", "cpu"] = "any"
) -> Preset:
    """ZeRO-3 and Megatron on several ranks: measured, continued bit-exactly, resumed in other topologies.

    `zero` and `megatron` are the sizes of the models, as settings. On CPU ranks all is the same but these.
    """
    (first, layout), *others = [_layout(ranks, *sizes) for sizes in _LAYOUTS[ranks]]
    return Preset(
        name,
        about,
        device=device,
        repeats=2,
        phases=1,
        phase_steps=10 if device == "any" else 4,
        save_every=10 if device == "any" else 2,
        effect=("overlapped",),
        workloads=(
            WorkloadSpec(
                "zero3",
                "deepspeed",
                ZERO.format("1b"),
                ranks,
                _settings(zero, deterministic=True),
                ("dcp-thread", "deepspeed"),
                (
                    Leg("zero3-again", ranks, continues=True),
                    *(Leg(f"zero3-on-{other}", other, saves=True) for other in _ZERO_RANKS[ranks]),
                ),
            ),
            WorkloadSpec(
                first,
                "megatron",
                MEGATRON.format("1b"),
                ranks,
                (*_settings(megatron, deterministic=True), *layout),
                ("dcp-thread", "megatron-async", "megatron-plain", "megatron-reshardable"),  # the slowest last
                (
                    Leg("megatron-again", ranks, continues=True),
                    *(Leg(other, ranks, settings, saves=ranks == 2) for other, settings in others),
                ),
            ),
        ),
    )


def _layout(ranks: int, tensor: int, pipeline: int) -> tuple[str, tuple[str, ...]]:
    """Name and settings of a Megatron run."""
    sizes = {"tp": tensor, "pp": pipeline, "dp": ranks // (tensor * pipeline)}
    name = "-".join(["megatron", *(f"{axis}{size}" for axis, size in sizes.items() if size > 1)])
    return name, (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")


_WIDE = "data.sequence_length=256 model.vocab_size=8192 ", "data.sequence_length=256 model.vocabulary=8192 "
"""Few and wide layers, so that the GPUs are to bound a step, of half a second and more, and not Python."""

_SEVEN_TENTHS = (
    _WIDE[0] + "micro_batch_size=72 gradient_accumulation_steps=3 model.hidden_size=3072 "
    "model.intermediate_size=8192 model.num_hidden_layers=6 model.num_attention_heads=24 model.num_key_value_heads=24",
    _WIDE[1] + "micro_batch_size=72 global_batch_size=432 model.hidden_size=3072 model.ffn_hidden_size=8192 "
    "model.layers=6 model.attention_heads=24 model.query_groups=24",
)
"""With as much state a rank as three billion have on eight."""

_THREE_BILLION = (
    _WIDE[0] + "micro_batch_size=24 model.hidden_size=6144 model.intermediate_size=12288 model.num_hidden_layers=8 "
    "model.num_attention_heads=48 model.num_key_value_heads=48",
    _WIDE[1] + "micro_batch_size=16 global_batch_size=256 model.hidden_size=6144 model.ffn_hidden_size=12288 "
    "model.layers=8 model.attention_heads=48 model.query_groups=48",
)

_TINY = (
    "micro_batch_size=1 data.sequence_length=32 model.vocab_size=2048 model.hidden_size=128 "
    "model.intermediate_size=256 model.num_hidden_layers=8 model.num_attention_heads=8 model.num_key_value_heads=8",
    "data.sequence_length=32 model.vocabulary=2048 model.hidden_size=128 model.ffn_hidden_size=256 model.layers=8 "
    "model.attention_heads=8 model.query_groups=8",
)

_SEVERAL = (
    _several("gpu-2x", 2, "two GPUs of one host, 0.7 billion parameters, about 9 GB of state", *_SEVEN_TENTHS),
    _several("gpu-8x", 8, "eight GPUs of one host, 3.1 billion parameters, about 37 GB of state", *_THREE_BILLION),
    _several("cpu-2x", 2, "gpu-2x rehearsed on CPU ranks: its times are no measurement", *_TINY, device="cpu"),
    _several("cpu-8x", 8, "gpu-8x rehearsed on CPU ranks: its times are no measurement", *_TINY, device="cpu"),
)

PRESETS = {preset.name: preset for preset in (_SMOKE, _CPU_TINY, _GPU_SMALL, _GPU_500M, _GPU_1B, *_SEVERAL)}
