"""megatron-core's dist_checkpointing: its plain format, the same asynchronously, and the reshardable format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from benchmarks.peers.peer import Peer
from benchmarks.suite.workloads import MegatronRun, Workload
from launch.megatron_training import Training


class MegatronPlain(Peer):
    key = "megatron-plain"
    name = "megatron-core dp_reshardable"
    engines: ClassVar[frozenset[str]] = frozenset({"megatron"})
    note = "masters, moments and 16-bit weights; tensor and pipeline sizes cannot change"
    sharding: ClassVar[str] = "dp_reshardable"

    def __init__(self, workload: Workload, root: Path) -> None:
        super().__init__(workload, root)
        assert isinstance(workload, MegatronRun)
        self._training: Training = workload.training

    def available(self) -> str | None:
        config = self._training.config.parallel
        return None if config.distributed_optimizer else "its formats are those of the distributed optimizer"

    def _state(self, *, loading: bool = False) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": self.sharding,
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        chunks = self._training.chunks
        state: dict[str, Any] = {}
        for number, chunk in enumerate(chunks):
            inner = chunk.module
            inner = inner.module if hasattr(inner, "module") else inner
            key = "model" if len(chunks) == 1 else f"model{number}"
            state[key] = inner.sharded_state_dict(metadata=metadata)
        model = state["model"] if len(chunks) == 1 else state
        optimizer = self._training.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {**state, "optimizer": optimizer}

    def _new_folder(self, step: int) -> str:
        folder = self.begin(step)
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
        dist.barrier()
        return str(folder)

    def save(self, step: int) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self._state(), self._new_folder(step))

    def load(self) -> Mapping[str, float]:
        self._take(self._read())
        return {}

    def _read(self) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        loaded: dict[str, Any] = dist_checkpointing.load(self._state(loading=True), str(self.folder()))
        self._separate_steps()
        return loaded

    def _take(self, loaded: dict[str, Any]) -> None:
        chunks = self._training.chunks
        for number, chunk in enumerate(chunks):
            inner = chunk.module
            inner = inner.module if hasattr(inner, "module") else inner
            inner.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{number}"])
        self._training.optimizer.load_state_dict(loaded["optimizer"])
        self._separate_steps()

    def _separate_steps(self) -> None:
        """Its `load_state_dict`, which `sharded_state_dict` calls too before a load, gives all parameters one tensor:
        torch's AdamW would count it up once for each of them.
        """
        optimizer = self._training.optimizer
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for state in part.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()


class MegatronAsync(MegatronPlain):
    key = "megatron-async"
    name = "megatron-core dp_reshardable, async"
    loads: ClassVar[bool] = False
    note = "a forked writer; its memory is not in the figure"

    def __init__(self, workload: Workload, root: Path) -> None:
        super().__init__(workload, root)
        self._queue: Any = None

    def save(self, step: int) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        if self._queue is None:
            self._queue = AsyncCallsQueue()
        request = dist_checkpointing.save(self._state(), self._new_folder(step), async_sharded_save=True)
        self._queue.schedule_async_request(request)

    def wait(self) -> None:
        while self._queue is not None and self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=True)


class MegatronReshardable(MegatronPlain):
    key = "megatron-reshardable"
    name = "megatron-core fully_reshardable"
    note = (
        "the format that can change tensor and pipeline sizes, as ours can; its load stops before the optimizer, whose "
        "load_state_dict raises KeyError: 'step' with torch's AdamW"
    )
    sharding = "fully_reshardable"

    def load(self) -> Mapping[str, float]:
        self._read()
        return {}
