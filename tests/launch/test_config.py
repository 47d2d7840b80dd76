"""The configuration file: what is misspelt or of another type is said, with the nearest valid key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launch.config import DataConfig, RunConfig, TrainConfig, load, parse_arguments
from resume_kit.errors import UsageError
from tests.ranks import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*zero3*.yaml"))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    return path


def from_text(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load(path, overrides)


def test_there_are_configurations_to_load() -> None:
    assert {"zero3_tiny.yaml", "demo_zero3.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_that_ships_loads(path: Path) -> None:
    config = load(path)
    assert config.run.steps > 0 and config.run.save_every > 0 and config.run.dir.startswith("runs/")
    assert config.model["type"] in ("gpt2", "llama")
    assert config.deepspeed["zero_optimization"]["stage"] == 3
    assert isinstance(config.deepspeed["optimizer"]["params"]["lr"], float)


def test_an_empty_file_gives_the_defaults(empty: Path) -> None:
    assert load(empty) == TrainConfig() == TrainConfig(run=RunConfig(), data=DataConfig())


def test_values_are_taken_from_the_file(tmp_path: Path) -> None:
    config = from_text(
        tmp_path, "run: {steps: 7, timeout: 5, keep_every: null}\ndata: {path: x.txt}\npolicy: {gate: false}\nseed: 3"
    )
    assert config.run.steps == 7 and config.run.timeout == 5.0 and isinstance(config.run.timeout, float)
    assert config.run.keep_every is None and config.data.path == "x.txt" and config.seed == 3
    assert config.policy == {"gate": False} and config.run.save_every == RunConfig().save_every


# -- unknown keys


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("sed: 1", "sed", "seed"),
        ("Model: {}", "Model", "model"),
        ("micro_batchsize: 1", "micro_batchsize", "micro_batch_size"),
        ("run: {step: 1}", "run.step", "run.steps"),
        ("run: {saveevery: 1}", "run.saveevery", "run.save_every"),
        ("run: {keep-last: 1}", "run.keep-last", "run.keep_last"),
        ("data: {seq_length: 1}", "data.seq_length", "data.sequence_length"),
        ("data: {workers: 1}", "data.workers", "data.num_workers"),
    ],
)
def test_an_unknown_key_anywhere_suggests_the_nearest(text: str, key: str, near: str, tmp_path: Path) -> None:
    expected = re.escape(f"unknown configuration key '{key}'; did you mean '{near}'?")
    with pytest.raises(UsageError, match=expected):
        from_text(tmp_path, text)


@pytest.mark.parametrize("key", ["7", "null", "true", "''", "zzz", "[1, 2]"])
def test_a_key_like_nothing_is_a_usage_error_all_the_same(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        from_text(tmp_path, f"? {key}\n: 1")


@pytest.mark.parametrize(("text", "near"), [("policy: {tolerence: exact}", "tolerance"), ("policy: {9: 1}", "")])
def test_an_unknown_key_of_the_policy_is_told_at_the_start(text: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"policy has no field .*did you mean '{near}"):
        from_text(tmp_path, text)


def test_a_bad_value_of_the_policy_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"policy\.replay is 'ignore'; choose one of stop, warn"):
        from_text(tmp_path, "policy: {replay: ignore}")


def test_what_goes_on_to_others_is_not_judged(tmp_path: Path) -> None:
    config = from_text(tmp_path, "model: {anything: [1, {x: 2}]}\ndeepspeed: {zzz: {1: 2}}")
    assert config.model == {"anything": [1, {"x": 2}]} and config.deepspeed == {"zzz": {1: 2}}


# -- types


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: one", "seed is 'one'; it must be int"),
        ("seed: 1.5", "seed is 1.5; it must be int"),
        ("seed: true", "seed is True; it must be int"),
        ("seed: null", "seed is None; it must be int"),
        ("run: {dir: 3}", "run.dir is 3; it must be str"),
        ("run: {deterministic: 1}", "run.deterministic is 1; it must be bool"),
        ("run: {deterministic: 'yes'}", "run.deterministic is 'yes'; it must be bool"),
        ("run: {timeout: soon}", "run.timeout is 'soon'; it must be float"),
        ("run: {timeout: true}", "run.timeout is True; it must be float"),
        ("run: {keep_every: often}", "run.keep_every is 'often'; it must be int or NoneType"),
        ("run: {keep_every: true}", "run.keep_every is True; it must be int or NoneType"),
        ("data: {path: [a]}", "data.path is ['a']; it must be str or NoneType"),
        ("model: gpt2", "model is 'gpt2'; it must be dict"),
        ("model: null", "model is None; it must be dict"),
        ("deepspeed: [1]", "deepspeed is [1]; it must be dict"),
        ("policy: strict", "policy is 'strict'; it must be dict"),
        ("run: 3", "run must be a section of keys, not 3"),
        ("run: null", "run must be a section of keys, not None"),
        ("data: [path]", "data must be a section of keys, not ['path']"),
    ],
)
def test_a_value_of_another_type_is_told(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        from_text(tmp_path, text)


@pytest.mark.parametrize("override", ["run.steps=0", "run.steps=-5", "micro_batch_size=0"])
def test_a_count_below_one_is_told(override: str, empty: Path) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UsageError, match=f"{key} is {value}; it must be at least 1"):
        load(empty, [override])


# -- files


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the configuration .*gone\.yaml: No such file"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(UsageError, match="Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    "raw", [b"run: {steps: 1", b"a: b: c", b"\t- x", b"key: \x01", b"caf\xe9: 1", b"\x93NUMPY\x01"]
)
def test_what_is_not_yaml_is_told(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(raw)
    with pytest.raises(UsageError, match=r"x\.yaml is not valid YAML"):
        load(tmp_path / "x.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("just words", "str"), ("17", "int")])
def test_a_file_without_keys_is_told(text: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"must hold a mapping of keys, not a {kind}"):
        from_text(tmp_path, text)


def test_yaml_that_would_make_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid YAML"):
        from_text(tmp_path, f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert not (tmp_path / "made").exists()


# -- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("run.steps=200", ("run", "steps"), 200),
        ("run.dir=/tmp/a=b", ("run", "dir"), "/tmp/a=b"),
        ("run.keep_every=null", ("run", "keep_every"), None),
        ("run.deterministic=false", ("run", "deterministic"), False),
        ("data.path=", ("data", "path"), None),
        ("model.n_layer=3", ("model", "n_layer"), 3),
        ("deepspeed.zero_optimization.stage=1", ("deepspeed", "zero_optimization", "stage"), 1),
        ("deepspeed.optimizer.params.betas=[0.9, 0.99]", ("deepspeed", "optimizer", "params", "betas"), [0.9, 0.99]),
        ("model={type: llama}", ("model",), {"type": "llama"}),
        ("policy.replay=warn", ("policy", "replay"), "warn"),
    ],
)
def test_a_key_is_set_at_any_depth(override: str, path: tuple[str, ...], value: Any, empty: Path) -> None:
    found: Any = load(empty, [override])
    for key in path:
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value and type(found) is type(value)


def test_an_override_leaves_its_neighbours_and_the_last_one_counts(tmp_path: Path) -> None:
    text = "run: {steps: 5, save_every: 2}\nmodel: {type: gpt2, n_layer: 1}"
    config = from_text(tmp_path, text, "run.steps=9", "model.n_layer=2", "run.steps=10")
    assert (config.run.steps, config.run.save_every, config.model) == (10, 2, {"type": "gpt2", "n_layer": 2})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.step=1", "unknown configuration key 'run.step'; did you mean 'run.steps'?"),
        ("rum.steps=1", "unknown configuration key 'rum'; did you mean 'run'?"),
        ("steps=1", "unknown configuration key 'steps'; did you mean 'seed'?"),
        ("run.steps", "--set run.steps: write key=value"),
        ("=5", "unknown configuration key ''"),
        ("run.steps.more=1", "--set run.steps.more=1: steps is not a section"),
        ("run.steps=many", "run.steps is 'many'; it must be int"),
        ("run=5", "run must be a section of keys, not 5"),
        ("model.x=[1", "--set model.x=[1: not valid YAML"),
        ("policy.gaet=true", "policy has no field 'gaet'; did you mean 'gate'?"),
    ],
)
def test_a_bad_override_is_told(override: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        from_text(tmp_path, "run: {steps: 5}", override)


def test_a_rate_without_a_point_is_a_number(empty: Path) -> None:
    config = load(empty, ["deepspeed.optimizer.params.lr=1e-4"])
    assert config.deepspeed["optimizer"]["params"]["lr"] == 1e-4


def test_arguments_of_the_launchers_are_taken(empty: Path) -> None:
    config = parse_arguments(["--local_rank=1", "--config", str(empty), "--set", "run.steps=3", "--set", "seed=4"])
    assert config.run.steps == 3 and config.seed == 4


def test_no_configuration_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments([])
    assert end.value.code == 2 and "--config" in capsys.readouterr().err


# -- what a checkpoint pins


def test_where_a_run_lives_is_not_pinned_and_what_it_trains_is() -> None:
    config = TrainConfig()
    pinned = config.pinned()
    for change in ({"run": RunConfig(dir="elsewhere", steps=1, save_every=1, keep_last=9, timeout=1.0)},
                   {"data": DataConfig(path="elsewhere", num_workers=5)}, {"policy": {"gate": False}}):  # fmt: skip
        assert TrainConfig(**change).pinned() == pinned  # type: ignore[arg-type]
    for change in ({"seed": 1}, {"micro_batch_size": 9}, {"gradient_accumulation_steps": 9}, {"model": {"type": "x"}},
                   {"run": RunConfig(deterministic=False)}):  # fmt: skip
        assert TrainConfig(**change).pinned() != pinned  # type: ignore[arg-type]


# -- when to save


@pytest.mark.parametrize("value", ["7", "auto", "15m", '"1.5h"'])
def test_when_to_save(value: str, empty: Path) -> None:
    config = load(empty, [f"run.save_every={value}"])
    assert config.for_the_kit()["save_every"] == config.run.save_every != RunConfig().save_every


@pytest.mark.parametrize("value", ["0", "often", "15 minutes"])
def test_when_not_to_save(value: str, empty: Path) -> None:
    with pytest.raises(UsageError, match=r"run.save_every is .*; give a number of steps, a time like"):
        load(empty, [f"run.save_every={value}"])


def test_no_deadline_can_be_said(empty: Path) -> None:
    assert load(empty, ["run.deadline=.inf"]).run.deadline == float("inf")


@pytest.mark.parametrize(("ranks", "expected"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_a_global_batch_is_shared_among_the_ranks_there_are(ranks: int, expected: int, empty: Path) -> None:
    config = load(empty, ["global_batch_size=24", "micro_batch_size=4"])
    config.accumulate_over(ranks)
    assert config.gradient_accumulation_steps == expected == config.pinned()["gradient_accumulation_steps"]


def test_a_global_batch_that_does_not_fit_the_ranks_is_told(empty: Path) -> None:
    config = load(empty, ["global_batch_size=24", "micro_batch_size=4"])
    with pytest.raises(UsageError, match="24 samples are no multiple of 4 on 4 ranks"):
        config.accumulate_over(4)
    with pytest.raises(UsageError, match="global_batch_size is 0"):
        load(empty, ["global_batch_size=0"])
