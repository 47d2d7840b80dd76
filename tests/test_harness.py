from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Ranks
from tests.rank_server import PRELOAD
from tests.ranks import ROOT, ForkServer, RankFailure, RankTimeout, free_port


def nothing(rank: int, world_size: int) -> None:
    pass


def arguments(rank: int, world_size: int, text: str, values: list[int]) -> dict[str, Any]:
    time.sleep(0.1 * (world_size - rank))
    return {"rank": rank, "world_size": world_size, "text": text, "values": values}


def surroundings(rank: int, world_size: int) -> dict[str, Any]:
    import torch

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OWN")
    return {
        "environment": {name: os.environ.get(name) for name in (*names, "DS_ACCELERATOR", "OMP_NUM_THREADS")},
        "threads": torch.get_num_threads(),
        "missing": [name for name in PRELOAD if name not in sys.modules],
        "numpy": int(np.random.randint(2**31)),
        "daemonic": multiprocessing.current_process().daemon,
        "folder": os.getcwd(),
    }


def all_reduce(rank: int, world_size: int) -> list[float]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.full((3,), float(rank + 1))
    dist.all_reduce(value)
    dist.destroy_process_group()
    return value.tolist()


def one_raises(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        print("about to fail", flush=True)
        raise FileNotFoundError("no shard on this shelf")
    time.sleep(600)


def all_raise(rank: int, world_size: int) -> None:
    time.sleep(0.2 * rank)
    raise ValueError(f"rank {rank} says no")


def hang_in_a_named_function(rank: int, world_size: int, culprit: int) -> int:
    if rank == culprit:
        threading.Event().wait()
    return rank


def leave_early(rank: int, world_size: int) -> None:
    os._exit(7 if rank == 0 else 0)


def tick(rank: int, world_size: int) -> None:
    for step in range(6000):
        print(f"step {step}", flush=True)
        time.sleep(0.1)


def square(value: int) -> int:
    return value * value


def with_workers(rank: int, world_size: int) -> list[int]:
    import torch
    from torch.utils.data import DataLoader

    with multiprocessing.get_context("fork").Pool(2) as pool:
        squares = pool.map(square, [rank, 3])
    loader: DataLoader[Any] = DataLoader(torch.arange(4), batch_size=2, num_workers=1)
    return squares + [int(batch.sum()) for batch in loader]


def leave_a_helper_behind(rank: int, world_size: int) -> int:
    helper = subprocess.Popen(["sleep", "600"])
    print(f"helper {helper.pid} helper", flush=True)
    time.sleep(600)
    return helper.pid


def write_late(path: str) -> None:
    time.sleep(0.3)
    Path(path).write_text("written")


def finish_late(rank: int, world_size: int, path: str) -> None:
    threading.Thread(target=write_late, args=(path,)).start()


def unpicklable(rank: int, world_size: int) -> Any:
    return lambda: None


def warn_as_the_kit(rank: int, world_size: int, module: str) -> None:
    warnings.warn_explicit("careful", UserWarning, "kit.py", 1, module=module)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids: tuple[int, ...], limit: float = 10.0) -> bool:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if all(_is_gone(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_warm_group_starts_fast(ranks: Ranks) -> None:
    ranks.run(nothing, 2)
    start = time.monotonic()
    ranks.run(nothing, 2)
    took = time.monotonic() - start
    print(f"two ranks, start to end: {took:.3f} s")
    assert took < 3.0


def test_values_come_in_rank_order(ranks: Ranks) -> None:
    values = ranks.run(arguments, 3, "text", [1, 2])
    assert values == [{"rank": r, "world_size": 3, "text": "text", "values": [1, 2]} for r in range(3)]


def test_surroundings_of_a_rank(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = ranks.run(surroundings, 2, env={"OWN": "value"})
    port = found[0]["environment"]["MASTER_PORT"]
    for rank, each in enumerate(found):
        assert each["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "OWN": "value",
        }
        assert each["threads"] == 1
        assert each["missing"] == []
        assert each["daemonic"] is False
        assert each["folder"] == str(tmp_path)
    assert found[0]["numpy"] != found[1]["numpy"], "ranks start from different NumPy states, like real processes"


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo_all_reduce(ranks: Ranks, world_size: int) -> None:
    total = float(sum(range(1, world_size + 1)))
    assert ranks.run(all_reduce, world_size) == [[total] * 3] * world_size


def test_data_workers_inside_a_rank(ranks: Ranks) -> None:
    assert ranks.run(with_workers, 2) == [[0, 9, 1, 5], [1, 9, 1, 5]]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_raising_rank_is_reported_and_the_other_is_stopped(ranks: Ranks, culprit: int) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="no shard on this shelf") as caught:
        ranks.run(one_raises, 2, culprit, grace=0.5)
    assert time.monotonic() - start < 10
    failure = caught.value
    assert list(failure.failed) == [culprit]
    assert failure.error_types == {culprit: "FileNotFoundError"}
    assert failure.exit_codes[culprit] == 1
    assert failure.exit_codes[1 - culprit] == -signal.SIGKILL
    assert f"rank {culprit} of 2 failed" in str(failure)
    assert "in one_raises" in failure.outcomes[culprit].traceback
    assert "about to fail" in str(failure)
    assert "stopped by the harness" in str(failure)


def test_within_the_grace_every_rank_tells_its_own_error(ranks: Ranks) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(all_raise, 2)
    assert [outcome.error for outcome in caught.value.outcomes] == ["rank 0 says no", "rank 1 says no"]
    assert caught.value.exit_codes == [1, 1]


def test_a_hung_rank_is_named_with_the_place_where_it_hangs(ranks: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(RankTimeout, match="rank 1 of 2 still running after 1 s") as caught:
        ranks.run(hang_in_a_named_function, 2, 1, timeout=1)
    assert time.monotonic() - start < 10
    assert caught.value.hung == [1]
    assert "in hang_in_a_named_function" in caught.value.outcomes[1].stacks
    assert "in hang_in_a_named_function" in str(caught.value)
    assert caught.value.outcomes[0].good


def test_an_exit_without_a_value_is_a_failure_whatever_its_code(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="without a result") as caught:
        ranks.run(leave_early, 2)
    assert caught.value.exit_codes == [7, 0]
    assert sorted(caught.value.failed) == [0, 1]


def test_a_value_that_cannot_travel_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="unpicklable"):
        ranks.run(unpicklable, 1)


def test_a_function_without_a_name_is_refused_at_once(ranks: Ranks) -> None:
    with pytest.raises((AttributeError, TypeError)):
        ranks.run(lambda rank, world_size: rank, 1)


def test_sigkill_of_one_rank_is_seen(ranks: Ranks) -> None:
    group = ranks.start(tick, 2)
    group.wait_for("step 2", rank=1)
    assert group.alive() == [0, 1]
    group.kill(1)
    while 1 in group.alive():
        time.sleep(0.01)
    assert group.alive() == [0], "a killed rank takes no other with it"
    group.kill()
    assert group.wait(timeout=10) == [-signal.SIGKILL, -signal.SIGKILL]
    assert "step 2" in group.log(1)
    with pytest.raises(RankFailure, match="killed by SIGKILL"):
        group.results()


def test_sigterm_can_be_sent(ranks: Ranks) -> None:
    group = ranks.start(tick, 1)
    group.wait_for("step 0")
    group.kill(0, signal.SIGTERM)
    assert group.wait(timeout=10) == [-signal.SIGTERM]


def test_waiting_for_a_line_that_never_comes_ends_with_the_rank(ranks: Ranks) -> None:
    group = ranks.start(nothing, 1)
    with pytest.raises(RankFailure, match="ended without printing 'hello'"):
        group.wait_for("hello")


def test_what_a_killed_rank_left_running_dies_too(ranks: Ranks) -> None:
    group = ranks.start(leave_a_helper_behind, 1)
    group.wait_for(" helper\n")
    helper = int(group.log(0).split()[1])
    group.kill()
    group.wait(timeout=10)
    assert wait_until_gone((helper,))


def test_a_rank_ends_like_an_interpreter_and_waits_for_its_threads(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(finish_late, 1, str(tmp_path / "late"))
    assert (tmp_path / "late").read_text() == "written"


def test_warnings_of_the_kit_are_errors_in_ranks_too(ranks: Ranks) -> None:
    ranks.run(warn_as_the_kit, 1, "somebody.else")
    with pytest.raises(RankFailure, match="raised UserWarning: careful"):
        ranks.run(warn_as_the_kit, 1, "resume_kit.run.kit")


@pytest.mark.slow
def test_ranks_die_with_the_process_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed owner removes nothing
    script = (
        "import time; from tests.ranks import start_ranks; from tests.test_harness import tick\n"
        "group = start_ranks(tick, 2); group.wait_for('step 0', rank=1)\n"
        "print(*group.pids, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = tuple(int(pid) for pid in owner.stdout.readline().split())
        assert len(pids) == 2
        owner.kill()
    assert wait_until_gone(pids)


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("tests.ranks.ROOT", Path("/"))
    with pytest.raises(RuntimeError, match="No module named"):
        ForkServer().warm_up()


def test_ports_are_free_and_never_given_twice() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
