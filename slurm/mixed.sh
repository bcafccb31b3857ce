#!/bin/bash
# CCA on LlamaGen-3B over unequal nodes, as one heterogeneous job: trainers on H100 and A100, each taking pairs
# in proportion to its measured speed; the frozen reference on A40, streaming its log-likelihoods ahead of them.
#
#   CCA_DATA=codes/imagenet384 sbatch slurm/mixed.sh
#   CCA_DATA=codes/imagenet384 sbatch --nodes=4 : --nodes=1 : --nodes=4 slurm/mixed.sh
#
# The last component produces, all before it train. Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-mixed --output=%x-%j.log
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=h100:8 --cpus-per-task=8 --mem=0
#SBATCH --time=24:00:00 --requeue --signal=B:USR1@300 --open-mode=append
#SBATCH hetjob
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=a100:8 --cpus-per-task=8 --mem=0
#SBATCH --time=24:00:00 --requeue
#SBATCH hetjob
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=a40:8 --cpus-per-task=8 --mem=0
#SBATCH --time=24:00:00 --requeue
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

begin llamagen-3b zero3.json heterogeneous
[ "${SLURM_HET_SIZE:-1}" -gt 1 ] ||
    die "not a heterogeneous job: give one group of sbatch flags per component, with : between them"
# trainers of several GPU types: NCCL's NVLink SHARP exists on H100 only, and all ranks must choose alike
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
producers=$((SLURM_HET_SIZE - 1))
trainers=$(seq -s, 0 $((producers - 1)))
overrides ${CCA_DATA:+"data.codes=$CCA_DATA"} reference.placement=streamed "reference.cache=$CCA_OUTPUT/reference"
program=("$CCA_PYTHON" "$CCA_HOME/cca_ds/train.py"
    --ds_config "$CCA_DS_CONFIG" --recipe "$CCA_RECIPE" --output "$CCA_OUTPUT" "${overrides[@]}" "$@")

# Producers that died come back; the trainers wait for them, and say so if they wait too long
keep_producing() {
    local status
    trap 'stopped_by=TERM; pass_on TERM' TERM
    trap '' USR1
    unset CCA_JOB_STATE # a producer that is started again is not why the job ends
    step_flags=("--het-group=$producers")
    while [ -z "$stopped_by" ]; do
        children=()
        step "${program[@]}" --produce_reference
        [ -z "${CCA_DRY_RUN:-}" ] || return 0
        await "${children[0]}"
        status=$?
        [ "$status" != 0 ] || return 0
        [ -n "$stopped_by" ] || { say "the producers ended with status $status; starting them again" && sleep 5; }
    done
}

open_job "$CCA_OUTPUT/COMPLETED"
step_flags=("--het-group=$trainers")
step "${program[@]}" --resume auto
[ -z "${CCA_DRY_RUN:-}" ] || { keep_producing && exit 0; }
keep_producing &
producing=$!
await "${children[0]}"
status=$?
kill -TERM "$producing" 2> /dev/null
await "$producing"
close_job "$CCA_OUTPUT/COMPLETED"
