#!/bin/bash
# What the job scripts of this folder share. They source it; it is not submitted itself.
#
#   sbatch [sbatch's own flags] slurm/cca_3b.sh [further flags of the program]
#
# Nothing needs editing. Partition, account, nodes, GPUs and time come from sbatch's flags, the rest from the
# environment. docs/cluster.md says what each site may need, and what was tried.
#
#   CCA_RECIPE     shipped recipe's name or a YAML file                [the script's own]
#   CCA_DATA       folder of codes (encode.sh: of images)              [the recipe's]
#   CCA_OUTPUT     the run's folder, on a file system all nodes share  [runs/JOBNAME-JOBID]
#   CCA_SET        "key.path=value key.path=value ...": overrides; a value may hold spaces and newlines   [none]
#   CCA_SWEEP      the same for a job array: task i takes setting i, and writes to CCA_OUTPUT/SETTING
#   CCA_DS_CONFIG  DeepSpeed's file                                    [the script's own]
#   CCA_HOME       the repository                                      [the folder sbatch was called in]
#   CCA_PYTHON     the interpreter                                     [CCA_HOME/.venv's, else python3]
#   CCA_SETUP      a file to source first, e.g. with `module load`     [none]
#   CCA_SRUN       further flags of srun, e.g. --mpi=pmix              [none]
#   CCA_ATTEMPTS   attempts in a row without a new checkpoint before the job gives up   [3]
#   CCA_DRY_RUN    1: print what would be run, and run nothing
#
# A job is done when the program has left its completion mark; until then it requeues itself: after the signal that
# --signal sends ahead of the time limit, at the limit, and after failures, but not after bad input (exit code 2).
# What one attempt leaves for the next is in CCA_OUTPUT.job: why it ended, attempts without progress, nodes to avoid.

set -u
export CCA_HOME
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-}} # an array's number alone would mean all of its tasks
stopped_by='' status=0 children=() step_flags=()

say() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-cca}[$job]: $*"; }
die() {
    say "$*" >&2
    exit "${code:-2}"
}

# begin RECIPE DS_CONFIG [heterogeneous]: defaults of everything that the environment left open
begin() {
    [ -f "$CCA_HOME/cca_ds/train.py" ] ||
        die "no cca_ds/train.py in $CCA_HOME: call sbatch in the repository's root, or set CCA_HOME"
    [ "${SLURM_HET_SIZE:-1}" -le 1 ] || [ -n "${3:-}" ] ||
        die "this script runs on one component, the job has $SLURM_HET_SIZE: submit it without ':', or slurm/mixed.sh"
    CCA_RECIPE=${CCA_RECIPE:-$1}
    CCA_DS_CONFIG=${CCA_DS_CONFIG:-$CCA_HOME/ds_configs/$2}
    # the job's number outlives a requeue, so the continued job finds its folder
    CCA_OUTPUT=${CCA_OUTPUT:-runs/${SLURM_JOB_NAME:-cca}-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-0}}}
    CCA_ATTEMPTS=${CCA_ATTEMPTS:-3}
    [ -z "${CCA_SETUP:-}" ] || source_setup
    if [ -z "${CCA_PYTHON:-}" ]; then
        CCA_PYTHON=$CCA_HOME/.venv/bin/python
        [ -x "$CCA_PYTHON" ] || CCA_PYTHON=python3
    fi
    # a container has an interpreter of its own
    [[ -n ${CCA_DRY_RUN:-} || ${CCA_SRUN:-} == *--container* ]] || command -v "$CCA_PYTHON" > /dev/null ||
        die "no interpreter $CCA_PYTHON here: run make install in $CCA_HOME, or set CCA_PYTHON"
    take_sweep
    state=${CCA_OUTPUT%/}.job
    choose_environment
}

# A site's file may rely on unset variables, and its own set -e and set -u end with it
source_setup() {
    local options
    options=$(set +o)
    set +u
    # shellcheck source=/dev/null
    . "$CCA_SETUP" || die "CCA_SETUP=$CCA_SETUP failed"
    eval "$options"
}

# settings NAME TEXT: the text's settings in the array $settings; each begins with KEY.PATH= after white space
settings() {
    local rest=$2 value
    settings=()
    while [[ $rest =~ ^(|.*[[:space:]])([A-Za-z_][A-Za-z0-9_.]*=.*)$ ]]; do
        rest=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        settings=("${value%"${value##*[![:space:]]}"}" ${settings[@]+"${settings[@]}"})
    done
    read -r -d '' rest <<< "$rest" || true
    [ -z "$rest" ] || die "$1: $rest is not KEY.PATH=VALUE"
}

# The array task's own setting of CCA_SWEEP, and a folder of its own
take_sweep() {
    sweep=()
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    settings CCA_SWEEP "${CCA_SWEEP:-}"
    [ "${#settings[@]}" != 0 ] || die "a job array without CCA_SWEEP: every task would do the same"
    [ "$SLURM_ARRAY_TASK_ID" -lt "${#settings[@]}" ] ||
        die "array task $SLURM_ARRAY_TASK_ID, but CCA_SWEEP has ${#settings[@]}: use --array=0-$((${#settings[@]} - 1))"
    sweep=("${settings[$SLURM_ARRAY_TASK_ID]}")
    CCA_OUTPUT=$CCA_OUTPUT/${sweep[0]//[\/[:space:]]/_}
}

# What the ranks inherit; a value that is set already is kept
choose_environment() {
    export SLURM_EXPORT_ENV=ALL # after sbatch --export=LIST, srun would pass on that list alone
    # a launcher's variables from the shell that called sbatch would contradict srun's
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    # a step takes all of the job's GPUs; this script's --gpus-per-node would contradict sbatch --gres=gpu:N
    unset SLURM_GPUS_PER_NODE
    # since Slurm 22.05 srun no longer takes sbatch's --cpus-per-task, and would bind each rank to one core
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export PYTHONUNBUFFERED=1
    # ZeRO-3 gathers and frees layers of many sizes: growable segments keep the memory from fragmenting
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # NCCL's first connections must not run over loopback or a container's bridge
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr,veth}
    # a flapping InfiniBand link is retried for about two minutes (4.096 us * 2^22 * 7) before the run is lost
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
    # the binding of srun is not NCCL's: its helper threads may use all of the task's cores
    export NCCL_IGNORE_CPU_AFFINITY=${NCCL_IGNORE_CPU_AFFINITY:-1}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
}

# overrides SETTING...: "--set ..." of these, the sweep's and CCA_SET's settings, in the array $overrides
overrides() {
    settings CCA_SET "${CCA_SET:-}"
    overrides=("$@" ${sweep[@]+"${sweep[@]}"} ${settings[@]+"${settings[@]}"})
    [ "${#overrides[@]}" = 0 ] || overrides=(--set "${overrides[@]}")
}

# step COMMAND...: start the command on the job's ranks, in the background; $step_flags go to srun
step() {
    local flags
    read -r -d '' -a flags <<< "${CCA_SRUN:-}" || true # of all lines; read fails at the end of its input
    # a rank that fails takes the others along; else they would wait for it
    set -- srun --kill-on-bad-exit=1 ${step_flags[@]+"${step_flags[@]}"} ${flags[@]+"${flags[@]}"} "$@"
    if [ -n "${CCA_DRY_RUN:-}" ]; then
        printf '%q ' "$@"
        printf '\n'
        return 0
    fi
    "$@" &
    children+=("$!")
}

# pass_on SIGNAL: to all steps; srun hands it to every rank
pass_on() {
    local child
    for child in ${children[@]+"${children[@]}"}; do kill "-$1" "$child" 2> /dev/null; done
}

# field NAME: of what Slurm says of this job
field() { scontrol show job -o "$job" 2> /dev/null | head -n 1 | grep -o " $1=[^ ]*" | cut -d= -f2; }

on_time_limit() {
    say "SIGUSR1: the time limit or a preemption is near, asking all ranks for a checkpoint"
    stopped_by=USR1
    local left=''
    [ "$SECONDS" -ge 60 ] || left=$(squeue -h -j "$job" -o %L 2> /dev/null)
    # a signal in the first minute, with less than a quarter of an hour to go, would come so in every attempt
    [[ ! $left =~ ^(0?[0-9]|1[0-4]):[0-9]{2}$ ]] || limit_too_short=$left
    pass_on USR1
}

on_end() {
    # what is not saved by now is lost: Slurm's SIGKILL comes next
    [ "$(field Reason)" != TimeLimit ] || try_again "the time limit came before the last checkpoint was whole"
    say "SIGTERM: cancelled, preempted or a node lost"
    stopped_by=TERM
    pass_on TERM
}

# await PID: its exit status, whatever signals arrive meanwhile
await() {
    local result
    while :; do
        wait "$1"
        result=$?
        kill -0 "$1" 2> /dev/null || return "$result"
    done
}

# progress: print a word that changes whenever the run has a new checkpoint
progress() { cat "$CCA_OUTPUT/checkpoints/latest" 2> /dev/null || echo nothing; }
# The same for programs that leave files instead of checkpoints: scripts call this from a progress of their own
count_files() { echo "$(find "$@" -type f 2> /dev/null | wc -l) files"; }

# run_step COMMAND...: run the command on all ranks to its end; its exit status is in $status
run_step() {
    children=()
    step "$@"
    [ -z "${CCA_DRY_RUN:-}" ] || return 0
    await "${children[0]}"
    status=$?
}

# run_until_done MARK COMMAND...: the same for a job of one step, requeued until MARK exists
run_until_done() {
    open_job "$1"
    run_step "${@:2}"
    close_job "$1"
}

# train_until_done ARGUMENT...: the training of one component's ranks
train_until_done() {
    overrides ${CCA_DATA:+"data.codes=$CCA_DATA"}
    run_until_done "$CCA_OUTPUT/COMPLETED" "$CCA_PYTHON" "$CCA_HOME/cca_ds/train.py" --ds_config "$CCA_DS_CONFIG" \
        --recipe "$CCA_RECIPE" --output "$CCA_OUTPUT" --resume auto ${overrides[@]+"${overrides[@]}"} "$@"
}

# open_job MARK: exit at once if MARK exists, else install the signal handlers
open_job() {
    if [ -n "${CCA_DRY_RUN:-}" ]; then
        export -p | grep -E 'NCCL|OMP_NUM|TORCH|SRUN_|EXPORT_ENV'
        echo "# done when $1 exists"
        return 0
    fi
    if [ -e "$1" ]; then
        say "finished before: $1 exists"
        exit 0
    fi
    mkdir -p "$state" || die "$state cannot be made: choose another CCA_OUTPUT"
    [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$state"/{ended,failures,exclude} # a job that was submitted anew
    trap on_time_limit USR1
    trap on_end TERM
    progress_before=$(progress)
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURM_JOB_NODELIST:-this host}, output in $CCA_OUTPUT," \
        "last checkpoint: $progress_before"
    local ended='ended without a word, by a kill or a lost node'
    [ ! -s "$state/ended" ] || read -r _ ended < "$state/ended"
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || say "the attempt before: $ended"
    rm -f "$state/ended"
    CCA_JOB_STATE=$(cd "$state" && pwd) # where the first rank to fail says why
    export CCA_JOB_STATE
}

# close_job MARK: done, requeue, or give up
close_job() {
    [ -z "${CCA_DRY_RUN:-}" ] || return 0
    if [ -e "$1" ]; then
        say "done: $1 exists"
        rm -rf "$state"
        exit 0
    fi
    local reason="ended with status $status but without $1"
    # of the rank that failed first: srun may report that of those it killed for it
    [ ! -s "$state/ended" ] || read -r status reason < "$state/ended"
    [ "$status" != 2 ] || die "not requeued, since no further attempt heals this: $reason"
    [ -z "${limit_too_short:-}" ] || [ "$(progress)" != "$progress_before" ] ||
        die "the signal ahead of the time limit came at once, with $limit_too_short left: give a longer --time"
    if [ "$stopped_by" = TERM ]; then
        [ "$(field JobState)" != RUNNING ] || requeue "stopped by a signal"
        exit 143 # Slurm ends the job, and knows what follows
    fi
    # a preemption that only the ranks got the signal of
    [ -n "$stopped_by" ] || [ "$status" != 0 ] || [ ! -s "$state/ended" ] || requeue "$reason"
    [ -z "$stopped_by" ] || reason="stopped for the time limit"
    try_again "$reason"
}

# try_again WHY: requeue, unless too many attempts in a row have ended at one checkpoint
try_again() {
    local now file=$state/failures at='' count=0 code=1
    now=$(progress)
    [ ! -f "$file" ] || read -r count at < "$file"
    { [ "$at" = "$now" ] && [[ $count =~ ^[0-9]{1,6}$ ]]; } || count=0
    count=$((10#$count + 1)) # a number by now: arithmetic would run what else the file holds
    [ "$now" = "$progress_before" ] || count=0
    echo "$count $now" > "$file"
    [ "$count" -lt "$CCA_ATTEMPTS" ] ||
        die "giving up: $CCA_ATTEMPTS attempts without a new checkpoint, the last with status $status: $1"
    requeue "$1"
}

# requeue WHY: until Slurm has taken it, or has requeued the job by itself, as after a node failure
requeue() {
    say "$1: requeueing"
    trap '' USR1 TERM
    [ -s "$state/ended" ] || echo "$status $1" > "$state/ended"
    local deadline=$((SECONDS + ${CCA_REQUEUE_SECONDS:-600})) code=1
    until scontrol requeue "$job" || [ "$(field Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ] 2> /dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || die "scontrol requeue keeps failing; submit again with CCA_OUTPUT=$CCA_OUTPUT"
        sleep "${CCA_RETRY_SECONDS:-10}"
    done
    if [ -s "$state/exclude" ]; then # what the ranks found faulty or far behind; only a waiting job takes it
        local nodes
        nodes=$({ field ExcNodeList | grep -v null; sort -u "$state/exclude"; } | paste -sd,)
        scontrol update job="$job" ExcNodeList="$nodes" && say "from now on without $nodes"
    fi
    sleep 60 # Slurm ends this shell; an exit of its own could be taken for the job's
    exit 0
}
