#!/usr/bin/env bash
# Train on this machine alone, ranks started again when one fails. The same command starts and resumes.
#   launch/torchrun_local.sh launch/train_zero3.py --config configs/zero3_tiny.yaml --set run.steps=200
#   RANKS=4 launch/torchrun_local.sh launch/train_megatron.py --config configs/megatron_tiny.yaml
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck disable=SC1091
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi # EDIT: your environment
RANKS=${RANKS:-auto}      # one for each GPU; without one, for each core
RESTARTS=${RESTARTS:-3}

# Ranks that torchrun starts again must not read the addresses that the old ones left in its store (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# TERM and Ctrl-C reach torchrun, which passes them on to the ranks and waits until they have saved.
exec torchrun --standalone --nproc-per-node="$RANKS" --max-restarts="$RESTARTS" --shutdown-timeout=300 "$@"
