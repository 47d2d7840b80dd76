#!/usr/bin/env bash
# What the batch scripts share; they source it. Functions to start the ranks, and `train`, the life of a job:
# ranks start in the background; a stop that SLURM announces is passed on to the run; and once the ranks have ended,
# the run directory says whether the job is queued again. Exit codes do not say: torchrun hides them.

# train RUN START ARGUMENTS...: START is one of the functions below; it becomes the ranks' launcher. Does not return.
train() {
    local run=$1 cancelled='' status=0 next
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
    if [[ ${JOIN:-} ]]; then # the job that lent its nodes to another leaves it to that one what comes next
        exit "$status"
    fi
    next=$(resume-kit next "$run")
    case $next in
        finished) exit 0 ;;
        restart) ;;
        *) # stop: a person must look. running: another job holds the run.
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
    resume-kit stop "$1" --reason "time limit of job ${SLURM_JOB_ID}" || kill -TERM "$!"
}

# One torchrun on each node, which starts the node's ranks, and starts them again when one fails.
# ELASTIC=MIN:MAX: it goes on with as many nodes as are left, and takes in those of jobs that JOIN this one.
start_torchrun() {
    local job=${JOIN:-$SLURM_JOB_ID} step=(--kill-on-bad-exit=1) rendezvous=()
    wait_for_job "$job"
    HEAD=$(of_job "$job" BatchHost)
    START=$job-$(of_job "$job" Restarts) # no earlier start of the job has it: a node that was cut off must not join
    if [[ $ELASTIC ]]; then
        step=(--kill-on-bad-exit=0 --no-kill --wait=0) # whatever becomes of one node, the others stay
        rendezvous=(--rdzv-conf="last_call_timeout=${LAST_CALL:-30}")
        export HEAD START
        export -f go_elastic watch_head of_job holds
    fi
    # ranks that torchrun starts again must not read the addresses that the old ones left in its store (pytorch#135712)
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # shellcheck disable=SC2016  # what is in quotes is known on the node
    exec srun --ntasks-per-node=1 --cpu-bind=none "${step[@]}" \
        bash -c 'if [[ $ELASTIC ]]; then go_elastic $$; fi
                 exec torchrun --log-dir "$LOGS/$SLURMD_NODENAME" "$@"' torchrun \
        --nnodes="${ELASTIC:-$SLURM_NNODES}" --nproc-per-node="$RANKS_PER_NODE" --max-restarts="$RESTARTS" \
        --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$(port "$job")" --rdzv-id="$START" \
        "${rendezvous[@]}" --redirects=3 --tee=0:3 --shutdown-timeout=300 "$@"
}

# go_elastic PROCESS: on a node, where that process becomes torchrun. To its ranks all nodes are of the job that was first.
go_elastic() {
    watch_head "$1" "$SLURM_JOB_ID" &
    export SLURM_JOB_ID=${START%-*} SLURM_RESTART_COUNT=${START#*-}
}

# The head node has torchrun's meeting point and the batch script. Once SLURM has taken it out of the job (--no-kill) the
# job would last until its time limit, doing nothing: the other nodes queue it again, and jobs that have joined it too.
watch_head() {
    local job=${START%-*} starts nodes second=0
    while sleep 1 && [[ -e /proc/$1/exe ]]; do
        ((++second % ${LOOK_EVERY:-30})) && continue
        starts=$(of_job "$job" Restarts)
        nodes=$(of_job "$job" NodeList)
        [[ $starts && $nodes ]] || continue # the controller does not answer, or the job waits in the queue
        if [[ $starts != "${START#*-}" ]] || ! holds "$nodes" "$HEAD"; then
            echo "job $2 is queued again: job ${job} has lost ${HEAD}"
            scontrol requeue "$2"
            return
        fi
    done
}

# A job that lends its nodes may be started before the one that it is to join.
wait_for_job() {
    local state
    for _ in {1..60}; do
        state=$(of_job "$1" JobState)
        case $state in
            RUNNING) return ;;
            PENDING | CONFIGURING | COMPLETING | REQUEUED) sleep 10 ;;
            *) break ;;
        esac
    done
    echo "job $1, which this one was to join, does not run: ${state:-unknown}" >&2
    exit 1
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
        --master_addr="$(head_node)" --master_port="$(port "$SLURM_JOB_ID")" "$@"
}

head_node() {
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${nodes[0]}"
}

# Two jobs of one node do not meet.
port() {
    echo $((20000 + $1 % 10000))
}

# of_job JOB NAME: what SLURM says of a job by this name.
of_job() {
    scontrol show job "$1" --oneliner | tr ' ' '\n' | sed -n "s/^$2=//p"
}

# holds NODES NODE: whether a list of SLURM's names a node.
holds() {
    scontrol show hostnames "$1" | grep -qx "$2"
}
