"""What the training entries share: what they make of an error, and of determinism."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

from launch import entry, train_megatron, train_zero3
from launch.config import TrainConfig, build
from launch.megatron_config import MegatronConfig
from resume_kit.errors import CheckpointDamaged, Fenced, GivenUp, ResumeKitError, ResumeRefused, RunTaken, UsageError
from resume_kit.run import last_words
from resume_kit.run.stopping import Preempted


def ends(error: BaseException | None) -> int:
    def train(_config: object) -> None:
        if error is not None:
            raise error

    return entry.run(lambda: None, lambda _config: None, train)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ResumeRefused("no"), 1),
        (CheckpointDamaged("torn"), 1),
        (UsageError("what?"), 2),
        (Fenced("attempt 3 took over"), 76),
        (RunTaken("attempt 2 is alive"), 76),
        (GivenUp("three times at step 5"), 78),
    ],
)
def test_every_error_has_its_exit_code(
    error: ResumeKitError | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: list[BaseException | str] = []
    monkeypatch.setattr(last_words, "record", recorded.append)
    assert ends(error) == code
    assert recorded == ([] if error is None else [error])
    assert ("ERROR: " in capsys.readouterr().err) == (error is not None)


def test_a_run_that_is_to_stop_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as stop:
        ends(Preempted(7, "SIGTERM"))
    assert stop.value.code == 75


KINDS: dict[str, tuple[Any, type[Any]]] = {
    "zero3": (train_zero3, TrainConfig),
    "megatron": (train_megatron, MegatronConfig),
}
SET = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_runs_on_gpus_sum_in_a_fixed_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training, config_kind = KINDS[kind]
    monkeypatch.setattr(train_zero3, "uses_cuda", lambda: True)
    monkeypatch.setattr(training, "adopt_slurm", lambda _environment: None)
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_args, **_options: None)

    def environment(deterministic: bool, given: dict[str, str]) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", dict(given))
        training.prepare_environment(build(config_kind, {"run": {"deterministic": deterministic}}))
        return {name: os.environ[name] for name in SET if name in os.environ}

    assert environment(True, {}) == SET
    assert environment(True, {"NCCL_NVLS_ENABLE": "1"}) == {**SET, "NCCL_NVLS_ENABLE": "1"}
    assert environment(False, {}) == {}
