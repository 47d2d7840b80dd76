"""Ranks under srun: SLURM's variables become the launcher's."""

from __future__ import annotations

import pytest

from launch.slurm import adopt_slurm, first_host
from resume_kit.errors import UsageError

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "10",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


def test_a_rank_of_srun_finds_its_place() -> None:
    environment = dict(SLURM)
    adopt_slurm(environment)
    assert {name: value for name, value in environment.items() if name not in SLURM} == {
        "RANK": "5",
        "WORLD_SIZE": "10",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24567",
    }


def test_the_last_node_may_have_fewer_ranks() -> None:
    environment = {**SLURM, "SLURM_NODEID": "2"}
    adopt_slurm(environment)
    assert environment["LOCAL_WORLD_SIZE"] == "2"


def test_what_is_set_stays() -> None:
    environment = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "9"}
    adopt_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "9")


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {**SLURM, "RANK": "0", "WORLD_SIZE": "2"}])
def test_another_launcher_or_none_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_variable_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        adopt_slurm({name: value for name, value in SLURM.items() if name != missing})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]-gpu", "rack1-gpu"),
        ("a-b-12", "a-b-12"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_no_nodes_is_told() -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        first_host("")
