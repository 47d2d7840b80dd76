"""Training jobs that tests run on real ranks: real DeepSpeed, gloo, a tiny GPT-2 with dropout, data workers."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A small training job. `buffers` adds some, one of them another on every rank.

    `faults` are applied on purpose, by name, see `tests/faults.py`.
    """

    run_dir: str
    stage: int = 3
    steps: int = 8
    save_every: int = 3
    seed: int = 7
    micro_batch_size: int = 2
    accumulation: int = 1
    sequence_length: int = 32
    workers: int = 0
    precision: str = "bf16"
    groups: int = 1
    frozen: bool = False
    offload: bool = False
    buffers: bool = True
    client_optimizer: str = ""
    scheduler: str = ""
    lr: float = 3e-3
    layers: int = 2
    dropout: float = 0.1
    data: str = ""
    policy: dict[str, Any] = field(default_factory=dict)
    ds: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    keep_last: int = 3
    saving: dict[str, Any] = field(default_factory=dict)
    timeout: float = 60.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def but(self, **changes: Any) -> Job:
        return replace(self, **changes)


def text_file(folder: Path, *, size: int = 60_000, flip: int | None = None) -> str:
    """A deterministic text of `size` bytes; `flip` changes one byte."""
    words = [b"box", b"shard", b"rank", b"moment", b"master", b"commit", b"proof", b"gate"]
    content = bytearray()
    state = 12345
    while len(content) < size:
        state = (state * 1103515245 + 12345) % 2**31
        content += words[state // 7 % len(words)] + b" "
    del content[size:]
    if flip is not None:
        content[flip] ^= 1
    path = folder / ("text.txt" if flip is None else f"text-{flip}.txt")
    path.write_bytes(content)
    return str(path)


def build(rank: int, world_size: int, job: Job) -> tuple[Any, Any]:
    """Engine and loader of a job, on an initialised process group."""
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from launch.entry import seed_everything
    from resume_kit import ResumableLoader, TokenDataset

    warnings.filterwarnings("ignore")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    dataset = TokenDataset.from_path(job.data, sequence_length=job.sequence_length)
    loader = ResumableLoader(
        dataset,
        micro_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.accumulation,
        rank=rank,
        world_size=world_size,
        seed=job.seed,
        num_workers=job.workers,
    )
    seed_everything(job.seed)
    shape = {"n_layer": job.layers, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 256}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), job.dropout)
    model = GPT2LMHeadModel(
        GPT2Config(**{**shape, **drop, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False, **job.model})
    )
    if job.buffers:
        model.register_buffer("running", torch.zeros(3))
        model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        model.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
    if job.frozen:
        model.transformer.wpe.weight.requires_grad_(False)
        model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model.train()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "zero_optimization": {"stage": job.stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": job.lr, "warmup_num_steps": 5},
        },
        **job.ds,
    }
    if job.stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 200, "sub_group_size": 9000}
    config["zero_optimization"] |= job.zero
    if job.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if job.scheduler == "lambda":
        config.pop("scheduler")
    if job.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: Any = weights
    if job.groups == 2:
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0, "lr": job.lr / 2},
        ]
    optimizer = None
    if job.client_optimizer == "sgd":
        config["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.SGD(groups, lr=job.lr, momentum=0.9)
    elif job.client_optimizer == "plain sgd":
        config["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.SGD(groups, lr=job.lr)
    elif job.client_optimizer == "amsgrad":
        optimizer = torch.optim.AdamW(groups, lr=job.lr, amsgrad=True)
    elif job.groups == 2 or job.offload:
        optimizer = torch.optim.AdamW(groups, lr=job.lr)
    else:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": job.lr, "weight_decay": 0.1, "torch_adam": True}}
    schedule = None
    if job.scheduler == "lambda":
        assert optimizer is not None
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups if optimizer is None else None,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=config,
    )
    return engine, loader


def train(rank: int, world_size: int, options: dict[str, Any], faults: list[str] | None = None) -> dict[str, Any]:
    """Run a job to its end; return its step records, where it resumed, and the final state's digests."""
    from launch.entry import seed_everything
    from resume_kit import Policy, ResumeKit, Retention, Saving
    from tests import faults as fault_table

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    seed_everything(job.seed + 100 + rank)
    hold = fault_table.Faults(faults or [], rank)
    hold.before_kit(engine, loader)
    kit = ResumeKit(
        engine,
        loader,
        Policy.from_mapping(job.policy),
        run_dir=job.run_dir,
        save_every=job.save_every or None,
        saving=Saving(**job.saving),
        retention=Retention(keep_last=job.keep_last),
        config={"seed": job.seed},
        timeout=job.timeout,
        show=lambda text: print(text, flush=True),
    )
    hold.before_resume(engine, kit)
    resumed_at = step = kit.resume()
    hold.after_resume(engine)
    records = []
    batches = hold.batches or iter(loader)
    while step < job.steps:
        batch = next(batches)
        if job.buffers:
            engine.module.running += 0.5 * (rank + 1)
            engine.module.seen += 1
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        hold.after_engine_step(engine, kit)
        record = kit.step(loss)
        if record:
            step = record["step"]
            records.append(record)
            if os.environ.get("SHOW_STEPS"):
                print(f"step {step} loss {record['loss']!r}", flush=True)
    kit.close()
    loader.close()
    return {"resumed_at": resumed_at, "records": records, "state": live_digests(kit)}


def live_digests(kit: Any) -> dict[str, str]:
    """Fingerprint of every live piece and whole copy of this rank, of the shared state, and of every generator."""
    from resume_kit.algebra.boxes import Box
    from resume_kit.checkpoint import canonical
    from resume_kit.engines import rng
    from resume_kit.engines.fingerprint import as_unsigned, fingerprints

    adapter = kit._adapter
    pieces, replicas = adapter.pieces(), adapter.replicas()
    values = as_unsigned(fingerprints((p.data, p.spec.shape, p.box) for p in pieces))
    whole = as_unsigned(fingerprints((r.data.reshape(-1), r.spec.shape, Box.whole(r.spec.shape)) for r in replicas))
    found = {f"{p.spec.key}[{p.box}]": f"{v:016x}" for p, v in zip(pieces, values, strict=True)}
    found |= {f"whole {r.spec.key}": f"{v:016x}" for r, v in zip(replicas, whole, strict=True)}
    found["state"] = canonical.value_digest(adapter.state())
    found["scalars"] = canonical.value_digest(adapter.scalars())
    found |= {f"rng {name}": d for name, d in rng.digests(rng.capture(adapter.rng_trackers())).items()}
    return found
