"""Lets megatron-core train on CPU ranks: what it insists on doing with CUDA is done with the CPU.

For machines without a GPU, in the demo and in tests. Every line stands for a place where megatron-core 0.16 knows only
CUDA; nothing that computes, shards, reduces or updates is replaced. No CUDA semantics are tested through it: streams
and events do nothing, and Megatron's "device" generators are states of the one CPU generator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")
_installed = False


def install() -> None:
    """Send megatron-core's CUDA calls to the CPU, in this process and for good. A second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _devices()
    _generators()
    _streams()
    _type_names()
    _token_counts()
    _uneven_collectives()
    # megatron-core compiles its little functions, which would call a C++ compiler for each
    torch.compiler.set_stance("force_eager")


def _replace(owner: Any, **replacements: Any) -> None:
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def _devices() -> None:
    _replace(torch, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    _replace(torch.cuda, current_device=lambda: "cpu", synchronize=lambda *_, **__: None)
    _replace(torch.Tensor, cuda=lambda self, *_, **__: self)
    _replace(torch.nn.Module, cuda=lambda self, *_, **__: self)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _generators() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    _replace(torch.cuda, get_rng_state=get_state, set_rng_state=set_state, manual_seed=torch.manual_seed)
    _replace(torch.cuda.random, get_rng_state=get_state, set_rng_state=set_state)
    _replace(megatron_random, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)
    # it would warn at every dropout that the CPU generator moved in a device's place: here that is the point
    logging.getLogger(megatron_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.msg)


class _Stream:
    """Stands for a stream, and for an event on it: the CPU has done all that was asked of it before."""

    def wait_stream(self, _: Any) -> None: ...

    def wait(self, _: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _Stream:
        return self


def _streams() -> None:
    stream = _Stream()

    @contextmanager
    def on_stream(_: Any) -> Iterator[None]:
        yield

    def the_stream(*_: Any, **__: Any) -> _Stream:
        return stream

    _replace(torch.cuda, Stream=the_stream, current_stream=the_stream, default_stream=the_stream, stream=on_stream)


def _type_names() -> None:
    """The optimizers sort parameters by the names of their types, and know only those of CUDA."""
    plain = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    _replace(torch.Tensor, type=type_of)


def _token_counts() -> None:
    """The token dispatcher fetches counts from the device as arrays, and leaves those alone that are on the CPU."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    _replace(token_dispatcher, maybe_move_tensor_to_cpu=to_host)


def _uneven_collectives() -> None:
    """gloo gathers and reduce-scatters only parts of one size; split experts exchange as many rows as were routed."""
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in parts}) == 1:
            return gather(parts, mine, group=group, async_op=async_op)
        rows = max(part.shape[0] for part in parts)
        padded = mine.new_zeros((rows, *mine.shape[1:]))
        padded[: mine.shape[0]] = mine
        received = [torch.empty_like(padded) for _ in parts]
        gather(received, padded, group=group)
        for part, whole in zip(parts, received, strict=True):
            part.copy_(whole[: part.shape[0]])
        return None

    def reduce_scatter(
        mine: torch.Tensor,
        parts: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in parts}) == 1:
            return scatter(mine, parts, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(parts):
            reduced = part.clone()
            dist.all_reduce(reduced, op=op, group=group)
            if rank == dist.get_rank(group):
                mine.copy_(reduced)
        return None

    _replace(dist, all_gather=all_gather, reduce_scatter=reduce_scatter)
