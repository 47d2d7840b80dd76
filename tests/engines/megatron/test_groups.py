"""Parameter groups without the topology in them: their order, and what it takes to be one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import Ranks
from tests.engines.megatron.test_support import built
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob


def groups_of(engine: Any) -> Any:
    from resume_kit.engines.megatron.grid import Grid
    from resume_kit.engines.megatron.groups import LogicalGroups
    from resume_kit.engines.megatron.logical import local_weights

    weights = local_weights(engine.model_chunks, Grid.of_megatron())
    return LogicalGroups(engine.optimizer, weights, engine.scheduler)


def orders(rank: int, world_size: int, options: dict[str, Any]) -> list[list[list[str]]]:
    """Members of the groups, in their order, under several rates of the two groups."""
    found = []
    engine = built(options)
    physical = engine.optimizer.param_groups
    for factors in ((0.0, 1.0), (1.0, 1.0)):
        for rates in ((1e-4, 5e-5), (1e-3, 5e-4), (2e-5, 1e-5)):
            for group, factor, rate in zip(physical, factors, rates, strict=True):
                group["wd_mult"], group["max_lr"] = factor, rate
            found.append([group["members"] for group in groups_of(engine).describe()])
    return found


def test_the_order_is_that_of_numbers_whatever_the_rates(ranks: Ranks, tmp_path: Path) -> None:
    (found,) = ranks.run(orders, 1, MegatronJob(data=text_file(tmp_path)).to_json())
    by_factor, by_rate = found[:3], found[3:]
    assert by_factor == [by_factor[0]] * 3 and by_rate == [by_rate[0]] * 3
    assert by_rate[0] == by_factor[0][::-1] and all(members for members in by_rate[0])


def states(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """What the groups of an expert-parallel rank say, step by step of their coming apart; texts of errors."""
    from resume_kit.engines.megatron.ownership import single_optimizers
    from resume_kit.errors import InconsistentState

    engine = built(options)
    groups = groups_of(engine)
    parts = [group for one in single_optimizers(engine.optimizer) for group in one.optimizer.param_groups]
    found: dict[str, Any] = {"parts": len(parts), "groups": len(groups.values())}
    twins = [part for part in parts if part["wd_mult"] == 1.0]
    twins[0]["params"], emptied = [], twins[0]["params"]  # as on a rank whose slice of the buffer has none of them
    for part in parts:
        if part["params"]:
            part["step"] = 4
    found["fused"] = [group.get("step") for group in groups.values()]
    twins[0].update(params=emptied, step=4)
    found["twins"] = [part["is_expert_parallel"] for part in twins]
    expert = next(part for part in parts if part["is_expert_parallel"] and part["params"])
    expert["weight_decay"] = 0.5
    try:
        groups.values()
    except InconsistentState as error:
        found["error"] = str(error)
    return found


def test_parts_of_a_group_that_have_come_apart_are_noticed(ranks: Ranks, tmp_path: Path) -> None:
    job = MegatronJob(data=text_file(tmp_path), ep=2, experts=4)
    for found in ranks.run(states, 2, job.to_json()):
        assert found["parts"] > found["groups"] and found["twins"] == [False, True]
        assert found["fused"] == [4] * found["groups"]
        assert "parts of one parameter group have come apart" in found["error"]
        assert "weight_decay: 0.1 for some of its weights, 0.5 for others" in found["error"]


def moved(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """What groups are said to be at the start, and once their schedule has moved and steps were counted."""
    engine = built(options)
    start = groups_of(engine).describe()
    engine.scheduler.step(increment=12)
    for group in engine.optimizer.param_groups:
        if group["params"]:
            group["step"] = 3
    late = groups_of(engine)
    found = {"start": start, "late": late.describe(), "values": late.values()}
    engine.optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    return {**found, "changed": groups_of(engine).describe()}


def test_a_schedule_that_has_moved_changes_nothing_of_what_was_constructed(ranks: Ranks, tmp_path: Path) -> None:
    job = MegatronJob(data=text_file(tmp_path), ep=2, experts=4, optimizer={"warmup_steps": 5})
    for found in ranks.run(moved, 2, job.to_json()):
        assert found["late"] == found["start"] != found["changed"]
        assert [group["lr"] for group in found["start"]] == [0.0] * len(found["start"])
        assert all(group["lr"] > 0 and group["step"] == 3 for group in found["values"])
