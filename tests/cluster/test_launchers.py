"""The other launchers over real hosts, and a run that changes its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NewRun
from tests.cluster.runs import MEGATRON, WITHOUT_GPUS, ZERO3, References
from tests.conftest import Ranks
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster


def test_deepspeeds_launcher_by_slurm_by_hostfile_and_by_hand(
    cluster: Cluster, new_run: NewRun, references: References, ranks: Ranks, tmp_path: Path
) -> None:
    """One run of two hosts; each launcher trains it on from where the one before has left it."""
    run = new_run(ZERO3, "run.save_every=2", "micro_batch_size=1")
    reference = references.of(ranks, run, 2, "run.steps=9")

    job = run.submit("run.steps=3", paced=False, RANKS_PER_NODE="1", LAUNCHER="deepspeed")
    run.wait_for("the end of the job", lambda: run.job_is(job, "COMPLETED"))

    script = str(ROOT / "launch" / "deepspeed_hostfile.sh")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n3 slots=1\nn4 slots=1\n")
    by_ssh = cluster.run(3, script, str(hostfile), *run.arguments("run.steps=6"), timeout=120)
    assert "n4: " in by_ssh.stdout, "pdsh names the host of each line"

    by_hand = [
        cluster.start_on(
            node,
            *(script, str(hostfile), *run.arguments("run.steps=9")),
            output=run.folder / f"n{node}.out",
            NODE_RANK=str(rank),
        )
        for rank, node in enumerate((3, 4))
    ]
    run.wait_for("both launchers", lambda: all(one.poll() is not None for one in by_hand))
    assert [one.returncode for one in by_hand] == [0, 0]

    assert [event["host"] for event in run.events("start")] == ["n1", "n3", "n3"]
    assert [event["world_size"] for event in run.events("start")] == [2, 2, 2]
    assert run.first_steps() == {1: 1, 2: 3, 3: 7}
    run.require_equal(reference, last=9)


def test_four_nodes_then_two_then_four(new_run: NewRun, references: References, ranks: Ranks) -> None:
    """The same global batch whatever the number of nodes; the ranks are under srun alone."""
    run = new_run(
        MEGATRON,
        *("run.save_every=2", "micro_batch_size=1", "global_batch_size=4", "model.layers=2", "policy.preset=flexible"),
    )
    reference = references.of(ranks, run, 4, "run.steps=12")
    for nodes, steps in ((4, 4), (2, 8), (4, 12)):
        options = (f"--nodes={nodes}",)
        job = run.submit(f"run.steps={steps}", options=options, paced=False, RANKS_PER_NODE="1", LAUNCHER="srun")
        run.wait_for(f"the end of the job on {nodes} nodes", lambda job=job: run.job_is(job, "COMPLETED"))

    assert [event["world_size"] for event in run.events("start")] == [4, 2, 4]
    assert run.first_steps() == {1: 1, 2: 5, 3: 9}
    assert run.committed() == [2, 4, 6, 8, 10, 12]
    for ours, right in zip(run.steps(), reference, strict=True):
        assert (ours["step"], ours["samples"], ours["batch"]) == (right["step"], right["samples"], right["batch"])
        assert ours["loss"] == pytest.approx(right["loss"], abs=5e-3)


@pytest.mark.parametrize("script", ["zero3.sbatch", "megatron.sbatch"])
def test_slurm_takes_the_script(cluster: Cluster, script: str) -> None:
    path = str(ROOT / "launch" / script)
    planned = cluster.run(None, "sbatch", "--test-only", *WITHOUT_GPUS, path, "--config", "configs/zero3_tiny.yaml")
    assert "to start at" in planned.stderr and "in partition main" in planned.stderr
    too_many = cluster.run(None, "sbatch", "--test-only", *WITHOUT_GPUS, "--nodes=9", path, check=False)
    assert too_many.returncode != 0


def test_a_configuration_that_cannot_be_ends_the_job_before_any_rank_starts(cluster: Cluster, new_run: NewRun) -> None:
    run = new_run(ZERO3)
    job = run.submit("run.stesp=3", paced=False, RANKS_PER_NODE="1")
    run.wait_for("the end of the job", lambda: run.job_is(job, "FAILED"), timeout=30)
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "'run.stesp'; did you mean 'run.steps'?" in run.output()
    assert not run.directory.exists()
