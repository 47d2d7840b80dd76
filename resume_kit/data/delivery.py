"""What runs next to the dataset: the endless batch sampler, and the fetch that labels batches with ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from resume_kit.data.permutation import ShuffledOrder, derive_key
from resume_kit.errors import ResumeRefused, UsageError

_SAMPLE, _COLLATE, _PINNED, _WORKERS = 1, 2, 3, 4

PositionedSample = tuple[int, int]
LabelledBatch = tuple[list[int], Any]


class MapDataset(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of one optimizer step are spread over micro steps and ranks; raises UsageError."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "gradient_accumulation_steps", "world_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"rank {self.rank} is outside a world of {self.world_size}; give 0 to {self.world_size - 1}"
            )

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def start(self, position: int, micro_step: int) -> int:
        """First global position of this rank's micro-batch in the step that starts at `position`."""
        per_micro_step = self.micro_batch_size * self.world_size
        return position + micro_step * per_micro_step + self.rank * self.micro_batch_size


@dataclass(frozen=True)
class EndlessBatchSampler:
    """Yields this rank's micro-batches as lists of (position, sample id), from a position, for ever."""

    order: ShuffledOrder
    layout: BatchLayout
    position: int
    micro_step: int

    def __iter__(self) -> Iterator[list[PositionedSample]]:
        position, micro_step, size = self.position, self.micro_step, self.layout.micro_batch_size
        while True:
            start = self.layout.start(position, micro_step)
            yield list(zip(range(start, start + size), self.order.samples(start, size), strict=True))
            micro_step += 1
            if micro_step == self.layout.gradient_accumulation_steps:
                position, micro_step = position + self.layout.global_batch_size, 0


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Run a block and put Python's, NumPy's and torch's CPU generator back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_rng(key: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generator from one 64-bit key; no device is touched."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


def worker_generator(seed: int, position: int) -> torch.Generator:
    """The private generator that the data loader draws its workers' base seed from."""
    return torch.Generator().manual_seed(derive_key(_WORKERS, seed, position))


@dataclass(frozen=True)
class LabelledFetch:
    """The dataset as the data loader sees it: a micro-batch is fetched, collated and labelled in one go.

    Runs in a worker, or in the main process without workers; either way the global generators hold keys of
    (seed, position) meanwhile, and are put back afterwards.
    """

    dataset: MapDataset
    collate_fn: Callable[[list[Any]], Any]
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: list[PositionedSample]) -> LabelledBatch:
        with preserved_rng():
            items = []
            for position, sample in batch:
                seed_rng(derive_key(_SAMPLE, self.seed, position))
                items.append(self.dataset[sample])
            seed_rng(derive_key(_COLLATE, self.seed, batch[0][0]))
            return [sample for _, sample in batch], self.collate_fn(items)

    def pinned(self, size: int) -> Any:
        """Samples 0..size-1 in their own order, collated, under a fixed key."""
        with preserved_rng():
            seed_rng(derive_key(_PINNED))
            return self.collate_fn([self.dataset[sample] for sample in range(size)])


def keep_batch(batch: LabelledBatch) -> LabelledBatch:
    """The data loader's collate_fn; LabelledFetch has collated already."""
    return batch


def check_delivery(order: ShuffledOrder, layout: BatchLayout, position: int, micro_step: int, got: list[int]) -> None:
    """Raise ResumeRefused unless `got` are the sample ids of this micro step of the step at `position`."""
    start = layout.start(position, micro_step)
    expected = order.samples(start, layout.micro_batch_size)
    if got == expected:
        return
    reach = 4 * layout.global_batch_size
    first = max(0, start - reach)
    near = order.samples(first, start - first + reach + len(got))
    offsets = [first + i - start for i in range(len(near)) if near[i : i + len(got)] == got]
    if offsets:
        offset = min(offsets, key=abs)
        finding = f"the loader is {abs(offset)} samples off, {'ahead' if offset > 0 else 'behind'}"
    else:
        finding = f"these ids are nowhere within {reach} samples of the position"
    raise ResumeRefused(
        f"rank {layout.rank}, position {position}, micro step {micro_step}: expected sample ids {expected}, "
        f"got {got}; {finding}. The batch was not handed out; seek() to the position and call iter() again"
    )
