"""What the machines of the cluster are booted with: SLURM's, ssh's and the network's configuration, and keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTROLLER_ADDRESS = "10.77.0.254"

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=control({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Without cred_expire a job that is queued again waits for two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=300
MessageTimeout=5
TCPTimeout=1
NodeName=n[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=9 PreemptMode=OFF
"""

SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
# as in jobs: another number of threads sums in another order
SetEnv OMP_NUM_THREADS=1
"""

SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""

CONTROLLER_BOOT = """\
hostname control
mount --bind "$D/hosts" /etc/hosts
mount --bind "$D/nsswitch.conf" /etc/nsswitch.conf
# Where the environment has a ninja of its own, it would build anew what the tests' one has built.
theirs=$(PATH=${{PATH#*:}} type -P ninja || true)
[ -z "$theirs" ] || mount --bind "$theirs" "$(type -P ninja)"
ip link set lo up
ip link add lan type bridge
ip addr add {controller}/24 dev lan
ip link set lan up
munged --force --foreground --key-file="$D/munge.key" --socket="$D/munge.socket" --pid-file="$D/munged.pid" \\
    --log-file="$D/log/munged.log" --seed-file="$D/munge.seed" &
until [ -S "$D/munge.socket" ]; do sleep 0.02; done
slurmctld -D &
wait -n  # munge and SLURM end with the cluster; when one of them ends before, so does the cluster
"""

NODE_BOOT = """\
hostname {name}
mount --bind "$D/hosts" /etc/hosts
mount --bind "$D/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$D/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
until ip addr add {address}/24 dev eth0 2>/dev/null; do sleep 0.02; done
ip link set eth0 up
ip route add default via {controller}
mkdir -p /run/sshd
"$(command -v sshd)" -D -f "$D/sshd_config" &
slurmd -D -N {name} &
wait
"""


def address(node: int) -> str:
    return f"10.77.0.{node}"


def write_configuration(folder: Path, names: list[str]) -> None:
    """Everything that the boot scripts and the daemons read; keys of the cluster's own."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    values: Mapping[str, Any] = {"folder": folder, "controller": CONTROLLER_ADDRESS, "nodes": len(names)}
    for name, text in (("slurm.conf", SLURM_CONF), ("sshd_config", SSHD_CONFIG), ("ssh_config", SSH_CONFIG)):
        (folder / name).write_text(text.format(**values))
    hosts = ["127.0.0.1 localhost", f"{CONTROLLER_ADDRESS} control"]
    hosts += [f"{address(number)} {name}" for number, name in enumerate(names, 1)]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    services = Path("/etc/nsswitch.conf").read_text() if Path("/etc/nsswitch.conf").exists() else "hosts: files\n"
    # a name server cannot be reached from a node, and would be waited for
    (folder / "nsswitch.conf").write_text(re.sub(r"^hosts:.*", "hosts: files", services, flags=re.MULTILINE))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, capture_output=True)
    for operators in (Path.home() / ".cache" / "torch_extensions").glob("py*"):
        shutil.copytree(operators, folder / "extensions", ignore=shutil.ignore_patterns("lock"), dirs_exist_ok=True)
