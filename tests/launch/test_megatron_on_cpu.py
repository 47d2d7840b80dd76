"""The stand-in for CUDA: what it replaces gives what the real thing would give."""

from __future__ import annotations

from typing import Any

from tests.conftest import Ranks


def uneven(rank: int, world_size: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from launch.demo import megatron_on_cpu

    megatron_on_cpu.install()
    dist.init_process_group("gloo")
    mine = torch.full((rank + 1, 2), float(rank + 1))
    gathered = [torch.empty(other + 1, 2) for other in range(world_size)]
    dist.all_gather(gathered, mine)
    summed = torch.empty(rank + 1, 2)
    dist.reduce_scatter(summed, [torch.full((other + 1, 2), float(rank + other)) for other in range(world_size)])
    even = [torch.empty(2) for _ in range(world_size)]
    handle = dist.all_gather(even, torch.full((2,), float(rank)), async_op=True)
    handle.wait()
    dist.destroy_process_group()
    return {
        "gathered": [part.tolist() for part in gathered],
        "summed": summed.tolist(),
        "even": [part.tolist() for part in even],
    }


def test_uneven_parts_are_gathered_and_summed_as_nccl_does(ranks: Ranks) -> None:
    values = ranks.run(uneven, 3)
    for rank, value in enumerate(values):
        assert value["gathered"] == [[[float(n)] * 2] * n for n in (1, 2, 3)]
        assert value["summed"] == [[float(0 + 1 + 2 + 3 * rank)] * 2] * (rank + 1)
        assert value["even"] == [[float(n)] * 2 for n in range(3)]


def devices(rank: int, world_size: int) -> dict[str, Any]:
    import torch

    from launch.demo import megatron_on_cpu

    megatron_on_cpu.install()
    zeros = torch.zeros
    megatron_on_cpu.install()
    with torch.cuda.stream(torch.cuda.Stream()):
        made = (
            torch.zeros(2, device="cuda"),
            torch.empty(2, device=torch.device("cuda", 0)),
            torch.ones(2, device="cpu"),
        )
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    return {
        "devices": {tensor.device.type for tensor in made},
        "types": [torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16)],
        "converted": torch.zeros(1).type(torch.int64).dtype is torch.int64,
        "once": torch.zeros is zeros,
        "no cuda": not torch.cuda.is_available(),
    }


def test_cuda_means_the_cpu_once_for_all(ranks: Ranks) -> None:
    (value,) = ranks.run(devices, 1)
    assert value == {
        "devices": {"cpu"},
        "types": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"],
        "converted": True,
        "once": True,
        "no cuda": True,
    }
