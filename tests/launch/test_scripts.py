"""The launch scripts: shellcheck finds nothing, and a batch script's life goes as the run directory says."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.run_dir import main as run_dir
from tests.ranks import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
BATCH = sorted(LAUNCH.glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if not shutil.which("shellcheck"):
        text = "shellcheck is missing; make cluster-tools installs it"
        if os.environ.get("RESUME_KIT_REQUIRE_CLUSTER") == "1":
            pytest.fail(text)
        pytest.skip(text)
    found = subprocess.run(
        ["shellcheck", "--external-sources", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_batch_script_can_be_queued_again(script: Path) -> None:
    text = script.read_text()
    for wanted in ("--requeue", "--signal=B:USR1@", "--open-mode=append", "set -euo pipefail"):
        assert wanted in text
    assert len(text.splitlines()) < 50


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "job.sh"], ids=lambda path: path.name)
def test_a_script_says_where_to_edit(script: Path) -> None:
    assert "# EDIT" in script.read_text()


# ---- job.sh, with stand-ins for SLURM, the ranks and the run directory


class Job:
    """`train` of job.sh in a process of its own. The commands that it calls note in `calls` that they were called."""

    def __init__(self, folder: Path, *, answer: str = "restart", listens: bool = True) -> None:
        self.calls = folder / "calls"
        self.calls.touch()
        bin_ = folder / "bin"
        bin_.mkdir()
        stop = 'echo stop >> "$CALLS"; touch "$FOLDER/stop"' if listens else "exit 1"
        for name, text in {
            "resume-kit": f'case $1 in next) echo "next" >> "$CALLS"; echo {answer} ;; stop) {stop} ;; esac',
            "scontrol": 'echo "$*" >> "$CALLS"',
        }.items():
            (bin_ / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (bin_ / name).chmod(0o755)
        # ranks end when they are asked to, or at once where there is nothing to wait for
        script = """
            set -euo pipefail
            source launch/job.sh
            ranks() {
                exec bash -c 'trap "exit 143" TERM; echo up >> "$CALLS"
                              until [[ -e $FOLDER/stop ]]; do sleep 0.02; done; exit 3'
            }
            train "$FOLDER/run" ranks
        """
        environment = {
            **os.environ,
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "FOLDER": str(folder),
            "SLURM_JOB_ID": "7",
        }
        self._folder = folder
        self._process = subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 10
        while "up" not in self.calls.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end_ranks(self) -> None:
        (self._folder / "stop").touch()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> tuple[int, list[str], str]:
        """Exit code, the calls in their order, the output."""
        output, _ = self._process.communicate(timeout=20)
        return self._process.returncode, self.calls.read_text().splitlines(), output.decode()


@pytest.mark.parametrize(
    ("answer", "code", "calls"),
    [
        ("restart", 0, ["up", "next", "requeue 7"]),
        ("finished", 0, ["up", "next"]),
        ("stop", 1, ["up", "next"]),
        ("running", 1, ["up", "next"]),
    ],
)
def test_what_comes_next_is_asked_of_the_run(answer: str, code: int, calls: list[str], tmp_path: Path) -> None:
    job = Job(tmp_path, answer=answer)
    job.wait_until_up()
    job.end_ranks()
    ended, called, output = job.wait()
    assert (ended, called) == (code, calls)
    assert "the ranks ended with 3" in output, "whatever their exit code was"
    assert ("not queued again" in output) == (code == 1)


def test_the_time_limit_is_passed_on_and_the_job_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_until_up()
    job.send(signal.SIGUSR1)
    code, calls, _ = job.wait()
    assert (code, calls) == (0, ["up", "stop", "next", "requeue 7"])


def test_a_run_that_does_not_listen_yet_is_ended(tmp_path: Path) -> None:
    job = Job(tmp_path, listens=False)
    job.wait_until_up()
    job.send(signal.SIGUSR1)
    code, calls, output = job.wait()
    assert (code, calls) == (0, ["up", "next", "requeue 7"])
    assert "the ranks ended with 143" in output


def test_a_job_that_slurm_takes_away_waits_for_its_ranks_and_leaves_the_rest_to_slurm(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_until_up()
    job.send(signal.SIGTERM)
    time.sleep(0.2)
    assert job.calls.read_text().split() == ["up"], "the ranks have not ended"
    job.end_ranks()
    code, calls, _ = job.wait()
    assert (code, calls) == (143, ["up"])


# ---- start_torchrun, with stand-ins for SLURM and torchrun: `scontrol` says of job N what the file job-N says


def start_torchrun(folder: Path, jobs: Mapping[int, str], **environment: str) -> subprocess.CompletedProcess[str]:
    for job, said in jobs.items():
        (folder / f"job-{job}").write_text(f"JobId={job} ReqNodeList=(null) {said}\n")
    words = 'if [[ $2 == hostnames ]]; then echo "$3" | tr , "\\n"; elif [[ $2 == job ]]; then cat "$FOLDER/job-$3"'
    torchrun = 'echo "of $SLURM_JOB_ID-$SLURM_RESTART_COUNT: torchrun $*"; eval "${THEN:-:}"'
    for name, text in {
        "scontrol": f'{words}; else echo "$*"; fi',
        "srun": 'while [[ $1 == -* ]]; do echo "srun $1"; shift; done; exec "$@"',
        "torchrun": torchrun,
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    given = {
        **{"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_NNODES": "2", "SLURMD_NODENAME": "n2"},
        **{"LOGS": str(folder), "FOLDER": str(folder), "RANKS_PER_NODE": "8", "RESTARTS": "3", "ELASTIC": ""},
        "PATH": f"{folder}:{os.environ['PATH']}",
        **environment,
    }
    return subprocess.run(
        ["bash", "-c", "set -euo pipefail; source launch/job.sh; start_torchrun train.py"],
        cwd=ROOT,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


RUNS = "JobState=RUNNING Restarts=1 NodeList=n1,n2 BatchHost=n1"


def test_without_elasticity_all_nodes_end_with_the_first(tmp_path: Path) -> None:
    said = start_torchrun(tmp_path, {7: RUNS}).stdout
    assert "srun --kill-on-bad-exit=1\n" in said and "no-kill" not in said
    assert "--nnodes=2 " in said and "--rdzv-endpoint=n1:20007 --rdzv-id=7-1 " in said and "rdzv-conf" not in said


def test_an_elastic_job_outlives_its_nodes(tmp_path: Path) -> None:
    said = start_torchrun(tmp_path, {7: RUNS}, ELASTIC="2:4").stdout
    assert {"srun --kill-on-bad-exit=0", "srun --no-kill", "srun --wait=0"} <= set(said.splitlines())
    assert "--nnodes=2:4 " in said and "--rdzv-conf=last_call_timeout=30 " in said


def test_a_job_that_joins_another_is_to_its_ranks_that_other(tmp_path: Path) -> None:
    jobs = {7: "JobState=RUNNING Restarts=0 NodeList=n9 BatchHost=n9", 6: RUNS}
    said = start_torchrun(tmp_path, jobs, ELASTIC="2:4", JOIN="6", SLURM_RESTART_COUNT="0").stdout
    assert "of 6-1: torchrun" in said and "--rdzv-endpoint=n1:20006 --rdzv-id=6-1 " in said


def test_nobody_joins_a_job_that_is_over(tmp_path: Path) -> None:
    ended = start_torchrun(tmp_path, {6: RUNS.replace("RUNNING", "COMPLETED")}, ELASTIC="2:4", JOIN="6")
    assert ended.returncode == 1 and "job 6, which this one was to join, does not run: COMPLETED" in ended.stderr
    assert "torchrun" not in ended.stdout


@pytest.mark.parametrize(
    ("said", "requeued"),
    [(RUNS, False), (RUNS.replace("n1,n2", "n2"), True), (RUNS.replace("s=1", "s=2"), True), ("", False)],
)
def test_an_elastic_job_that_has_lost_its_head_is_queued_again(said: str, requeued: bool, tmp_path: Path) -> None:
    then = f'sleep 0.3; echo "{said}" > "$FOLDER/job-6"; sleep 1.2'
    ended = start_torchrun(tmp_path, {6: RUNS}, ELASTIC="2:4", JOIN="6", LOOK_EVERY="1", THEN=then)
    assert ("requeue 7" in ended.stdout) == requeued, ended.stdout + ended.stderr


# ---- the run directory of a configuration


def test_the_run_directory_is_that_of_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs" / "megatron_tiny.yaml")]
    assert run_dir(["megatron", *arguments]) == 0
    assert run_dir(["megatron", *arguments, "--set", "run.dir=/scratch/mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(Path("runs/megatron_tiny").absolute()), "/scratch/mine"]


def test_a_wrong_configuration_has_no_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs" / "zero3_tiny.yaml"), "--set", "run.dri=x"]
    assert run_dir(["zero3", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "did you mean 'run.dir'?" in shown.err


def test_scripts_that_people_start_can_be_executed() -> None:
    for script in (LAUNCH / "torchrun_local.sh", LAUNCH / "deepspeed_hostfile.sh"):
        assert script.stat().st_mode & stat.S_IXUSR
