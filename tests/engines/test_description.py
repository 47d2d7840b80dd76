"""One model out of the ranks' parts of it; what two ranks say differently is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import ModelDescription
from resume_kit.engines.description import from_plain, to_plain, united
from resume_kit.errors import UsageError


def part(*names: str, **pinned: Any) -> ModelDescription:
    """A stage that holds these weights."""
    return ModelDescription(
        weights=tuple(TensorSpec(TensorKey("param", name), "bfloat16", (4, 2)) for name in names),
        trainable=frozenset(names),
        master_dtypes=dict.fromkeys(names, "float32"),
        buffers=(TensorSpec(TensorKey("buffer", f"{names[0]}.bias"), "float32", (3,)),),
        aliases={"output": "embedding"},
        groups=({"members": list(names), "lr": 0.1, "betas": (0.9, 0.95)}, {"members": [], "lr": 0.1, "betas": ()}),
        pinned={"model": {"layers": 2, "norm": None}, "geometry": {"weights": {n: {"axis": 0} for n in names}}}
        | pinned,
        partial=True,
    )


def plain(*parts: ModelDescription) -> list[dict[str, Any]]:
    return [copy.deepcopy(to_plain(one)) for one in parts]


def test_stages_are_united() -> None:
    whole = from_plain(united(plain(part("b", "a"), part("c"), part("a", "b"))))
    assert [spec.key.name for spec in whole.weights] == ["a", "b", "c"]
    assert whole.trainable == {"a", "b", "c"} and whole.master_dtypes == dict.fromkeys("abc", "float32")
    assert [spec.key.name for spec in whole.buffers] == ["a.bias", "b.bias", "c.bias"]
    assert whole.groups[0]["members"] == ["a", "b", "c"] and whole.groups[1]["members"] == []
    assert whole.pinned["geometry"]["weights"] == {name: {"axis": 0} for name in "abc"}
    assert whole.pinned["model"] == {"layers": 2, "norm": None} and whole.partial


def test_the_order_of_the_ranks_does_not_matter() -> None:
    one, other = part("a", "b"), part("c")
    assert united(plain(one, other)) == united(plain(other, one))


def test_a_united_description_is_that_of_one_rank_that_holds_all() -> None:
    single = united(plain(part("a", "b")))
    assert united([single, *plain(part("a", "b"))]) == single


def rename_shape(plain: dict[str, Any]) -> None:
    plain["weights"][0][3] = [4, 3]


def another_dtype(plain: dict[str, Any]) -> None:
    plain["master_dtypes"]["a"] = "bfloat16"


def another_layer_count(plain: dict[str, Any]) -> None:
    plain["pinned"]["model"]["layers"] = 3


def another_geometry(plain: dict[str, Any]) -> None:
    plain["pinned"]["geometry"]["weights"]["a"]["axis"] = None


def a_plain_value_for_a_section(plain: dict[str, Any]) -> None:
    plain["pinned"]["model"] = None


def another_rate(plain: dict[str, Any]) -> None:
    plain["groups"][1]["lr"] = 0.2


def a_group_less(plain: dict[str, Any]) -> None:
    plain["groups"].pop()


def another_alias(plain: dict[str, Any]) -> None:
    plain["aliases"]["output"] = "elsewhere"


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (rename_shape, "a", "rank 0 has it as ['bfloat16', [4, 2]], rank 1 as ['bfloat16', [4, 3]]"),
        (another_dtype, "master_dtypes.a", "rank 1 has 'bfloat16', a rank before it 'float32'"),
        (another_layer_count, "pinned.model.layers", "rank 1 has 3, a rank before it 2"),
        (another_geometry, "pinned.geometry.weights.a.axis", "rank 1 has None, a rank before it 0"),
        (a_plain_value_for_a_section, "pinned.model", "rank 1 has None"),
        (another_rate, "rank 1", "its parameter groups are not rank 0's"),
        (a_group_less, "rank 1", "its parameter groups are not rank 0's"),
        (another_alias, "aliases.output", "rank 1 has 'elsewhere', a rank before it 'embedding'"),
    ],
)
def test_what_two_ranks_say_differently_is_named(
    change: Callable[[dict[str, Any]], None], where: str, what: str
) -> None:
    parts = plain(part("a"), part("a"))
    change(parts[1])
    with pytest.raises(UsageError) as refusal:
        united(parts)
    assert any(p.where == where and what in p.what for p in refusal.value.problems), refusal.value


def test_all_conflicts_come_at_once() -> None:
    parts = plain(part("a"), part("a"))
    for change in (rename_shape, another_dtype, another_rate):
        change(parts[1])
    with pytest.raises(UsageError) as refusal:
        united(parts)
    assert {p.where for p in refusal.value.problems} == {"a", "master_dtypes.a", "rank 1"}
