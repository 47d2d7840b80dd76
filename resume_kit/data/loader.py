"""The data loader that a training run resumes: position in samples, every delivery checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import IterableDataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from resume_kit.data.delivery import (
    BatchLayout,
    EndlessBatchSampler,
    LabelledBatch,
    LabelledFetch,
    MapDataset,
    check_delivery,
    keep_batch,
    worker_generator,
)
from resume_kit.data.permutation import ShuffledOrder
from resume_kit.data.workers import leave_signals_to_the_rank
from resume_kit.errors import ResumeRefused, UsageError

Batch = dict[str, Any]


class ResumableLoader:
    """Endless micro-batches of one rank, in a global order that no number of ranks or workers changes.

    The optimizer step at position p consumes the global positions [p, p + global_batch_size); micro step m
    of rank r takes p + m * (micro_batch_size * world_size) + r * micro_batch_size + [0, micro_batch_size).
    Any position >= 0 can be sought; epochs may end inside a batch.

    Randomness. Making an iterator and fetching draw nothing from the global generators of Python, NumPy and
    torch's CPU. A dataset or collate_fn that uses those generators is reproducible: they are seeded for each
    sample from (seed, global position), and for each collate_fn call from the batch's first position, with
    or without workers, and put back afterwards. So augmentation of a sample is the same after a seek, and
    for another number of workers or ranks (collate_fn draws: for the same micro-batches). NOT reproducible
    across a seek: generators that the dataset owns itself, other state it changes between items, draws in
    its lazy set-up from `get_worker_info().seed` (that depends on where the iterator began and on the number
    of workers), device generators, and anything read from the clock or the operating system.

    Workers are forked when `iter()` is called and stopped by the next `iter()`, `seek()` or `close()`; when
    the trainer is killed, they notice within seconds and exit.

    before_first_fetch: called right before the first `next()` after construction and after each `seek`;
    while it raises, nothing is delivered and the next `next()` calls it again.

    Raises UsageError for sizes below 1, a rank outside the world, an iterable-style or empty dataset, a
    prefetch_factor without workers, and a seed outside [0, 2**64).
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        layout = BatchLayout(micro_batch_size, gradient_accumulation_steps, rank, world_size)
        if num_workers < 0:
            raise UsageError(f"num_workers is {num_workers}; give at least 0")
        if prefetch_factor is not None and (num_workers == 0 or prefetch_factor < 1):
            raise UsageError(f"prefetch_factor is {prefetch_factor}; give at least 1, and num_workers > 0")
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise UsageError(
                f"{type(dataset).__name__} is not a map-style dataset; resuming at a position needs "
                "__len__ and __getitem__"
            )
        self.order = ShuffledOrder(len(dataset), seed=seed)
        self.num_workers = num_workers
        self.before_first_fetch: Callable[[], None] | None = None
        self._prefetch_factor = prefetch_factor
        self._layout = layout
        self._fetch = LabelledFetch(dataset, collate_fn or default_collate, seed)
        self._given_fingerprint = fingerprint
        self._position = 0
        self._micro_step = 0
        self._first_fetch_due = True
        self._generation = 0
        self._moved_in_generation = 0
        self._source: Any = None

    @property
    def position(self) -> int:
        """Samples consumed by all ranks: whole global batches delivered by `next()`, prefetch not counted."""
        return self._position

    @property
    def micro_step(self) -> int:
        """Micro-batches of the optimizer step at `position` that are delivered already."""
        return self._micro_step

    @property
    def global_batch_size(self) -> int:
        return self._layout.global_batch_size

    def seek(self, position: int) -> None:
        """Go to a global sample position; live iterators turn stale. Raises UsageError when it is < 0."""
        if position < 0:
            raise UsageError(f"cannot seek to position {position}; a position is a count of samples, >= 0")
        self.close()
        self._moved_in_generation = self._generation
        self._position, self._micro_step, self._first_fetch_due = position, 0, True

    def close(self) -> None:
        """Stop the workers; live iterators turn stale. A later `iter()` goes on from the same place."""
        self._generation += 1
        source, self._source = self._source, None
        if hasattr(source, "_shutdown_workers"):
            source._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        loader = StatefulDataLoader(
            self._fetch,
            batch_sampler=EndlessBatchSampler(self.order, self._layout, self._position, self._micro_step),
            collate_fn=keep_batch,
            num_workers=self.num_workers,
            prefetch_factor=self._prefetch_factor,
            worker_init_fn=leave_signals_to_the_rank,
            generator=worker_generator(self.order.seed, self._position),
        )
        self._source = iter(loader)
        return _MicroBatches(self, self._generation)

    def sample_ids(self, position: int | None = None) -> list[int]:
        """Ids of the global batch that starts at `position` (default: the current one), in global order."""
        return self.order.samples(self._position if position is None else position, self.global_batch_size)

    def batch_digest(self, position: int | None = None) -> str:
        """xxh3_64 hex of `sample_ids(position)` as little-endian int64; moves nothing."""
        return xxhash.xxh3_64_hexdigest(np.asarray(self.sample_ids(position), dtype="<i8").tobytes())

    def fingerprint(self) -> dict[str, Any]:
        """What the data and its order are: the dataset's (or the given) fingerprint, seed and num_samples.

        Raises UsageError when the dataset has no `fingerprint()` and none was given.
        """
        own = getattr(self._fetch.dataset, "fingerprint", None)
        if self._given_fingerprint is None and own is None:
            raise UsageError(
                f"{type(self._fetch.dataset).__name__} has no fingerprint(), so a resume could not tell "
                "whether the data changed. Add that method, or give ResumableLoader(fingerprint={...})"
            )
        data = own() if self._given_fingerprint is None and own is not None else self._given_fingerprint
        return {**(data or {}), "seed": self.order.seed, "num_samples": self.order.num_samples}

    def pinned_batch(self, size: int) -> Batch:
        """Samples 0..size-1, collated in this process: the same input for ever, wherever the loader stands.

        Raises UsageError unless 1 <= size <= number of samples.
        """
        if not 1 <= size <= self.order.num_samples:
            raise UsageError(f"pinned_batch of {size}; the dataset has {self.order.num_samples} samples")
        batch: Batch = self._fetch.pinned(size)
        return batch

    def _next(self, generation: int) -> Batch:
        if generation < self._moved_in_generation:
            raise ResumeRefused(
                "iterator was created before the position moved; call iter() again "
                f"(rank {self._layout.rank}, position {self._position})"
            )
        if generation != self._generation:
            raise ResumeRefused("iterator was replaced by a later iter() or closed; call iter() again")
        if self._first_fetch_due and self.before_first_fetch is not None:
            self.before_first_fetch()
        self._first_fetch_due = False
        try:
            delivered: LabelledBatch = next(self._source)
        except StopIteration as error:
            raise ResumeRefused(
                f"rank {self._layout.rank}, position {self._position}: the endless data loader stopped; the "
                "dataset's __getitem__ must not raise StopIteration"
            ) from error
        ids, batch = delivered
        check_delivery(self.order, self._layout, self._position, self._micro_step, ids)
        self._micro_step += 1
        if self._micro_step == self._layout.gradient_accumulation_steps:
            self._position, self._micro_step = self._position + self.global_batch_size, 0
        return batch  # type: ignore[no-any-return]


class _MicroBatches(Iterator[Batch]):
    def __init__(self, loader: ResumableLoader, generation: int) -> None:
        self._loader = loader
        self._generation = generation

    def __next__(self) -> Batch:
        return self._loader._next(self._generation)
