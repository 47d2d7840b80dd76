"""DeepSpeed's fast file writer (FastPersist): the same checkpoint through asynchronous direct I/O."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.deepspeed_native import DeepSpeedNative
from benchmarks.suite.timing import shortened
from benchmarks.suite.workloads import Workload


class DeepSpeedFast(DeepSpeedNative):
    key = "deepspeed-fast"
    name = "DeepSpeed fast file writer"
    loads: ClassVar[bool] = False
    note = 'checkpoint: {"writer": {"type": "fast", "data_parallel": "replica"}}, 1 GiB buffer'

    def __init__(self, workload: Workload, root: Path) -> None:
        super().__init__(workload, root)
        self._configured = False

    def available(self) -> str | None:
        from deepspeed.ops.op_builder import AsyncIOBuilder, UtilsBuilder

        for builder in (AsyncIOBuilder(), UtilsBuilder()):
            try:
                builder.load(verbose=False)
            except (Exception, SystemExit) as error:
                return f"its op {builder.NAME} cannot be built here: {shortened(error)}"
        return None

    def save(self, step: int) -> None:
        engine = self.workload.engine
        if not self._configured:
            self._native = (engine._config.checkpoint_config, engine.checkpoint_engine)
            self._configure()
            self._fast = (engine._config.checkpoint_config, engine.checkpoint_engine)
            self._configured = True
        engine._config.checkpoint_config, engine.checkpoint_engine = self._fast
        try:
            super().save(step)
        finally:
            engine._config.checkpoint_config, engine.checkpoint_engine = self._native

    def _configure(self) -> None:
        """What `deepspeed.initialize` does with that configuration."""
        from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config

        # the launchers of DeepSpeed set them; it takes them to tell machines apart
        os.environ.setdefault("CROSS_RANK", "0")
        os.environ.setdefault("CROSS_SIZE", "1")
        engine = self.workload.engine
        writer = {"type": "fast", "io_buffer_size": 1 << 30, "io_buffer_double": True, "data_parallel": "replica"}
        engine._config.checkpoint_config = get_checkpoint_config(
            {"checkpoint": {"writer": writer, "checkpoint_serialization": False}}
        )
        engine._configure_checkpointing()
