"""The Megatron-core adapter: tensor, pipeline, expert and data parallelism, distributed optimizer."""

from resume_kit.engines.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]
