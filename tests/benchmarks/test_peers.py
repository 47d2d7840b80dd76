"""Peers leave a state behind on which the others can go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suite.presets import PRESETS
from tests.conftest import Ranks


def steps_after_a_load(rank: int, world_size: int, root: str, peer: str) -> set[float]:
    """Adam's steps of all parameters after a step, a load and another step."""
    import torch.distributed as dist

    from benchmarks.peers.registry import PEERS
    from benchmarks.suite.workloads import MegatronRun, build

    spec = PRESETS["cpu-2x"].workloads[-1]
    workload = build("megatron", spec.config, [*spec.settings, "parallel.tensor=1", "model.layers=2"])
    assert isinstance(workload, MegatronRun)
    batches = iter(workload.loader)
    workload.step(batches)
    system = PEERS[peer](workload, Path(root))
    system.save(1)
    system.wait()
    system.load()
    workload.step(batches)
    workload.loader.close()
    (inner,) = workload.training.optimizer.chained_optimizers
    found = {float(state["step"]) for state in inner.optimizer.state.values()}
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("peer", ["megatron-plain", "megatron-reshardable"])
def test_a_load_of_megatron_core_leaves_each_parameter_a_step_of_its_own(
    ranks: Ranks, tmp_path: Path, peer: str
) -> None:
    assert ranks.run(steps_after_a_load, 1, str(tmp_path), peer) == [{2.0}]
