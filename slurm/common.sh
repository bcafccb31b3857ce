#!/bin/bash
# What the job scripts of this folder share. They source it; it is not submitted itself.
#
#   sbatch [sbatch's own flags] slurm/cca_3b.sh [further flags of the program]
#
# Nothing needs editing. Partition, account, nodes, GPUs and time come from sbatch's flags, the rest from the
# environment:
#
#   CCA_RECIPE     shipped recipe's name or a YAML file                [the script's own]
#   CCA_DATA       folder of codes (encode.sh: of images)              [the recipe's]
#   CCA_OUTPUT     the run's folder, on a file system all nodes share  [runs/JOBNAME-JOBID]
#   CCA_SET        "key.path=value key.path=value ...": overrides      [none]
#   CCA_SWEEP      the same for a job array: task i takes word i, and writes to CCA_OUTPUT/WORD
#   CCA_DS_CONFIG  DeepSpeed's file                                    [the script's own]
#   CCA_HOME       the repository                                      [the folder sbatch was called in]
#   CCA_PYTHON     the interpreter                                     [CCA_HOME/.venv's, else python3]
#   CCA_SETUP      a file to source first, e.g. with `module load`     [none]
#   CCA_SRUN       further flags of srun, e.g. --mpi=pmix              [none]
#   CCA_ATTEMPTS   failures in a row without a new checkpoint before the job gives up   [3]
#   CCA_DRY_RUN    1: print what would be run, and run nothing
#
# A job is done when the program has left its completion mark, and only then: srun's exit status may be 0 after
# a node failure. Until then it requeues itself: after the signal that --signal sends ahead of the time limit,
# and after failures. A done job that is started again ends at once.

set -u
export CCA_HOME
stopped_by='' status=0 attempts_without_progress=0
children=()

say() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-cca}[${SLURM_JOB_ID:-}]: $*"; }
die() {
    say "$*" >&2
    exit 2
}

# begin RECIPE DS_CONFIG: defaults of everything that the environment left open
begin() {
    [ -f "$CCA_HOME/cca_ds/train.py" ] ||
        die "no cca_ds/train.py in $CCA_HOME: call sbatch in the repository's root, or set CCA_HOME"
    CCA_RECIPE=${CCA_RECIPE:-$1}
    CCA_DS_CONFIG=${CCA_DS_CONFIG:-$CCA_HOME/ds_configs/$2}
    # the job's number outlives a requeue, so the continued job finds its folder
    CCA_OUTPUT=${CCA_OUTPUT:-runs/${SLURM_JOB_NAME:-cca}-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-0}}}
    CCA_ATTEMPTS=${CCA_ATTEMPTS:-3}
    if [ -n "${CCA_SETUP:-}" ]; then
        # shellcheck source=/dev/null
        . "$CCA_SETUP" || die "CCA_SETUP=$CCA_SETUP failed"
    fi
    if [ -z "${CCA_PYTHON:-}" ]; then
        CCA_PYTHON=$CCA_HOME/.venv/bin/python
        [ -x "$CCA_PYTHON" ] || CCA_PYTHON=python3
    fi
    take_sweep
    choose_environment
}

# The array task's own word of CCA_SWEEP, and a folder of its own
take_sweep() {
    sweep=()
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    local words
    read -r -d '' -a words <<< "${CCA_SWEEP:-}" || true # of all lines; read fails at the end of its input
    [ "$SLURM_ARRAY_TASK_ID" -lt "${#words[@]}" ] ||
        die "array task $SLURM_ARRAY_TASK_ID, but CCA_SWEEP has ${#words[@]} words: use --array=0-$((${#words[@]} - 1))"
    sweep=("${words[$SLURM_ARRAY_TASK_ID]}")
    [[ ${sweep[0]} == [!./=]*=* ]] || die "CCA_SWEEP: ${sweep[0]} is not KEY.PATH=VALUE; it also names a folder"
    CCA_OUTPUT=$CCA_OUTPUT/${sweep[0]//\//_}
}

# What the ranks inherit; a value that is set already is kept
choose_environment() {
    # a launcher's variables from the shell that called sbatch would contradict srun's
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
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
    # say which transport was chosen only where something is wrong
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # where a collective that timed out leaves the trace of who was late
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$CCA_OUTPUT/logs/nccl_trace_rank_}
}

# overrides WORD...: "--set ..." of these, the sweep's and CCA_SET's words, in the array $overrides
overrides() {
    local words
    read -r -d '' -a words <<< "${CCA_SET:-}" || true
    overrides=("$@" ${sweep[@]+"${sweep[@]}"} ${words[@]+"${words[@]}"})
    [ "${#overrides[@]}" = 0 ] || overrides=(--set "${overrides[@]}")
}

# step COMMAND...: start the command on the job's ranks, in the background; $step_flags go to srun
step_flags=()
step() {
    local flags
    read -r -d '' -a flags <<< "${CCA_SRUN:-}" || true
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
on_time_limit() {
    say "SIGUSR1: the time limit or a preemption is near, asking all ranks for a checkpoint"
    stopped_by=USR1
    pass_on USR1
}
on_end() {
    say "SIGTERM: cancelled, preempted or a node lost; Slurm decides what follows"
    stopped_by=TERM
    pass_on TERM
}

# await PID: its exit status, whatever signals arrive meanwhile
await() {
    local status
    while :; do
        wait "$1"
        status=$?
        kill -0 "$1" 2> /dev/null || return "$status"
    done
}

# progress: print a word that changes whenever the run has a new checkpoint
progress() { cat "$CCA_OUTPUT/checkpoints/latest" 2> /dev/null || echo nothing; }
# The same for programs that leave files instead of checkpoints: scripts call this from a progress of their own
count_files() { echo "$(find "$@" -type f ! -name .failures 2> /dev/null | wc -l) files"; }

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
    local mark=$1
    shift
    open_job "$mark"
    run_step "$@"
    close_job "$mark"
}

# open_job MARK: exit at once if MARK exists, else install the signal handlers
open_job() {
    if [ -n "${CCA_DRY_RUN:-}" ]; then
        export -p | grep -E 'NCCL|OMP_NUM|TORCH|SRUN_'
        echo "# done when $1 exists"
        return 0
    fi
    if [ -e "$1" ]; then
        say "finished before: $1 exists"
        exit 0
    fi
    mkdir -p "${state_folder:=$CCA_OUTPUT}" || die "$state_folder cannot be made: choose another CCA_OUTPUT"
    trap on_time_limit USR1
    trap on_end TERM
    progress_before=$(progress)
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURM_JOB_NODELIST:-this host}, output in $CCA_OUTPUT," \
        "last checkpoint: $progress_before"
}

# close_job MARK: done, requeue, or give up
close_job() {
    [ -z "${CCA_DRY_RUN:-}" ] || return 0
    if [ -e "$1" ]; then
        say "done: $1 exists"
        exit 0
    fi
    case $stopped_by in
        TERM) exit 143 ;;
        USR1) requeue "stopped for the time limit" ;;
    esac
    count_failures
    [ "$attempts_without_progress" -lt "$CCA_ATTEMPTS" ] ||
        { say "giving up: $CCA_ATTEMPTS attempts without a new checkpoint, the last with status $status" >&2 && exit 1; }
    requeue "ended with status $status but without $1"
}

# Failures in a row at one checkpoint, kept in the run's folder: a fault that comes back every time must end
count_failures() {
    local now file=$state_folder/.failures at='' count=0
    now=$(progress)
    [ ! -f "$file" ] || read -r count at < "$file"
    { [ "$now" = "$progress_before" ] && [ "$at" = "$now" ] && [[ $count =~ ^[0-9]{1,6}$ ]]; } || count=0
    attempts_without_progress=$((10#$count + 1)) # a number by now: arithmetic would run what else the file holds
    echo "$attempts_without_progress $now" > "$file"
}

requeue() {
    say "$1: requeueing"
    trap '' USR1 TERM
    scontrol requeue "$SLURM_JOB_ID" || die "scontrol requeue failed; submit again with CCA_OUTPUT=$CCA_OUTPUT"
    sleep 60 # Slurm ends this shell; an exit of its own could be taken for the job's
    exit 0
}
