"""A real SLURM cluster on one machine, for tests: nodes are namespaces that can be killed, booted and cut off.

The controller has network, PID, mount and UTS namespaces of its own, with munge and slurmctld in it and a bridge as
the network's switch. Each node is nested in it: an own host name and address, slurmd and sshd, its own /dev/shm. All
share the machine's disks: a run directory is on every node, whatever becomes of the network.

Nothing is left behind, and two clusters do not meet: every process is in the controller's PID namespace and dies with
its first process; that one dies with whoever started the cluster; interfaces and mounts go with their namespaces.
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.cluster.configuration import CONTROLLER_ADDRESS, CONTROLLER_BOOT, NODE_BOOT, address, write_configuration
from tests.ranks import ROOT

Found = TypeVar("Found")

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}
"""What a cluster is made of, and the Debian package of each; `make cluster-tools` installs them."""


def missing_parts() -> list[str]:
    """Why no cluster can be started here, a line each; empty where one can."""
    missing = [f"{name} is missing (Debian: {package})" for name, package in PROGRAMS.items() if not shutil.which(name)]
    if os.geteuid() != 0:
        missing.append("namespaces and daemons need root")
    if missing:
        return missing
    # by doing it: capabilities, seccomp and the kernel's configuration all have a say
    trial = "unshare --net --uts --ipc --mount --pid --fork --mount-proc -- sh -c"
    made = subprocess.run(
        [*trial.split(), "ip link add lan type bridge && ip link add v1 type veth peer name v2"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [f"no namespaces and bridges here: {made.stderr.strip()}"] if made.returncode else []


class ClusterError(RuntimeError):
    """The cluster did not do what was asked of it; the text has the ends of its logs."""


class Cluster:
    """`nodes` SLURM nodes named n1, n2, …; a context manager. `folder` takes configuration, logs and spool."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._controller: subprocess.Popen[bytes] | None = None
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "D": str(folder),
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            # a rank that is killed while torch builds an operator leaves a lock that all later starts wait for
            "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        }

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- the machines

    def start(self) -> None:
        """Boot all, and return when every node is idle."""
        write_configuration(self.folder, self.names)
        atexit.register(self.stop)
        # the first process dies with this one, and all the others with it
        self._controller = self._boot("setpriv --pdeathsig KILL", CONTROLLER_BOOT.format(controller=CONTROLLER_ADDRESS))
        self.wait_for("the controller", lambda: self._try("scontrol", "ping").returncode == 0, timeout=30)
        for number in range(1, len(self.names) + 1):
            self.boot_node(number, wait=False)
        self.wait_for("idle nodes", lambda: all(self.node_state(n) == "IDLE" for n in range(1, len(self.names) + 1)))

    def stop(self) -> None:
        """End every process of the cluster. Nothing to do where it does not run."""
        atexit.unregister(self.stop)
        if self._controller is not None:
            _power_off(self._controller)
        for process in self._nodes.values():
            process.wait()
        self._controller, self._nodes = None, {}

    def boot_node(self, number: int, *, wait: bool = True) -> None:
        """Start a node, and wait until SLURM uses it."""
        name = self.names[number - 1]
        script = NODE_BOOT.format(name=name, address=address(number), controller=CONTROLLER_ADDRESS)
        self._nodes[number] = self._boot(f"nsenter --target {self._init(None)} --net --uts --mount --pid", script)
        wire = f"ip link add v{number} type veth peer name eth0 netns /proc/{self._init(number)}/ns/net"
        self._switch(wire)
        self._switch(f"ip link set v{number} master lan up")
        if wait:  # a node that SLURM knows to be down is idle again once slurmd has registered
            self.wait_for(f"{name} idle", lambda: self.node_state(number) == "IDLE")

    def kill_node(self, number: int) -> None:
        """Power off: its processes are gone, and nobody on the network is told."""
        self._switch(f"ip link set v{number} down")
        _power_off(self._nodes.pop(number))
        self._switch(f"ip link del v{number}", check=False)  # the kernel does so too, in its own time

    def declare_down(self, number: int, reason: str = "power lost") -> None:
        """What SLURM finds out by itself after SlurmdTimeout, at once: its jobs are queued again."""
        self._control("scontrol", "update", f"nodename={self.names[number - 1]}", "state=down", f"reason={reason}")

    def cut_off(self, number: int) -> None:
        """Take a node off the network. Its processes, and its disks, go on."""
        self._switch(f"ip link set v{number} down")

    def heal(self, number: int) -> None:
        self._switch(f"ip link set v{number} up")

    def repair(self) -> None:
        """Every node on the network, running, and idle; one that SLURM takes for down is switched off and on."""
        everyone = range(1, len(self.names) + 1)
        for number in everyone:
            if number in self._nodes and not self.node_state(number).startswith("DOWN"):
                self.heal(number)
                continue
            if number in self._nodes:
                self.kill_node(number)
            self.declare_down(number, "repair")  # nothing of a job is waited for
            self.boot_node(number, wait=False)
        self.wait_for("idle nodes", lambda: all(self.node_state(number) == "IDLE" for number in everyone))

    def node_state(self, number: int) -> str:
        """IDLE, ALLOCATED, DOWN, … ; with SLURM's marks behind, `IDLE+DRAIN`, `DOWN*`."""
        shown = self._try("scontrol", "show", "node", self.names[number - 1], "--oneliner").stdout
        found = re.search(r"State=(\S+)", shown)
        started = re.search(r"SlurmdStartTime=(\S+)", shown)
        return found[1] if found and started and started[1] not in ("None", "Unknown") else "UNKNOWN"

    def pids(self, number: int) -> list[int]:
        """All processes of a node, as this machine numbers them."""
        init = f"/proc/{self._init(number)}/ns/pid"
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == os.readlink(init):
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
        return found

    # ---- work

    def run(
        self, node: int | None, *command: str, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, or on the controller (None), in the repository's root, and return its output."""
        done = subprocess.run(
            self.inside(node, *command),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"{shlex.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start_on(self, node: int, *command: str, output: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start a command on a node; its output goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                self.inside(node, *command),
                env={**self.environment, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **env: str) -> int:
        """`sbatch options script arguments`; the job's id."""
        command = ("sbatch", "--parsable", *options, str(script), *arguments)
        variables = [f"{name}={value}" for name, value in env.items()]
        return int(self._control("env", *variables, *command).stdout)

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, by its names: JobState, Restarts, NodeList, …"""
        shown = self._control("scontrol", "show", "job", str(job), "--oneliner").stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait_for(self, what: str, look: Callable[[], Found | None], timeout: float = 60) -> Found:
        """Call `look` until it returns something true, and return that. Raises `ClusterError` with the logs' ends."""
        deadline = time.monotonic() + timeout
        while not (found := look()):
            if time.monotonic() > deadline:
                raise ClusterError(f"{what}: not within {timeout:.0f} s\n{self._state()}")
            if self._controller is not None and self._controller.poll() is not None:
                raise ClusterError(f"{what}: the controller has ended\n{self._state()}")
            time.sleep(0.1)
        return found

    # ---- inside

    def _boot(self, prefix: str, script: str) -> subprocess.Popen[bytes]:
        unshare = "unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc -- bash -euc"
        with (self.folder / "log" / "boot.log").open("ab") as log:
            return subprocess.Popen(
                [*prefix.split(), *unshare.split(), script],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _init(self, node: int | None) -> int:
        """The first process of a machine, as this machine numbers it."""
        process = self._controller if node is None else self._nodes.get(node)
        if process is None:
            raise ClusterError("the cluster does not run" if node is None else f"n{node} is off")
        # setpriv becomes unshare; nsenter starts it
        generations = 1 if node is None else 2
        return self.wait_for("a first process", lambda: _descendant(process.pid, generations), timeout=10)

    def inside(self, node: int | None, *command: str) -> list[str]:
        enter = f"nsenter --target {self._init(node)} --net --uts --ipc --mount --pid -- env --chdir={ROOT}"
        return [*enter.split(), *command]

    def _switch(self, command: str, *, check: bool = True) -> None:
        enter = f"nsenter --target {self._init(None)} --net --"
        subprocess.run([*enter.split(), *command.split()], check=check, capture_output=True)

    def _control(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(None, *command, check=check)

    def _try(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self._control(*command, check=False)

    def _state(self) -> str:
        ends = []
        for name in ("boot.log", "slurmctld.log"):
            lines = (self.folder / "log" / name).read_text(errors="replace").splitlines()
            ends += [f"--- {name}", *lines[-8:]]
        if self._controller is not None and self._controller.poll() is None:
            ends += [self._try("sinfo").stdout, self._try("squeue").stdout]
        return "\n".join(ends)


def _descendant(pid: int, generations: int) -> int | None:
    for _ in range(generations):
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return None
        if not children:
            return None
        pid = int(children[0])
    # before it has become the machine's first program, it may still be in the namespaces around it
    try:
        return pid if (Path(f"/proc/{pid}/cmdline").read_bytes()).startswith(b"bash") else None
    except OSError:
        return None


def _power_off(process: subprocess.Popen[bytes]) -> None:
    for generations in (2, 1):
        if (init := _descendant(process.pid, generations)) is not None:
            os.kill(init, signal.SIGKILL)
            break
    process.wait(timeout=30)
