"""The trips of the topology matrix: from one topology to another, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from tests.jobs import Job
from tests.megatron_jobs import MegatronJob

AnyJob: TypeAlias = Job | MegatronJob

FLEXIBLE = {"preset": "flexible"}


@dataclass(frozen=True)
class Place:
    """A job on a number of ranks. `label` tells its topology."""

    label: str
    world: int
    job: AnyJob


@dataclass(frozen=True)
class Trip:
    """From `start` to `goal` and back. `note` says what is special about the model or the optimizer."""

    name: str
    engine: str
    start: Place
    goal: Place
    note: str = ""

    @property
    def tolerance(self) -> str:
        """How far a loss may be from that of the topology before, by the policy's name for it."""
        return "standard" if self.start.job.precision == "fp32" else "relaxed"


def zero(world: int, stage: int = 3, *, batch: int = 12, accumulation: int = 1, **changes: Any) -> Place:
    """A ZeRO job whose global batch is `batch`, whatever its world."""
    micro_batch, rest = divmod(batch, world * accumulation)
    assert not rest
    sizes = {"micro_batch_size": micro_batch, "accumulation": accumulation, "stage": stage}
    job = Job(run_dir="", policy=FLEXIBLE, save_every=0, buffers=False, **{**sizes, **changes})
    return Place(f"ZeRO-{stage} on {world}", world, job)


def megatron(world: int, *, micro_batch: int = 2, batch: int = 8, **changes: Any) -> Place:
    """A Megatron job in a world of `world` ranks; the sizes of its groups go by the names of `MegatronJob`."""
    job = MegatronJob(policy=FLEXIBLE, save_every=0, micro_batch=micro_batch, global_batch=batch, **changes)
    sizes = {"TP": job.tp, "PP": job.pp, "VPP": job.vpp, "DP": world // (job.tp * job.pp), "EP": job.ep}
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one rank"]
    flags = {
        "SP": job.sp,
        f"ETP{job.etp}": job.etp,
        "overlap": job.overlap,
        "plain Adam": not job.distributed_optimizer,
    }
    return Place(" ".join([*parts, *(name for name, on in flags.items() if on)]), world, job)


def _of_zero() -> Iterator[Trip]:
    def trip(name: str, start: Place, goal: Place, note: str = "") -> Trip:
        return Trip(f"zero-{name}", "DeepSpeed", start, goal, note)

    yield trip("4-3", zero(4), zero(3))
    yield trip("3-5", zero(3, batch=60), zero(5, batch=60))
    yield trip("2-1", zero(2), zero(1))
    yield trip("1-2", zero(1), zero(2))
    yield trip("2-4", zero(2), zero(4))
    yield trip("3-2", zero(3), zero(2))
    yield trip("stage-3-1", zero(2), zero(2, 1))
    yield trip("stage-1-3", zero(2, 1), zero(2))
    yield trip("stage-2-3", zero(2, 2), zero(2))
    yield trip("stage-3-2", zero(2), zero(2, 2))
    yield trip("stage-1-2", zero(2, 1), zero(2, 2))
    yield trip("stage-3-1-ranks-4-2", zero(4), zero(2, 1))
    yield trip("stage-1-3-ranks-2-3", zero(2, 1), zero(3))
    yield trip("stage-2-3-ranks-3-4", zero(3, 2), zero(4))
    groups: dict[str, Any] = {"groups": 2, "frozen": True}
    note = "two groups, frozen weights"
    yield trip("groups-stage-3-2-ranks-2-3", zero(2, **groups), zero(3, 2, **groups), note)
    yield trip("groups-stage-1-3-ranks-3-2", zero(3, 1, **groups), zero(2, **groups), note)
    exact: dict[str, Any] = {"precision": "fp32", **groups}
    yield trip("fp32-groups-stage-1-3-ranks-3-2", zero(3, 1, **exact), zero(2, **exact), f"{note}, fp32")
    yield trip("fp32-2-3", zero(2, precision="fp32"), zero(3, precision="fp32"), "fp32")
    yield trip("fp32-stage-2-1-ranks-2-3", zero(2, 2, precision="fp32"), zero(3, 1, precision="fp32"), "fp32")
    yield trip("accumulation-3-2", zero(3, accumulation=2), zero(2, accumulation=3), "accumulation 2 → 3")
    yield trip("offload-2-3", zero(2, offload=True), zero(3, offload=True), "optimizer on the CPU")
    amsgrad: dict[str, Any] = {"client_optimizer": "amsgrad"}
    yield trip("amsgrad-stage-2-3", zero(2, 2, **amsgrad), zero(2, **amsgrad), "AMSGrad")


#: Gated MLP, RMSNorm, rotary positions, grouped queries, an output layer of its own, no biases.
LLAMA: dict[str, Any] = {
    "swiglu": True,
    "norm": "RMSNorm",
    "rotary": True,
    "groups": 2,
    "tied": False,
    "model": {"bias": False},
}
EXPERTS: dict[str, Any] = {"experts": 4, "swiglu": True, "norm": "RMSNorm", "tied": False}


def _of_megatron() -> Iterator[Trip]:
    def trip(name: str, start: Place, goal: Place, note: str = "") -> Trip:
        return Trip(f"megatron-{name}", "Megatron", start, goal, note)

    yield trip("tp-pp", megatron(2, tp=2), megatron(2, pp=2))
    yield trip("pp-tp", megatron(2, pp=2), megatron(2, tp=2))
    yield trip("tp-dp", megatron(2, tp=2), megatron(2))
    yield trip("dp-tp", megatron(2), megatron(2, tp=2))
    yield trip("tp2pp2-dp4", megatron(4, tp=2, pp=2), megatron(4))
    yield trip("dp4-tp2pp2", megatron(4), megatron(4, tp=2, pp=2))
    yield trip("tp2pp2-pp2dp2", megatron(4, tp=2, pp=2), megatron(4, pp=2))
    yield trip("llama-tp4-pp4", megatron(4, tp=4, layers=4, **LLAMA), megatron(4, pp=4, layers=4, **LLAMA), "Llama")
    yield trip("pp4-pp2dp2", megatron(4, pp=4, layers=4), megatron(4, pp=2, layers=4), "4 layers")
    eight = megatron(8, tp=2, pp=2, micro_batch=1), megatron(4, tp=4, micro_batch=1)
    yield trip("tp2pp2dp2-tp4", *eight)
    yield trip("pp-vpp", megatron(2, pp=2, layers=4), megatron(2, pp=2, vpp=2, layers=4), "4 layers")
    yield trip("vpp-tp", megatron(2, pp=2, vpp=2, layers=4), megatron(2, tp=2, layers=4), "4 layers")
    yield trip("sharded-plain", megatron(2), megatron(2, distributed_optimizer=False))
    yield trip("plain-sharded", megatron(2, distributed_optimizer=False), megatron(2))
    yield trip("plain-tp", megatron(2, distributed_optimizer=False), megatron(2, tp=2))
    yield trip("dp3-one", megatron(3, batch=12), megatron(1, batch=12))
    yield trip("dp3-tp", megatron(3, batch=12), megatron(2, batch=12, tp=2))
    yield trip("sequence-on-off", megatron(2, tp=2, sp=True), megatron(2, tp=2))
    yield trip("overlap-on-off", megatron(2, overlap=True, bucket_size=4000), megatron(2), "several buckets")
    yield trip("llama-tp-pp", megatron(2, tp=2, **LLAMA), megatron(2, pp=2, **LLAMA), "Llama")
    yield trip("llama-dp-tp", megatron(2, **LLAMA), megatron(2, tp=2, sp=True, **LLAMA), "Llama")
    fp32: dict[str, Any] = {"precision": "fp32"}
    yield trip("fp32-tp-pp", megatron(2, tp=2, **fp32), megatron(2, pp=2, **fp32), "fp32")
    yield trip("fp32-dp4-tp2pp2", megatron(4, **fp32), megatron(4, tp=2, pp=2, **fp32), "fp32")
    yield trip("experts-ep-dp", megatron(2, ep=2, **EXPERTS), megatron(2, **EXPERTS), "4 experts")
    yield trip("experts-dp-ep", megatron(2, **EXPERTS), megatron(2, ep=2, **EXPERTS), "4 experts")
    tensors: dict[str, Any] = {"tp": 2, "etp": 2, "sp": True}
    yield trip("experts-ep-tp", megatron(2, ep=2, **EXPERTS), megatron(2, **tensors, **EXPERTS), "4 experts")
    yield trip("experts-ep2dp4-ep4", megatron(4, ep=2, **EXPERTS), megatron(4, ep=4, **EXPERTS), "4 experts")


TRIPS: dict[str, Trip] = {trip.name: trip for trip in (*_of_zero(), *_of_megatron())}
