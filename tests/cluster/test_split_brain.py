"""One node, two ranks: a rank dies and torchrun starts it again; the node is cut off, trains on, and is shut out."""

from __future__ import annotations

import json

import pytest

from resume_kit.checkpoint.names import step_directory
from resume_kit.recovery.attempts import read_attempts
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NewRun
from tests.cluster.runs import ZERO3, References
from tests.conftest import Ranks

pytestmark = pytest.mark.cluster


def test_a_rank_killed_then_its_node_cut_off(
    cluster: Cluster, new_run: NewRun, references: References, ranks: Ranks
) -> None:
    run = new_run(ZERO3, "run.steps=80", "run.save_every=4", "micro_batch_size=1")
    reference = references.of(ranks, run, 2)
    job = run.submit(options=("--nodes=1",), RANKS_PER_NODE="2", RESTARTS="2")

    run.train_to(6)
    run.wait_for("the commit of step 4", lambda: run.committed() == [4])
    node = int(cluster.job(job)["BatchHost"].removeprefix("n"))
    run.kill_rank(node, 1)
    run.train_to(7, attempt=2)
    assert int(cluster.job(job)["Restarts"]) == 0, "torchrun did it; SLURM was not asked"
    assert run.first_steps()[2] == 5

    # the node is cut off and trains on: its disk is the run's, and nobody can tell it to stop
    cluster.cut_off(node)
    cluster.declare_down(node)
    run.walk("a new attempt", lambda: len(run.events("start")) == 3, last=70)
    run.walk("its first step", lambda: 3 in run.first_steps(), last=76)
    assert cluster.job(job)["BatchHost"] != f"n{node}"
    old, new = read_attempts(run.directory)[1:3]
    assert new.took_over == 2 and old.fenced_by == 3
    assert old.identity and new.identity and old.identity.host != new.identity.host

    # the old ranks end by themselves at their next step, though nobody reaches them; and when their torchrun starts
    # them again, as it does after any failure, they find the run taken
    run.walk("the end of the old torchrun", lambda: not run.processes_on(node), last=79, timeout=90)
    run.allow(80)
    run.wait_for("the end of the job", lambda: run.job_is(job, "COMPLETED"))
    cluster.heal(node)
    assert not run.processes_on(node), "nothing is left that could write once the node is back"

    events = run.events()
    began = next(place for place, event in enumerate(events) if event["event"] == "start" and event["attempt"] == 3)
    assert {event["attempt"] for event in events[began:] if event["event"] in ("step", "save", "commit")} == {3}
    assert not [event for event in events[began:] if event["attempt"] < 3], "the old attempt wrote to the journal"
    commits = {event["step"]: event["attempt"] for event in run.events("commit")}
    last_of_old = max(step for step, attempt in commits.items() if attempt == 2)
    assert last_of_old >= 8, "the old attempt went on for a while"
    assert run.first_steps()[3] == last_of_old + 1
    for step, attempt in commits.items():
        manifest = json.loads((run.directory / step_directory(step) / "manifest.json").read_text())
        assert manifest["attempt"] == attempt, "the checkpoint is the one that the journal tells of"
    assert run.ended(2)["reason"] == "fenced" and run.ended(3)["reason"] == "finished"
    assert "holds" in run.output() and "(exitcode: 76)" in run.output()
    run.require_equal(reference, last=80)
