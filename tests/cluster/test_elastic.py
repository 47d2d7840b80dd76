"""Elastic jobs: a node loses its power, torchrun goes on with the rest, and takes in one that another job lends."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NewRun
from tests.cluster.runs import ZERO3, References
from tests.conftest import Ranks

pytestmark = pytest.mark.cluster

WITHOUT_DROPOUT = ("model.resid_pdrop=0.0", "model.embd_pdrop=0.0", "model.attn_pdrop=0.0")
"""Masks are drawn on each rank: other ranks, other masks."""
ASKED = "closing signal SIGTERM"
"""What torchrun says when it ends a rank."""


ELASTIC = {"RANKS_PER_NODE": "1", "LAST_CALL": "3", "LOOK_EVERY": "2"}
SETTINGS = (
    "run.save_every=4",
    "run.hang_after=10",
    "micro_batch_size=1",
    "global_batch_size=6",
    "policy.preset=flexible",
)


def test_three_nodes_then_two_then_three_in_one_job(
    cluster: Cluster, new_run: NewRun, references: References, ranks: Ranks
) -> None:
    run = new_run(ZERO3, "run.steps=16", *SETTINGS, *WITHOUT_DROPOUT)
    reference = references.of(ranks, run, 3)
    job = run.submit(options=("--nodes=3", "--no-kill"), ELASTIC="2:3", **ELASTIC)

    run.train_to(6)
    run.wait_for("the commit of step 4", lambda: run.committed() == [4])
    cluster.kill_node(2)  # the harder way: no connection is closed, the others wait in a collective
    run.train_to(10, attempt=2)
    assert run.job_is(job, "RUNNING", restarts=0), "torchrun did it; SLURM was not asked"

    run.wait_for("SLURM to know", lambda: cluster.node_state(2).startswith("DOWN"))
    cluster.boot_node(2)
    asked = run.output().count(ASKED)
    lender = run.submit(options=("--nodes=1",), ELASTIC="2:3", JOIN=str(job), **ELASTIC)
    run.wait_for("the ranks to be asked to end", lambda: run.output().count(ASKED) == asked + 2)
    run.allow(16)
    run.wait_for("the end of the jobs", lambda: all(run.job_is(one, "COMPLETED") for one in (job, lender)))

    assert [event["world_size"] for event in run.events("start")] == [3, 2, 3]
    assert run.first_steps() == {1: 1, 2: 5, 3: 1 + run.ended(2)["step"]}
    assert [run.ended(attempt)["reason"] for attempt in (1, 2, 3)] == ["failed", "preempted", "finished"]
    assert "no progress for 10 s" in run.ended(1)["by"]
    run.require_alike(reference, last=16)


def test_the_head_node_is_lost(cluster: Cluster, new_run: NewRun, references: References, ranks: Ranks) -> None:
    """SLURM leaves the job with --no-kill without its batch script: another node has to queue it again."""
    run = new_run(ZERO3, "run.steps=8", *SETTINGS)
    reference = references.of(ranks, run, 2)
    job = run.submit(options=("--nodes=2", "--no-kill"), ELASTIC="1:2", **ELASTIC)
    run.train_to(6)
    run.wait_for("the commit of step 4", lambda: run.committed() == [4])
    assert cluster.job(job)["BatchHost"] == "n1"
    cluster.kill_node(1)
    cluster.declare_down(1)
    run.allow(8)
    run.wait_for("the end of the job", lambda: run.job_is(job, "COMPLETED", restarts=1))
    assert run.first_steps() == {1: 1, 2: 5}
    assert run.ended(2)["reason"] == "finished"
    run.require_equal(reference, last=8)
