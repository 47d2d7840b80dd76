#!/usr/bin/env bash
# Train over several hosts with DeepSpeed's launcher, without a scheduler. The same command starts and resumes.
# Where this host reaches the others by ssh, without a password (pdsh is needed):
#   launch/deepspeed_hostfile.sh HOSTFILE --config configs/zero3_1b.yaml --set run.steps=1000
# Where it does not, on each host, with its number in the file (the first is 0):
#   NODE_RANK=1 launch/deepspeed_hostfile.sh HOSTFILE --config configs/zero3_1b.yaml --set run.steps=1000
# HOSTFILE has a line `NAME slots=GPUS` for each host. Repository and run directory must be on all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck disable=SC1091
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi # EDIT: your environment
TRAIN=${TRAIN:-launch/train_zero3.py}                              # EDIT: your script
PORT=${PORT:-29500}
# Variables that begin with NCCL or PYTHON go to all hosts; others do from a file .deepspeed_env, NAME=VALUE a line.
# export NCCL_SOCKET_IFNAME=ib0     # EDIT: where ranks find each other, if not on the first interface

hostfile=$1
shift
head=$(awk '$1 !~ /^#/ && NF { print $1; exit }' "$hostfile")
options=(--hostfile="$hostfile" --master_addr="$head" --master_port="$PORT")
if [[ ${NODE_RANK:-} ]]; then
    options+=(--no_ssh --node_rank="$NODE_RANK")
fi
exec deepspeed "${options[@]}" "$TRAIN" "$@"
