"""A Megatron run over two hosts, TP within each and DP across: a node is lost, and it is the same run in the end."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NewRun
from tests.cluster.runs import MEGATRON, References
from tests.conftest import Ranks

pytestmark = pytest.mark.cluster


def test_a_node_is_lost(cluster: Cluster, new_run: NewRun, references: References, ranks: Ranks) -> None:
    run = new_run(
        MEGATRON, "run.steps=14", "run.save_every=4", "micro_batch_size=1", "global_batch_size=4", "model.layers=2"
    )
    reference = references.of(ranks, run, 4, "parallel.tensor=2")
    job = run.submit(RANKS_PER_NODE="2", TP="2")

    run.train_to(6)
    run.wait_for("the commit of step 4", lambda: run.committed() == [4])
    lost = 2  # SLURM begins with n1; not the batch script's host this time
    assert run.ranks_on(lost).keys() == {2, 3}
    cluster.kill_node(lost)
    cluster.declare_down(lost)
    run.allow(14)
    run.wait_for("the end of the job", lambda: run.job_is(job, "COMPLETED"))
    assert int(cluster.job(job)["Restarts"]) == 1
    assert run.first_steps() == {1: 1, 2: 5}
    assert run.ended(1) == {} and run.ended(2)["reason"] == "finished"
    run.require_equal(reference, last=14)
