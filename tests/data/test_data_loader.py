from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from resume_kit.data import ResumableLoader, TokenDataset
from resume_kit.data.delivery import EndlessBatchSampler
from resume_kit.errors import ResumeRefused, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
Loaders = Callable[..., ResumableLoader]


class Numbers:
    """Item i is {"x": i}; with `noisy`, it also draws from every global generator."""

    def __init__(self, size: int, *, noisy: bool = False) -> None:
        self.size, self.noisy = size, noisy

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"x": index}
        if self.noisy:
            item["noise"] = torch.rand(2, dtype=torch.float64) + np.random.rand() + random.random()
        return item


@pytest.fixture
def loaders() -> Iterator[Loaders]:
    made: list[ResumableLoader] = []

    def make(dataset: Any = None, **arguments: Any) -> ResumableLoader:
        defaults = {"micro_batch_size": 3, "rank": 0, "world_size": 1, "seed": 5}
        loader = ResumableLoader(Numbers(50) if dataset is None else dataset, **{**defaults, **arguments})
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


def take(loader: ResumableLoader, count: int) -> list[list[int]]:
    return [batch["x"].tolist() for batch in islice(loader, count)]


def rng_digest() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_order_is_the_same_for_every_world_size(loaders: Loaders, world: int, accumulation: int) -> None:
    ranks = [
        loaders(micro_batch_size=2, gradient_accumulation_steps=accumulation, rank=rank, world_size=world)
        for rank in range(world)
    ]
    micro_steps = 30
    slices = [take(loader, micro_steps) for loader in ranks]
    delivered = [sample for step in zip(*slices, strict=True) for batch in step for sample in batch]
    assert delivered == ranks[0].order.samples(0, len(delivered))
    assert {loader.position for loader in ranks} == {micro_steps // accumulation * 2 * accumulation * world}


def test_every_sample_once_per_epoch(loaders: Loaders) -> None:
    delivered = [sample for batch in take(loaders(Numbers(48)), 48) for sample in batch]
    for epoch in range(3):
        assert sorted(delivered[epoch * 48 : epoch * 48 + 48]) == list(range(48))


@settings(max_examples=30, deadline=None)
@given(
    position=st.integers(0, 400),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 3),
)
def test_any_position_can_be_entered(position: int, micro: int, accumulation: int, world: int) -> None:
    """Odd positions too: multiples of nothing, batches across epoch ends."""
    loader = ResumableLoader(
        Numbers(17),
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        rank=world - 1,
        world_size=world,
        seed=9,
    )
    loader.seek(position)
    batches = iter(loader)
    for step in range(3):
        assert loader.position == position + step * loader.global_batch_size
        for micro_step in range(accumulation):
            assert loader.micro_step == micro_step
            start = loader.position + micro_step * micro * world + (world - 1) * micro
            assert next(batches)["x"].tolist() == loader.order.samples(start, micro)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (0, 2), (2, 1)])
def test_resume_gives_the_same_remaining_batches(loaders: Loaders, before: int, after: int) -> None:
    """Augmentation included, and whatever the number of workers was."""
    data = Numbers(50, noisy=True)
    whole = list(islice(loaders(data, num_workers=before), 12))
    for steps in (1, 5):
        resumed = loaders(data, num_workers=after)
        resumed.seek(steps * 3)
        for expected, got in zip(whole[steps:], islice(resumed, 12 - steps), strict=True):
            assert torch.equal(expected["x"], got["x"])
            assert torch.equal(expected["noise"], got["noise"])


def test_augmentation_differs_by_position_and_seed(loaders: Loaders) -> None:
    data = Numbers(1, noisy=True)
    batches = [*islice(loaders(data, seed=1), 4), *islice(loaders(data, seed=2), 4)]
    assert len({float(value) for batch in batches for value in batch["noise"][:, 0]}) == 24


def test_augmentation_does_not_depend_on_the_world_size(loaders: Loaders) -> None:
    data = Numbers(50, noisy=True)
    alone = next(iter(loaders(data, micro_batch_size=4)))["noise"]
    pair = [loaders(data, micro_batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(alone, torch.cat([next(iter(loader))["noise"] for loader in pair]))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_drawn_from_global_generators(loaders: Loaders, workers: int) -> None:
    before = rng_digest()
    loader = loaders(Numbers(50, noisy=True), num_workers=workers)
    batches = iter(loader)
    assert rng_digest() == before
    next(batches)
    loader.pinned_batch(2)
    loader.seek(7)
    next(iter(loader))
    loader.close()
    assert rng_digest() == before


def test_the_rng_digest_would_notice() -> None:
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        before = rng_digest()
        draw()
        assert rng_digest() != before


def test_prefetched_batches_do_not_count(loaders: Loaders) -> None:
    loader = loaders(gradient_accumulation_steps=2, num_workers=2, prefetch_factor=4)
    batches = iter(loader)
    time.sleep(0.3)
    assert (loader.position, loader.micro_step) == (0, 0)
    next(batches)
    assert (loader.position, loader.micro_step) == (0, 1)
    next(batches)
    assert (loader.position, loader.micro_step) == (6, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_iterator_from_before_a_seek_is_refused(loaders: Loaders, workers: int) -> None:
    loader = loaders(num_workers=workers)
    stale = iter(loader)
    next(stale)
    loader.seek(3)
    with pytest.raises(ResumeRefused, match="created before the position moved; call iter"):
        next(stale)
    assert loader.position == 3
    assert next(iter(loader))["x"].tolist() == loader.order.samples(3, 3)
    with pytest.raises(ResumeRefused, match="before the position moved"):
        next(stale)


def test_second_iter_replaces_the_first_and_its_workers(loaders: Loaders) -> None:
    loader = loaders(num_workers=2, gradient_accumulation_steps=2)
    first = iter(loader)
    got = next(first)["x"].tolist()
    workers = loader._source._workers
    second = iter(loader)
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(ResumeRefused, match="replaced by a later iter"):
        next(first)
    assert got + next(second)["x"].tolist() == loader.sample_ids(0)
    workers = loader._source._workers
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(ResumeRefused, match="closed"):
        next(second)
    assert take(loader, 1)[0] == loader.order.samples(6, 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("slip", "words"), [(1, "1 samples off, ahead"), (-2, "2 samples off, behind")])
def test_wrong_delivery_is_refused(
    loaders: Loaders, monkeypatch: pytest.MonkeyPatch, slip: int, words: str, workers: int
) -> None:
    original = EndlessBatchSampler.__iter__

    def slipped(self: EndlessBatchSampler) -> Any:
        moved = EndlessBatchSampler(self.order, self.layout, self.position + slip, self.micro_step)
        return original(moved)

    monkeypatch.setattr(EndlessBatchSampler, "__iter__", slipped)
    loader = loaders(rank=1, world_size=2, num_workers=workers)
    loader.seek(12)
    with pytest.raises(ResumeRefused, match=words) as caught:
        next(iter(loader))
    text = str(caught.value)
    assert "rank 1, position 12" in text
    assert str(loader.order.samples(15, 3)) in text
    assert str(loader.order.samples(15 + slip, 3)) in text
    assert loader.position == 12
    assert loader.micro_step == 0


def test_swallowed_batch_is_refused(loaders: Loaders) -> None:
    loader = loaders(num_workers=2)
    batches = iter(loader)
    next(batches)
    next(loader._source)
    with pytest.raises(ResumeRefused, match="3 samples off, ahead"):
        next(batches)


def test_unknown_ids_are_refused(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndlessBatchSampler, "__iter__", lambda self: iter([[(0, 4), (1, 4), (2, 4)]]))
    with pytest.raises(ResumeRefused, match="nowhere within 12 samples"):
        next(iter(loaders()))


def test_a_loader_that_stops_is_refused(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndlessBatchSampler, "__iter__", lambda self: iter(()))
    with pytest.raises(ResumeRefused, match="endless data loader stopped"):
        next(iter(loaders()))


def test_before_first_fetch_runs_once_per_seek(loaders: Loaders) -> None:
    calls: list[int] = []
    loader = loaders()
    loader.before_first_fetch = lambda: calls.append(loader.position)
    take(loader, 2)
    take(loader, 1)
    assert calls == [0]
    loader.seek(30)
    batches = iter(loader)
    assert calls == [0]
    next(batches)
    assert calls == [0, 30]


def test_before_first_fetch_can_refuse(loaders: Loaders) -> None:
    def refuse() -> None:
        raise ResumeRefused("no")

    loader = loaders()
    loader.before_first_fetch = refuse
    batches = iter(loader)
    for _ in range(2):
        with pytest.raises(ResumeRefused, match="no"):
            next(batches)
    assert (loader.position, loader.micro_step) == (0, 0)
    loader.before_first_fetch = None
    assert next(batches)["x"].tolist() == loader.order.samples(0, 3)


def test_batch_digest_is_pure_and_tells_positions_and_seeds_apart(loaders: Loaders) -> None:
    loader = loaders()
    digests = {loader.batch_digest(position) for position in range(40)}
    assert len(digests) == 40
    assert loader.batch_digest() == loader.batch_digest(0) != loaders(seed=6).batch_digest(0)
    assert loaders(rank=2, world_size=3, micro_batch_size=1).batch_digest(8) == loader.batch_digest(8)
    assert loader.position == 0
    loader.seek(7)
    assert loader.sample_ids() == loader.sample_ids(7) == loader.order.samples(7, 3)


def test_pinned_batch_is_always_the_same(loaders: Loaders) -> None:
    loader = loaders(Numbers(50, noisy=True))
    first = loader.pinned_batch(4)
    take(loader, 3)
    torch.manual_seed(99)
    again, elsewhere = loader.pinned_batch(4), loaders(Numbers(50, noisy=True), seed=77).pinned_batch(4)
    assert first["x"].tolist() == [0, 1, 2, 3]
    assert torch.equal(first["noise"], again["noise"])
    assert torch.equal(first["noise"], elsewhere["noise"])
    assert loader.position == 9
    for size in (0, 51):
        with pytest.raises(UsageError, match="pinned_batch"):
            loader.pinned_batch(size)


def test_fingerprint(loaders: Loaders) -> None:
    tokens = np.arange(200, dtype=np.uint8)

    def of(content: np.ndarray, length: int, seed: int) -> dict[str, Any]:
        data = TokenDataset(content, sequence_length=length, tokenizer="bytes")
        return loaders(data, seed=seed).fingerprint()

    base = of(tokens, 10, 1)
    assert base["num_samples"] == 20
    assert base == of(tokens.copy(), 10, 1)
    changed = tokens.copy()
    changed[3] += 1
    assert base != of(changed, 10, 1)
    assert base != of(tokens, 20, 1)
    assert base != of(tokens, 10, 2)
    given = loaders(fingerprint={"content": "v1"}).fingerprint()
    assert given == {"content": "v1", "seed": 5, "num_samples": 50}
    with pytest.raises(UsageError, match="Numbers has no fingerprint"):
        loaders().fingerprint()


def test_token_batches_and_own_collate(loaders: Loaders) -> None:
    data = TokenDataset(np.arange(200, dtype=np.uint8), sequence_length=10, tokenizer="bytes")
    batch = next(iter(loaders(data, num_workers=1)))
    assert sorted(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].shape == (3, 10)
    own = next(iter(loaders(collate_fn=lambda items: {"sum": sum(item["x"] for item in items)})))
    assert own == {"sum": sum(loaders().sample_ids(0))}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside"),
        ({"rank": -1}, "rank -1 is outside"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"prefetch_factor": 2}, "num_workers > 0"),
        ({"prefetch_factor": 0, "num_workers": 1}, "at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"dataset": Numbers(0)}, "num_samples is 0"),
        ({"dataset": Stream()}, "not a map-style"),
        ({"dataset": iter(())}, "not a map-style"),
    ],
)
def test_bad_arguments(loaders: Loaders, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        loaders(**arguments)


def test_bad_seek_moves_nothing(loaders: Loaders) -> None:
    loader = loaders()
    batches = iter(loader)
    with pytest.raises(UsageError, match="cannot seek to position -1"):
        loader.seek(-1)
    assert next(batches)["x"].tolist() == loader.order.samples(0, 3)


def test_killed_trainer_leaves_no_workers(tmp_path: Path) -> None:
    script = (
        "import time, numpy as np\n"
        "from resume_kit.data import ResumableLoader, TokenDataset\n"
        "data = TokenDataset(np.zeros(100, np.uint8), sequence_length=2, tokenizer='bytes')\n"
        "loader = ResumableLoader(data, micro_batch_size=2, rank=0, world_size=1, seed=0, num_workers=2)\n"
        "next(iter(loader))\n"
        "print(*[worker.pid for worker in loader._source._workers], flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(word) for word in trainer.stdout.readline().split()]
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
