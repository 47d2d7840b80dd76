"""Settings that Megatron has and the training entry's configuration does not, made in a rank before it builds."""

from __future__ import annotations

import re
from typing import Any

from tests.megatron_jobs import train


def change(
    *, transformer: dict[str, Any] | None = None, gradients: dict[str, Any] | None = None, freeze: str = ""
) -> None:
    """Entries of the TransformerConfig, of the DistributedDataParallelConfig; weights to freeze, by logical name."""
    import megatron.core.distributed as distributed

    import launch.megatron_model as model

    configure, build, wrapping = model.transformer_config, model.build_chunks, distributed.DistributedDataParallelConfig

    def transformer_config(*given: Any, **named: Any) -> Any:
        found = configure(*given, **named)
        for name, value in (transformer or {}).items():
            setattr(found, name, value)
        return found

    def build_chunks(*given: Any, **named: Any) -> Any:
        chunks = build(*given, **named)
        for chunk in chunks:
            gpt = getattr(chunk, "module", chunk)
            for name, weight in gpt.named_parameters():
                if freeze and re.match(freeze, model.logical_name(gpt, name)):
                    weight.requires_grad_(False)
        return chunks

    model.transformer_config, model.build_chunks = transformer_config, build_chunks
    distributed.DistributedDataParallelConfig = lambda **named: wrapping(**{**named, **(gradients or {})})


def train_changed(rank: int, world_size: int, options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tests.megatron_jobs.train` with settings changed."""
    change(**changes)
    return train(rank, world_size, options)
