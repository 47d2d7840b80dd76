"""A rank on the second GPU leaves the first one alone, in all of its threads. Skipped without two GPUs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.blocks import BLOCK_BYTES, digest_image
from resume_kit.checkpoint.carrying import carry_out
from resume_kit.checkpoint.readplan import Source, plan_reads
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.engines import rng
from resume_kit.engines.fingerprint import as_unsigned, fingerprints
from resume_kit.resuming.device_windows import live_destination
from resume_kit.saving.arena import Arena
from resume_kit.saving.saver import _warm_up, side_stream
from resume_kit.saving.staging import Staging, on_stream

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER, SIZE = b"h" * 4096, 40 << 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_saving_and_reading_on_the_second_gpu_make_no_context_on_the_first(tmp_path: Path) -> None:
    code = f"from tests.saving.test_other_gpu import as_rank_1; as_rank_1({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def as_rank_1(folder: str) -> None:
    """In a process of its own, which has touched no GPU: asserts after each part, so that a failure names it."""
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    data = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device=device)
    content = HEADER + data.cpu().numpy().tobytes()
    _require_no_context("the data")

    _in_a_thread(lambda: _warm_up(device))
    _require_no_context("the warm-up")

    rng.restore(rng.capture({}), {})
    rng.derived("cuda:0", 7)
    rng.seed_all(3)
    _require_no_context("the generators")

    arena, side = Arena(device), side_stream(device)
    assert side is not None
    arena.memory(1)
    memory = arena.memory(len(content))  # gives the first back, in another thread
    assert memory.is_pinned(), arena.note
    _require_no_context("the arena")

    staging = Staging([(len(HEADER), data)], len(content), memory, side, 60.0)
    side.wait_stream(torch.cuda.current_stream())
    staging.start()
    staging.start_rest()

    def stage() -> None:
        with on_stream(side):
            image = b"".join(bytes(block.memory) for block in staging.blocks(HEADER))
            assert image == content
            assert as_unsigned(fingerprints([(data, data.shape, Box.whole(data.shape))])) == expected

    expected = as_unsigned(fingerprints([(data.cpu(), data.shape, Box.whole(data.shape))]))
    _in_a_thread(stage)
    staging.copied_on_device()
    _require_no_context("the staging")

    (Path(folder) / "data").write_bytes(content)
    transfers = (Transfer(len(HEADER), 0, 0, SIZE),)
    plan = plan_reads([Source("data", digest_image(memoryview(content), BLOCK_BYTES), len(content), transfers)])
    before = data.clone()
    carry_out(plan, Path(folder), live_destination([data.zero_()]), readers=3)
    assert torch.equal(data, before)
    _require_no_context("the reading")

    arena.close()
    torch.cuda.synchronize(device)
    _require_no_context("the end")
    torch.zeros(1, device="cuda:0")
    assert torch._C._cuda_hasPrimaryContext(0)  # which the check would have seen


def _require_no_context(after: str) -> None:
    assert not torch._C._cuda_hasPrimaryContext(0), f"there is a context on the first GPU after {after}"


def _in_a_thread(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
