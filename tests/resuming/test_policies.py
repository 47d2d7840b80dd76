"""What each field of the policy lets differ, on a real DeepSpeed engine: done as said, shown, and done once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from resume_kit import ResumableLoader, TokenDataset
from resume_kit.checkpoint import canonical
from resume_kit.engines import rng
from resume_kit.environment import software_versions
from resume_kit.resuming.streams import derived_seed
from tests.conftest import Ranks
from tests.jobs import Job, text_file, train
from tests.ranks import RankFailure, run_ranks
from tests.resuming.observed import Watched, copied, refusal, watch, watched

TORCH = software_versions()["torch"]


def schedule(lr: float, total: int) -> dict[str, Any]:
    """Options of a job whose LR rises over 6 steps and then falls."""
    params = {"total_num_steps": total, "warmup_min_lr": 0.0, "warmup_max_lr": lr, "warmup_num_steps": 6}
    return {"lr": lr, "ds": {"scheduler": {"type": "WarmupDecayLR", "params": params}}}


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that stopped after step 4, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    job = Job(str(folder / "run"), data=text_file(folder), steps=4, save_every=2, buffers=False, **schedule(3e-3, 40))
    run_ranks(train, 2, job.to_json())
    return job


@pytest.fixture(scope="module")
def reference(saved: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Watched]:
    """The same run, never interrupted, to step 12."""
    job = saved.but(run_dir=str(tmp_path_factory.mktemp("reference") / "run"), steps=12)
    found: list[Watched] = run_ranks(watch, 2, job.to_json())
    return found


def test_everything_that_differs_is_refused_at_once_and_named(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    options = schedule(1e-3, 40)
    options["ds"]["gradient_clipping"] = 0.5
    other = text_file(tmp_path, flip=30_000)
    job = copied(saved, tmp_path, steps=6, accumulation=2, precision="fp32", dropout=0.2, data=other, **options)
    text = refusal(ranks, 2, job, weight_decay=0.5, versions={"torch": "2.12.0"})
    for difference, field in {
        "deepspeed.optimizer.params.lr: saved with 0.003, live 0.001": "learning_rate: override",
        "deepspeed.scheduler.params.warmup_max_lr": "learning_rate: {offset: N}",
        "deepspeed.gradient_clipping: saved with 1.0, live 0.5": "hyperparameters: live",
        "weight_decay was 0.1 as constructed, now 0.5": "hyperparameters: live",
        "global_batch_size: saved with 4, live 8": "global_batch: change",
        "deepspeed.gradient_accumulation_steps: saved with 1, live 2": "global_batch: change",
        "fingerprint.content": "data: keep_position` or `data: restart",
        "saved as bfloat16[32], live float32[32]": "dtype: cast",
        "model.resid_pdrop: saved with 0.1, live 0.2": "configuration: warn",
        f"torch: saved with {TORCH}, live 2.12.0": "versions: warn",
    }.items():
        assert difference in text
        assert f"allow it with the policy `{field}" in text or f"or `{field}" in text


def test_override_takes_the_live_schedule_at_the_saved_position(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    live = saved.but(run_dir=str(tmp_path / "live"), steps=9, **schedule(1e-3, 30))
    from_the_start = watched(ranks, 2, live)[0]
    job = copied(saved, tmp_path, steps=7, policy={"learning_rate": "override"}, **schedule(1e-3, 30))
    found = watched(ranks, 2, job)[0]
    assert found.resumed_at == 4 and found.parts() == {"learning rate"}
    assert found.of("lr") == from_the_start.of("lr", range(5, 8))
    assert found.used == from_the_start.used[4:7]
    again = watched(ranks, 2, job.but(steps=9))[0]
    assert again.resumed_at == 6 and again.changes == []
    assert again.of("lr") == from_the_start.of("lr", range(7, 10))


@pytest.mark.slow
def test_offset_shifts_the_live_schedule_where_it_differs(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    live = saved.but(run_dir=str(tmp_path / "live"), steps=8, **schedule(1e-3, 30))
    from_the_start = watched(ranks, 2, live)[0]
    job = copied(saved, tmp_path, steps=6, policy={"learning_rate": {"offset": 2}}, **schedule(1e-3, 30))
    found = watched(ranks, 2, job)[0]
    assert {change["action"] for change in found.changes} == {"live schedule, +2 steps from the saved position"}
    assert found.of("lr") == from_the_start.of("lr", range(7, 9))


@pytest.mark.parametrize("offset", [pytest.param(3, marks=pytest.mark.slow), -2])
def test_offset_shifts_the_schedule_once(
    offset: int, ranks: Ranks, saved: Job, reference: list[Watched], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, steps=6, policy={"learning_rate": {"offset": offset}})
    found = watched(ranks, 2, job)[0]
    assert [change["after"] for change in found.changes] == [f"shifted by {offset:+} steps"]
    assert found.of("lr") == reference[0].of("lr", range(5 + offset, 7 + offset))
    assert found.used == reference[0].used[4 + offset : 6 + offset]
    again = watched(ranks, 2, job.but(steps=8))[0]
    assert again.changes == []
    assert again.of("lr") == reference[0].of("lr", range(7 + offset, 9 + offset))


def test_a_schedule_is_not_shifted_to_before_its_start(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    job = copied(saved, tmp_path, steps=6, policy={"learning_rate": {"offset": -5}})
    text = refusal(ranks, 2, job)
    assert "step-000000004 must not be resumed by this run" in text  # nothing was written yet
    assert "it is to go 5 steps back, and has made 4" in text


def test_orders_in_the_policy_of_a_new_run_are_done_with(
    ranks: Ranks, saved: Job, reference: list[Watched], tmp_path: Path
) -> None:
    policy = {"learning_rate": {"rewarm": 5}, "optimizer_state": "reset"}
    job = saved.but(run_dir=str(tmp_path / "new"), policy=policy)
    first = watched(ranks, 2, job)
    again = watched(ranks, 2, job.but(steps=6))
    assert again[0].resumed_at == 4 and again[0].changes == []
    for rank in range(2):
        assert first[rank].records + again[rank].records == reference[rank].records[:6]
    other = watched(ranks, 2, job.but(steps=7, policy={"learning_rate": {"rewarm": 3}}))[0]
    assert [change["after"] for change in other.changes] == ["rewarmed over 3 steps"]


def cosine(rank: int, world_size: int, options: dict[str, Any], *, total: int) -> Watched:
    """`watch`, with a torch schedule of the client's own."""
    import torch

    schedules = torch.optim.lr_scheduler
    schedules.LambdaLR = lambda optimizer, _: schedules.CosineAnnealingLR(optimizer, T_max=total)
    return watch(rank, world_size, options)


def test_a_schedule_of_the_clients_own_is_compared_and_overridden(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    own = saved.but(client_optimizer="amsgrad", scheduler="lambda", run_dir=str(tmp_path / "own"), ds={})
    ranks.run(functools.partial(cosine, total=10), 1, own.to_json())
    run = functools.partial(ranks.run, functools.partial(cosine, total=100), 1)
    with pytest.raises(RankFailure) as failure:
        run(own.but(steps=6).to_json())
    assert "schedule.T_max: saved with 10, live 100" in failure.value.outcomes[0].error
    assert "`learning_rate: override`" in failure.value.outcomes[0].error
    found = run(own.but(steps=6, policy={"learning_rate": "override"}).to_json())[0]
    assert {change["path"] for change in found.changes} == {"schedule.T_max"}
    from_the_start = run(own.but(steps=6, run_dir=str(tmp_path / "start")).to_json())[0]
    assert found.of("lr") == from_the_start.of("lr", range(5, 7)) and found.used == from_the_start.used[4:]


def test_rewarming_is_a_factor_on_the_saved_schedule_that_goes_on_over_further_resumes(
    ranks: Ranks, saved: Job, reference: list[Watched], tmp_path: Path
) -> None:
    policy = {"learning_rate": {"rewarm": 5}}
    through = watched(ranks, 2, copied(saved, tmp_path, steps=10, policy=policy))
    assert [change["after"] for change in through[0].changes] == ["rewarmed over 5 steps"]
    factors = [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0, 1.0]
    assert through[0].used == [lr * f for lr, f in zip(reference[0].used[4:10], factors, strict=True)]
    nexts = [*factors[1:], 1.0]
    assert through[0].of("lr") == [lr * f for lr, f in zip(reference[0].of("lr", range(5, 11)), nexts, strict=True)]
    assert through[0].ended["scheduler"]["state"]["last_batch_iteration"] == 9
    job = copied(saved, tmp_path, steps=6, policy=policy)
    watched(ranks, 2, job)
    second = watched(ranks, 2, job.but(steps=8))
    assert second[0].changes == []
    third = watched(ranks, 2, job.but(steps=10, policy={}))
    for rank in range(2):
        assert second[rank].records + third[rank].records == through[rank].after(6)
        assert third[rank].state == through[rank].state


def test_what_no_checkpoint_tells_of_is_done_again(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    policy = {"learning_rate": {"rewarm": 5}, "optimizer_state": "reset"}
    job = copied(saved, tmp_path, steps=6, save_every=0, policy=policy)
    once, again = watched(ranks, 2, job), watched(ranks, 2, job)
    assert [one.resumed_at for one in (*once, *again)] == [4] * 4
    assert again[0].changes == once[0].changes != []
    assert [(one.records, one.state) for one in again] == [(one.records, one.state) for one in once]


def test_live_hyperparameters_stay_live(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    options = {"ds": {**saved.ds, "gradient_clipping": 0.5}}
    job = copied(saved, tmp_path, steps=6, policy={"hyperparameters": "live"}, **options)
    found = watched(ranks, 2, job, weight_decay=0.5)[0]
    assert {change["path"] for change in found.changes} == {"deepspeed.gradient_clipping", "group 0.weight_decay"}
    again = watched(ranks, 2, job.but(steps=8, policy={}), weight_decay=0.5)[0]
    assert again.changes == []
    for state in (found.resumed, found.ended, again.resumed, again.ended):
        assert state["weight decay"] == [0.5]


def test_a_reset_optimizer_starts_from_zero_once(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    policy = {"optimizer_state": "reset"}
    through = watched(ranks, 2, copied(saved, tmp_path, steps=8, policy=policy))
    assert through[0].parts() == {"optimizer state"}
    assert through[0].resumed["moments"] == 0.0 and through[0].resumed["adam steps"] == []
    assert through[0].ended["moments"] > 0.0 and through[0].ended["adam steps"] == [4.0]
    job = copied(saved, tmp_path, steps=4, policy=policy)
    watched(ranks, 2, job, save_at_once=True)
    second = watched(ranks, 2, job.but(steps=6))
    assert second[0].changes == [] and second[0].resumed["adam steps"] == []
    third = watched(ranks, 2, job.but(steps=8))
    assert third[0].changes == [] and third[0].resumed["adam steps"] == [2.0]
    for rank in range(2):
        assert second[rank].records + third[rank].records == through[rank].records
        assert third[rank].state == through[rank].state


def test_another_optimizer_takes_over_with_a_reset(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    policy = {"hyperparameters": "live", "learning_rate": "override", "configuration": "warn"}
    job = copied(saved, tmp_path, steps=6, client_optimizer="sgd", policy=policy)
    text = refusal(ranks, 2, job)
    assert "optimizer: saved with 'AdamW', live 'SGD'" in text and "optimizer_state: reset" in text
    found = watched(ranks, 2, job.but(policy={**policy, "optimizer_state": "reset"}))[0]
    assert ("optimizer", "AdamW", "SGD") in {(c["path"], str(c["before"]), str(c["after"])) for c in found.changes}
    kinds = {name.split("/")[0] for name in found.state}
    assert "momentum_buffer" in kinds and "exp_avg" not in kinds
    assert watched(ranks, 2, job.but(steps=8, policy={}))[0].resumed_at == 6


def test_new_ranks_draw_from_derived_streams_and_old_ones_from_their_own(
    ranks: Ranks, saved: Job, reference: list[Watched], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, steps=6, micro_batch_size=1)
    text = refusal(ranks, 4, job.but(policy={"topology": "reshard"}))
    assert "[topology] ranks 0–3 (4), rng: ranks have a new place" in text and "`rng: derive`" in text
    flexible = job.but(policy={"preset": "flexible"})
    once = watched(ranks, 4, flexible)
    assert {"topology", "rng"} <= once[0].parts()
    assert any("new streams from seed 7 on ranks 2-3" in warning for warning in once[0].warnings)
    four = run_ranks(watch, 2, copied(saved, tmp_path).to_json())
    for rank in range(4):
        if rank < 2:
            assert once[rank].resumed["rng"] == four[rank].resumed["rng"]
            continue
        for generator, found in once[rank].resumed["rng"].items():
            seed = derived_seed(7, 4, generator, f"rank {rank}")
            assert found == canonical.value_digest(canonical.encode(rng.derived(generator, seed)))
    assert len({one.resumed["torch"] for one in once}) == 4
    twice = watched(ranks, 4, copied(saved, tmp_path, steps=6, micro_batch_size=1, policy=flexible.policy))
    assert [one.records for one in twice] == [one.records for one in once]
    assert [one.state for one in twice] == [one.state for one in once]


@pytest.mark.parametrize(("how", "position"), [("keep_position", 16), ("restart", 0)])
def test_another_version_of_the_data(
    how: str, position: int, ranks: Ranks, saved: Job, reference: list[Watched], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, steps=6, data=text_file(tmp_path, flip=30_000), policy={"data": how})
    found = watched(ranks, 2, job)[0]
    assert [(change["part"], change["path"]) for change in found.changes] == [("data", "fingerprint.content")]
    assert found.resumed["position"] == position
    assert found.of("samples") == [position + 4, position + 8]
    first = position // 4 + 1
    assert found.of("batch") == reference[0].of("batch", range(first, first + 2))
    again = watched(ranks, 2, job.but(steps=7))[0]
    assert again.changes == [] and again.of("samples") == [position + 12]


@pytest.mark.parametrize(("precision", "dtype", "scale"), [("fp32", "float32", 1), ("fp16", "float16", 256)])
def test_weights_in_another_dtype_are_cast_from_the_masters_and_back(
    precision: str, dtype: str, scale: int, ranks: Ranks, saved: Job, reference: list[Watched], tmp_path: Path
) -> None:
    job = copied(saved, tmp_path, policy={"dtype": "cast"})
    config = {**job.ds, "fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else job.ds
    other = watched(ranks, 2, job.but(precision=precision, ds=config), save_at_once=True)
    assert other[0].parts() == {"dtype"}
    assert other[0].resumed["dtypes"] == [dtype] and other[0].resumed["casts"]
    assert other[0].resumed["scaler"]["cur_scale"] == scale
    back = watched(ranks, 2, job.but(steps=8))
    assert back[0].resumed["dtypes"] == ["bfloat16"] and back[0].parts() == {"dtype"}
    assert back[0].resumed["scaler"]["cur_scale"] == 1
    for rank in range(2):
        assert back[rank].records == [r for r in reference[rank].records if 4 < r["step"] <= 8]


def test_a_loss_scaler_goes_on_under_its_live_settings(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    section = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000}
    job = saved.but(run_dir=str(tmp_path / "fp16"), precision="fp16", steps=2, ds={**saved.ds, "fp16": section})
    first = watched(ranks, 2, job)[0].ended["scaler"]
    other = {**section, "initial_scale_power": 4, "loss_scale_window": 10, "hysteresis": 3}
    options = {"policy": {"dtype": "cast"}, "ds": {**saved.ds, "fp16": other}}
    found = watched(ranks, 2, job.but(**options))[0].resumed["scaler"]
    assert (first["scale_window"], found["scale_window"], found["delayed_shift"]) == (1000, 10, 3)
    for moving in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
        assert found[moving] == first[moving]
    assert found["cur_iter"] == 2
    for scale in (32, 64):
        constant = {**saved.ds, "fp16": {"enabled": True, "loss_scale": scale}}
        one = watched(ranks, 2, job.but(policy={"dtype": "cast"}, ds=constant), save_at_once=True)[0]
        assert one.resumed["scaler"]["cur_scale"] == scale


@pytest.mark.parametrize(
    ("stage", "fault", "expected"), [(3, "flip-weight", "cast of master"), (2, "flip-copy", "copy")]
)
def test_a_wrong_cast_is_refused(
    stage: int, fault: str, expected: str, ranks: Ranks, saved: Job, tmp_path: Path
) -> None:
    policy = {"preset": "flexible", "dtype": "cast"}
    job = copied(saved, tmp_path, steps=6, precision="fp32", stage=stage, policy=policy)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), [fault])
    assert "rank 1, param/" in failure.value.outcomes[0].error
    assert expected in failure.value.outcomes[0].error


def test_another_global_batch_keeps_the_position_and_takes_every_sample_once(
    ranks: Ranks, saved: Job, tmp_path: Path
) -> None:
    before = [record["batch"] for record in journal_steps(saved)]
    job = copied(saved, tmp_path, steps=6, accumulation=2, policy={"global_batch": "change"})
    found = watched(ranks, 2, job)[0]
    assert found.parts() == {"global batch"}
    assert found.of("samples") == [24, 32]
    data = TokenDataset.from_path(saved.data, sequence_length=saved.sequence_length)
    small, large = (
        ResumableLoader(data, micro_batch_size=2, gradient_accumulation_steps=n, rank=0, world_size=2, seed=7)
        for n in (1, 2)
    )
    assert before == [small.batch_digest(position) for position in (0, 4, 8, 12)]
    assert found.of("batch") == [large.batch_digest(position) for position in (16, 24)]
    taken = [i for p in (0, 4, 8, 12) for i in small.sample_ids(p)] + [i for p in (16, 24) for i in large.sample_ids(p)]
    assert taken == small.order.samples(0, 32) and len(set(taken)) == 32


def journal_steps(job: Job) -> list[dict[str, Any]]:
    from resume_kit.run.journal import read_journal

    return [event for event in read_journal(Path(job.run_dir)) if event["event"] == "step"]


def test_another_configuration_and_other_versions_go_on_with_warnings(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    policy = {"configuration": "warn", "versions": "warn"}
    job = copied(saved, tmp_path, steps=5, dropout=0.2, policy=policy)
    found = watched(ranks, 2, job, versions={"torch": "2.12.0"})[0]
    assert found.parts() == {"configuration", "versions"}
    for part in (
        "configuration: model.resid_pdrop: saved with 0.1, live 0.2",
        f"versions: torch: saved with {TORCH}, live 2.12.0",
        "loss: ",
        "finite; the configuration differs",
    ):
        assert any(part in warning for warning in found.warnings), part


@pytest.mark.slow
def test_any_version_goes_on_without_a_word(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    job = copied(saved, tmp_path, steps=5, policy={"versions": "any"})
    found = watched(ranks, 2, job, versions={"torch": "2.12.0"})[0]
    assert found.parts() == {"versions"} and found.warnings == []


def test_all_at_once(ranks: Ranks, saved: Job, tmp_path: Path) -> None:
    policy = {
        "preset": "flexible",
        "global_batch": "change",
        "learning_rate": {"rewarm": 2},
        "hyperparameters": "live",
        "optimizer_state": "reset",
        "data": "restart",
        "dtype": "cast",
        "configuration": "warn",
    }
    changes = {"stage": 1, "precision": "fp32", "dropout": 0.2, "data": text_file(tmp_path, flip=30_000)}
    job = copied(saved, tmp_path, steps=6, policy=policy, **changes)
    found = watched(ranks, 3, job, weight_decay=0.5, versions={"torch": "2.12.0"})
    assert found[0].parts() == {
        *("topology", "rng", "global batch", "learning rate", "hyperparameters", "optimizer state"),
        *("data", "dtype", "configuration", "versions"),
    }
    for one in found:
        assert one.resumed["dtypes"] == ["float32"] and one.resumed["casts"] and one.resumed["moments"] == 0.0
        assert one.resumed["weight decay"] == [0.5] and one.resumed["position"] == 0
        assert one.of("samples") == [6, 12]
    again = watched(ranks, 3, job.but(steps=7), weight_decay=0.5, versions={"torch": "2.12.0"})
    assert again[0].changes == [] and again[0].of("samples") == [18]
