"""From the user's engine to its adapter."""

from __future__ import annotations

from typing import Any

from resume_kit.engines.adapter import EngineAdapter
from resume_kit.errors import UsageError


def adapter_for(engine: Any) -> EngineAdapter:
    """The adapter of a DeepSpeed or Megatron engine; an object that already is an adapter comes back as it is.

    Raises `UsageError` for anything else.
    """
    if all(hasattr(engine, name) for name in ("pieces", "replicas", "run_gate")):
        adapter: EngineAdapter = engine
        return adapter
    if type(engine).__module__.split(".")[0] == "deepspeed":
        from resume_kit.engines.deepspeed.adapter import DeepSpeedAdapter

        return DeepSpeedAdapter(engine)
    if type(engine).__module__ == "resume_kit.engines.megatron.engine":
        from resume_kit.engines.megatron.adapter import MegatronAdapter

        return MegatronAdapter(engine)
    raise UsageError(
        f"no adapter for a {type(engine).__module__}.{type(engine).__name__}; "
        "give what deepspeed.initialize returned, a MegatronEngine, or an object with the methods of EngineAdapter"
    )
