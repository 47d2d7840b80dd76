"""What the policy lets differ on a real Megatron engine, where it is another thing than on DeepSpeed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob, train
from tests.ranks import RankFailure, run_ranks
from tests.resuming.observed import Watched, copied, refusal, watch, watched

#: Megatron's optimizer that every data-parallel rank holds whole.
PLAIN = pytest.param({"distributed_optimizer": False}, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> MegatronJob:
    """A run on two tensor ranks that stopped after step 4, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    job = MegatronJob(run_dir=str(folder / "run"), data=text_file(folder), tp=2, steps=4, save_every=2)
    run_ranks(train, 2, job.to_json())
    return job


@pytest.fixture(scope="module")
def reference(saved: MegatronJob, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's records of the same run, never interrupted, to step 12."""
    job = saved.but(run_dir=str(tmp_path_factory.mktemp("reference") / "run"), steps=12)
    return [result["records"] for result in run_ranks(train, 2, job.to_json())]


def lrs(records: list[dict[str, Any]], steps: range) -> list[float]:
    return [record["lr"] for record in records if record["step"] in steps]


def test_everything_that_differs_is_refused_at_once_and_named(ranks: Ranks, saved: MegatronJob, tmp_path: Path) -> None:
    job = copied(
        saved,
        tmp_path,
        steps=6,
        tp=1,
        global_batch=8,
        precision="fp32",
        lr=1e-3,
        dropout=0.2,
        optimizer={"weight_decay": 0.5, "clip_grad": 0.3},
        data=text_file(tmp_path, flip=30_000),
    )
    text = refusal(ranks, 2, job, versions={"megatron-core": "0.15.0"})
    for part in (
        "tensor_parallel: saved with 2, live 1",
        "data_parallel: saved with 1, live 2",
        "start the job with tensor_parallel = 2, or allow it with the policy `topology: reshard`",
        "ranks have a new place in the topology",
        "optimizer config.lr: saved with 0.003, live 0.001",
        "schedule.max_lr: saved with 0.003, live 0.001",
        "optimizer config.weight_decay: saved with 0.1, live 0.5",
        "schedule.start_wd: saved with 0.1, live 0.5",
        "optimizer config.clip_grad: saved with 1.0, live 0.3",
        "global_batch_size: saved with 4, live 8",
        "model.hidden_dropout: saved with 0.1, live 0.2",
        "fingerprint.content",
        "param/decoder.final_layernorm.bias: saved as bfloat16[32], live float32[32]",
        "megatron-core: saved with",
    ):
        assert part in text


def test_override_takes_the_live_schedule_at_the_saved_position(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    from_the_start = watched(ranks, 2, saved.but(run_dir=str(tmp_path / "live"), steps=8, lr=1e-3))[0]
    job = copied(saved, tmp_path, steps=6, lr=1e-3, policy={"learning_rate": "override"})
    found = watched(ranks, 2, job)[0]
    assert found.parts() == {"learning rate"}
    assert found.of("lr") == from_the_start.of("lr", range(5, 7)) and found.used == from_the_start.used[4:6]
    again = watched(ranks, 2, job.but(steps=8))[0]
    assert again.changes == [] and again.of("lr") == from_the_start.of("lr", range(7, 9))


def test_offset_shifts_the_schedule_once(
    ranks: Ranks, saved: MegatronJob, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, steps=6, policy={"learning_rate": {"offset": -2}})
    assert watched(ranks, 2, job)[0].of("lr") == lrs(reference[0], range(3, 5))
    again = watched(ranks, 2, job.but(steps=8))[0]
    assert again.changes == [] and again.of("lr") == lrs(reference[0], range(5, 7))


def test_a_schedule_is_not_shifted_to_before_its_start(ranks: Ranks, saved: MegatronJob, tmp_path: Path) -> None:
    job = copied(saved, tmp_path, steps=6, policy={"learning_rate": {"offset": -5}})
    text = refusal(ranks, 2, job)
    assert "step-000000004 must not be resumed by this run" in text  # nothing was written yet
    assert "it is to go 5 steps back, and has made 4" in text


def test_offset_counts_in_steps_of_the_live_batch(ranks: Ranks, saved: MegatronJob, tmp_path: Path) -> None:
    larger = {"global_batch": "change", "learning_rate": "override"}
    job = copied(saved, tmp_path, steps=6, global_batch=8, policy=larger)
    assert watched(ranks, 2, job)[0].ended["scheduler"]["state"]["num_steps"] == 4 * 4 + 2 * 8
    found = watched(ranks, 2, job.but(policy={"learning_rate": {"offset": 1}}))[0]
    assert found.resumed["scheduler"]["state"]["num_steps"] == 4 * 4 + 2 * 8 + 8


def scheduled(rank: int, world_size: int, options: dict[str, Any], *, settings: dict[str, Any] | None) -> Watched:
    """`watch`, with other settings of the schedule, also such as no configuration has; None: without a schedule."""
    import resume_kit.engines.megatron as engines
    from launch import megatron_training

    make, engine = megatron_training._schedule, engines.MegatronEngine

    def schedule(*made_of: Any) -> Any:
        scheduler = make(*made_of)
        vars(scheduler).update(settings or {})
        scheduler.step(0)
        return scheduler

    megatron_training._schedule = schedule
    if settings is None:
        engines.MegatronEngine = lambda chunks, optimizer, _: engine(chunks, optimizer)
    return watch(rank, world_size, options, megatron=True)


def run_scheduled(ranks: Ranks, job: MegatronJob, settings: dict[str, Any] | None) -> Watched:
    found: list[Watched] = ranks.run(functools.partial(scheduled, settings=settings), 1, job.to_json())
    return found[0]


def refused_schedule(ranks: Ranks, job: MegatronJob, settings: dict[str, Any] | None) -> str:
    with pytest.raises(RankFailure) as failure:
        run_scheduled(ranks, job, settings)
    assert failure.value.outcomes[0].error_type == "resume_kit.errors.ResumeRefused"
    text = str(failure.value.outcomes[0].error)
    assert "must not be resumed by this run" in text
    return text


def test_a_schedule_that_the_save_did_not_have_has_no_place_to_go_on_from(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    job = saved.but(run_dir=str(tmp_path / "without"), tp=1, steps=1, save_every=1)
    run_scheduled(ranks, job, None)
    text = refused_schedule(ranks, job.but(policy={"learning_rate": "override"}), {})
    assert "the saved schedule (none) does not tell how far it had come" in text
    text = refused_schedule(ranks, job.but(policy={"learning_rate": {"offset": 3}}), None)
    assert "there is no live schedule that could be shifted by +3 steps" in text


def test_settings_that_megatron_does_not_save_are_compared_and_kept(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    settings = {"lr_decay_style": "WSD", "wsd_decay_steps": 100, "lr_wsd_decay_style": "linear", "init_lr": 1e-5}
    job = saved.but(run_dir=str(tmp_path / "wsd"), tp=1, steps=2)
    kept = run_scheduled(ranks, job, settings).ended["scheduler"]["state"]
    assert {name: kept[name] for name in settings} == settings
    other = {**settings, "wsd_decay_steps": 50, "lr_wsd_decay_style": "cosine", "init_lr": 1e-3}
    text = refused_schedule(ranks, job, other)
    for difference in (
        "schedule.wsd_decay_steps: saved with 100, live 50",
        "schedule.lr_wsd_decay_style: saved with 'linear', live 'cosine'",
        "schedule.init_lr: saved with 1e-05, live 0.001",
    ):
        assert difference in text
    taken = run_scheduled(ranks, job.but(policy={"learning_rate": "override"}), other).resumed["scheduler"]["state"]
    assert {name: taken[name] for name in other} == other and taken["num_steps"] == 8


def counted(rank: int, world_size: int, options: dict[str, Any]) -> Watched:
    """`watch`, with an optimizer that counts its steps in its groups, as fused ones do."""
    from launch.megatron_training import Training

    inner = Training.step

    def step(self: Any, batches: Any) -> Any:
        result = inner(self, batches)
        for group in self.optimizer.param_groups:
            group["step"] = group.get("step", 0) + 1
        return result

    Training.step = step  # type: ignore[method-assign]
    return watch(rank, world_size, options, megatron=True)


def test_a_step_that_the_groups_count_starts_from_zero_too(ranks: Ranks, saved: MegatronJob, tmp_path: Path) -> None:
    job = saved.but(run_dir=str(tmp_path / "fused"), tp=1, steps=2)
    ranks.run(counted, 1, job.to_json())
    (kept,) = ranks.run(counted, 1, job.but(run_dir=copied(job, tmp_path).run_dir, steps=3).to_json())
    assert kept.resumed["group steps"] == [2, 2] and kept.ended["group steps"] == [3, 3]
    (reset,) = ranks.run(counted, 1, job.but(steps=3, policy={"optimizer_state": "reset"}).to_json())
    assert reset.resumed["group steps"] == [None, None] and reset.ended["group steps"] == [1, 1]


def test_another_rate_of_one_sort_of_weights_leaves_the_groups_in_their_order(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    job = saved.but(run_dir=str(tmp_path / "rates"), tp=1, steps=2)
    ranks.run(functools.partial(halved, lr=1e-4), 1, job.to_json())
    other = job.but(steps=3, policy={"learning_rate": "override"})
    (found,) = ranks.run(functools.partial(halved, lr=1e-3), 1, other.to_json())
    assert found.resumed_at == 2 and found.parts() == {"learning rate"}


def halved(rank: int, world_size: int, options: dict[str, Any], *, lr: float) -> Watched:
    """`watch`, with half the LR for weights without decay: 5e-05 is more than 0.0001 as a text."""
    from launch import megatron_training

    make = megatron_training._schedule

    def schedule(config: Any, optimizer: Any) -> Any:
        for group in optimizer.param_groups:
            group["max_lr"] = lr / 2 if group["wd_mult"] == 0 else lr
        return make(config, optimizer)

    megatron_training._schedule = schedule
    return watch(rank, world_size, options, megatron=True)


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_rewarming_goes_on_over_a_further_resume(
    options: dict[str, Any], ranks: Ranks, saved: MegatronJob, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    policy = {"preset": "flexible", "learning_rate": {"rewarm": 4}}
    through = watched(ranks, 2, copied(saved, tmp_path, steps=8, policy=policy, **options))
    rates = lrs(reference[0], range(4, 9))
    factors = [1 / 4, 2 / 4, 3 / 4, 1.0]
    assert through[0].used == [rate * factor for rate, factor in zip(rates[:4], factors, strict=True)]
    assert through[0].of("lr") == [rate * factor for rate, factor in zip(rates[1:], [*factors[1:], 1.0], strict=True)]
    job = copied(saved, tmp_path, steps=6, policy=policy, **options)
    watched(ranks, 2, job)
    again = watched(ranks, 2, job.but(steps=8))
    for rank in range(2):
        assert again[rank].changes == [] and again[rank].records == through[rank].after(6)
        assert again[rank].state == through[rank].state


def test_live_hyperparameters_stay_live_although_the_schedule_sets_the_weight_decay(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    changed = {"weight_decay": 0.5, "clip_grad": 0.3}
    job = copied(saved, tmp_path, steps=6, optimizer=changed, policy={"hyperparameters": "live"})
    found = watched(ranks, 2, job)[0]
    assert found.parts() == {"hyperparameters"}
    again = watched(ranks, 2, job.but(steps=8, policy={}))[0]
    assert again.changes == []
    for state in (found.resumed, found.ended, again.resumed, again.ended):
        assert state["weight decay"] == [0.0, 0.5]


@pytest.mark.parametrize("options", [{"tp": 1}, pytest.param({}, marks=pytest.mark.slow), PLAIN])
def test_a_reset_optimizer_starts_from_zero_once(
    options: dict[str, Any], ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    policy = {"preset": "flexible", "optimizer_state": "reset"}
    through = watched(ranks, 2, copied(saved, tmp_path, steps=6, policy=policy, **options))
    assert through[0].resumed["moments"] == 0.0 and through[0].resumed["adam steps"] == []
    assert through[0].ended["moments"] > 0.0 and through[0].ended["adam steps"] == [2.0]
    job = copied(saved, tmp_path, steps=4, policy=policy, **options)
    watched(ranks, 2, job, save_at_once=True)
    second = watched(ranks, 2, job.but(steps=5))
    assert second[0].changes == [] and second[0].resumed["adam steps"] == []
    third = watched(ranks, 2, job.but(steps=6))
    assert [one.records for one in third] == [one.records for one in through]
    assert [one.state for one in third] == [one.state for one in through]


def alike(found: list[Watched], what: str) -> list[list[int]]:
    """Ranks by equal value of a generator after the resume."""
    by_value: dict[str, list[int]] = {}
    for rank, one in enumerate(found):
        by_value.setdefault(one.resumed["rng"][what], []).append(rank)
    return sorted(by_value.values())


def test_new_data_ranks_draw_apart_and_their_tensor_ranks_draw_alike(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    flexible = {"preset": "flexible"}
    once = watched(ranks, 4, copied(saved, tmp_path, steps=6, policy=flexible))
    two = watched(ranks, 2, copied(saved, tmp_path))
    assert any("new streams from seed 7 on ranks 2-3" in warning for warning in once[0].warnings)
    assert alike(once, "torch") == alike(once, "python") == [[0, 1], [2, 3]]
    assert alike(once, "engine:model-parallel-rng") == [[0], [1], [2], [3]]
    assert [one.resumed["rng"] for one in once[:2]] == [one.resumed["rng"] for one in two]
    twice = watched(ranks, 4, copied(saved, tmp_path, steps=6, policy=flexible))
    assert [(one.records, one.state) for one in twice] == [(one.records, one.state) for one in once]


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_weights_in_another_dtype_are_cast_from_the_masters_and_back(
    options: dict[str, Any], ranks: Ranks, saved: MegatronJob, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, policy={"preset": "flexible", "dtype": "cast"})
    full = watched(ranks, 2, job.but(precision="fp32", **options), save_at_once=True)
    assert "dtype" in full[0].parts()
    assert full[0].resumed["dtypes"] == ["float32"]
    back = watched(ranks, 2, job.but(steps=6))
    assert back[0].resumed["dtypes"] == ["bfloat16"]
    assert [one.records for one in back] == [records[4:6] for records in reference]


def test_another_global_batch_keeps_the_position_and_the_live_schedule_counts_its_samples(
    ranks: Ranks, saved: MegatronJob, tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, steps=6, global_batch=8, policy={"global_batch": "change"})
    text = refusal(ranks, 2, job)
    assert "schedule.lr_decay_steps: saved with 200, live 400" in text and "`learning_rate: override`" in text
    found = watched(ranks, 2, job.but(policy={"global_batch": "change", "learning_rate": "override"}))[0]
    assert found.parts() == {"global batch", "learning rate"}
    assert found.of("samples") == [24, 32]
    assert found.used == pytest.approx([3e-3 * 16 / 24, 3e-3])  # warmup over 24 samples, of which 16 are gone


def test_another_dropout_does_not_move_the_gate(ranks: Ranks, saved: MegatronJob, tmp_path: Path) -> None:
    job = copied(saved, tmp_path, steps=5, dropout=0.2, policy={"configuration": "warn"})
    found = watched(ranks, 2, job)[0]
    assert found.parts() == {"configuration"}
    assert [warning.split(":")[0] for warning in found.warnings] == ["configuration"] * len(found.changes)


@pytest.mark.parametrize(
    ("how", "position"), [pytest.param("keep_position", 16, marks=pytest.mark.slow), ("restart", 0)]
)
def test_another_version_of_the_data(
    how: str, position: int, ranks: Ranks, saved: MegatronJob, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, steps=6, data=text_file(tmp_path, flip=30_000), policy={"data": how})
    found = watched(ranks, 2, job)[0]
    assert found.parts() == {"data"} and found.of("samples") == [position + 4, position + 8]
    first = position // 4
    assert found.of("batch") == [record["batch"] for record in reference[0][first : first + 2]]


def test_all_at_once(ranks: Ranks, saved: MegatronJob, tmp_path: Path) -> None:
    policy = {
        "preset": "flexible",
        "learning_rate": {"rewarm": 2},
        "hyperparameters": "live",
        "optimizer_state": "reset",
        "data": "restart",
        "dtype": "cast",
        "configuration": "warn",
    }
    changes = {"tp": 1, "pp": 2, "precision": "fp32", "dropout": 0.2, "optimizer": {"weight_decay": 0.5}}
    job = copied(saved, tmp_path, steps=6, policy=policy, data=text_file(tmp_path, flip=30_000), **changes)
    found = watched(ranks, 2, job)
    assert found[0].parts() == {
        *("topology", "rng", "learning rate", "hyperparameters", "optimizer state", "data", "dtype", "configuration")
    }
    for one in found:
        assert one.resumed["dtypes"] == ["float32"] and one.resumed["moments"] == 0.0
        assert one.ended["weight decay"] == [0.0, 0.5] and one.of("samples") == [4, 8]
    again = watched(ranks, 2, job.but(steps=7))
    assert again[0].changes == [] and again[0].of("samples") == [12]
