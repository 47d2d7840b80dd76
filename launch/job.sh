#!/usr/bin/env bash
# What the batch scripts share; they source it. Functions to start the ranks, and `train`, the life of a job:
# ranks start in the background; a stop that SLURM announces is passed on to the run; and once the ranks have ended,
# the run directory says whether the job is queued again. Exit codes do not say: torchrun hides them.

# train RUN START ARGUMENTS...: START is one of the functions below; it becomes the ranks' launcher. Does not return.
train() {
    local run=$1 began=$EPOCHSECONDS cancelled='' status=0 next
    shift
    # USR1 comes before the time limit, see --signal. All ranks save at the end of their step, and end.
    trap 'ask_to_stop "$run"' USR1
    # TERM: a person or the scheduler takes the job away. The ranks get it too, and save; SLURM knows what is next.
    trap 'cancelled=yes' TERM
    "$@" &
    ranks=$!
    # a signal interrupts `wait`, not the ranks
    while kill -0 "$ranks" 2>/dev/null; do
        status=0
        wait "$ranks" || status=$?
    done
    echo "job ${SLURM_JOB_ID}: the ranks ended with ${status}"
    if [[ $cancelled ]]; then
        exit 143
    fi
    next=$(resume-kit next "$run" --since "$began")
    case $next in
        finished) exit 0 ;;
        restart) ;;
        *) # stop: a person must look, or no attempt was made at all. running: another job holds the run.
            echo "job ${SLURM_JOB_ID} is not queued again: ${next}" >&2
            exit 1
            ;;
    esac
    echo "job ${SLURM_JOB_ID} is queued again"
    scontrol requeue "$SLURM_JOB_ID" # the last line: it ends this script
}

# A run that has not begun to listen is ended by TERM: it has nothing to save.
ask_to_stop() {
    echo "job ${SLURM_JOB_ID}: the time limit is near"
    resume-kit stop "$1" --reason "time limit of job ${SLURM_JOB_ID}" || kill -TERM "$ranks"
}

# One torchrun on each node, which starts the node's ranks, and starts them again when one fails.
start_torchrun() {
    local restart=${SLURM_RESTART_COUNT:-0}
    # ranks that torchrun starts again must not read the addresses that the old ones left in its store (pytorch#135712)
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # a name that no earlier start of this job has: a node that was cut off must not join this one
    # shellcheck disable=SC2016  # the node's name is known on the node
    exec srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        bash -c 'exec torchrun --log-dir "$LOGS/$SLURMD_NODENAME" "$@"' torchrun \
        --nnodes="${ELASTIC:-$SLURM_NNODES}" --nproc-per-node="$RANKS_PER_NODE" --max-restarts="$RESTARTS" \
        --rdzv-backend=c10d --rdzv-endpoint="$(head_node):$(port)" --rdzv-id="${SLURM_JOB_ID}-${restart}" \
        --redirects=3 --tee=0:3 --shutdown-timeout=300 "$@"
}

# One task for each rank, by srun alone: no restart within a job. CPUs are shared out evenly.
start_srun() {
    exec srun --ntasks="$((SLURM_NNODES * RANKS_PER_NODE))" --ntasks-per-node="$RANKS_PER_NODE" \
        --cpus-per-task="$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))" --gpu-bind=none --kill-on-bad-exit=1 \
        --output="$LOGS/rank-%t.log" python -u "$@"
}

# The same through DeepSpeed's launcher: it takes hosts and ranks from a file, and calls srun.
start_deepspeed() {
    local options="--ntasks-per-node=${RANKS_PER_NODE} --cpus-per-task=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))"
    options+=" --gpu-bind=none --kill-on-bad-exit=1 --output=${LOGS}/rank-%t.log"
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=${RANKS_PER_NODE}/" >"$LOGS/hostfile"
    exec deepspeed --hostfile="$LOGS/hostfile" --launcher=slurm --launcher_args="$options" --no_ssh_check \
        --master_addr="$(head_node)" --master_port="$(port)" "$@"
}

head_node() {
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${nodes[0]}"
}

# Two jobs of one node do not meet.
port() {
    echo $((20000 + SLURM_JOB_ID % 10000))
}
