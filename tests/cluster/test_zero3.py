"""A ZeRO-3 run over two hosts, with two ranks each: stopped twice, a node lost, and the same run in the end."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NewRun
from tests.cluster.runs import ZERO3, References
from tests.conftest import Ranks

pytestmark = pytest.mark.cluster


def test_stopped_by_signals_and_a_node_lost(
    cluster: Cluster, new_run: NewRun, references: References, ranks: Ranks
) -> None:
    run = new_run(ZERO3, "run.steps=40", "run.save_every=5", "micro_batch_size=1")
    reference = references.of(ranks, run, 4)
    job = run.submit(RANKS_PER_NODE="2")

    run.train_to(7)
    cluster.run(None, "scancel", "--batch", "--signal=USR1", str(job))  # as SLURM does before the time limit
    stopped = run.wait_for("a request to stop", lambda: list(run.directory.glob("attempts/*/stop")))
    assert [path.parent.name for path in stopped] == ["000001"]
    run.walk("the end of attempt 1", lambda: run.ended(1), last=18)
    first = run.ended(1)
    assert first["reason"] == "preempted" and first["step"] > 7
    assert run.events("commit")[-1]["step"] == first["step"], "the last step before the end is a checkpoint"

    run.wait_for("the job again", lambda: run.job_is(job, "RUNNING", restarts=1))
    run.train_to(first["step"] + 2, attempt=2)
    urgent = ("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", f"--output={run.folder}/urgent.log")
    cluster.run(None, "sbatch", *urgent)  # takes the nodes away: TERM to the ranks, and GraceTime
    run.walk("the end of attempt 2", lambda: run.ended(2), last=30)
    second = run.ended(2)
    assert second["reason"] == "preempted" and second["step"] <= first["step"] + 5, "TERM is heard at the next step"

    run.wait_for("the job again", lambda: run.job_is(job, "RUNNING", restarts=2))
    run.train_to(second["step"] + 2, attempt=3)
    head = cluster.job(job)["BatchHost"]
    lost = int(head.removeprefix("n"))
    cluster.kill_node(lost)
    cluster.declare_down(lost)
    run.allow(40)
    run.wait_for("the end of the job", lambda: run.job_is(job, "COMPLETED"))
    assert head not in cluster.job(job)["NodeList"]
    assert run.ended(3) == {}, "it died without a word"
    assert run.ended(4)["reason"] == "finished"
    assert run.next() == "finished"

    starts = run.first_steps()
    assert starts[2] == first["step"] + 1 and starts[3] == second["step"] + 1, "nothing was trained again"
    assert starts[4] == 1 + max(e["step"] for e in run.events("commit") if e["attempt"] < 4)
    assert [event["step"] for event in run.events("preempt")] == [first["step"], second["step"]]
    run.require_equal(reference, last=40)
