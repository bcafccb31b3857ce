#!/bin/bash
# The reference's log-likelihoods of a whole run, computed ahead: large batches, no backward. Runs that differ in
# beta, lambda, loss or learning rate share them.
#
#   CCA_DATA=codes/imagenet384 CCA_OUTPUT=cache/llamagen-3b sbatch slurm/cache_reference.sh
#   CCA_DATA=codes/imagenet384 CCA_SET="reference.placement=cached reference.cache=cache/llamagen-3b" \
#       sbatch --dependency=afterok:JOB slurm/cca_3b.sh
#
# Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-cache --output=%x-%j.log
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=12:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

begin llamagen-3b zero3.json
overrides ${CCA_DATA:+"data.codes=$CCA_DATA"} reference.placement=cached "reference.cache=$CCA_OUTPUT"
progress() { count_files "$CCA_OUTPUT"; }
# a cache may be extended to more epochs: only this job's own mark counts, and what is there is computed once
[ -n "${CCA_DRY_RUN:-}" ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$CCA_OUTPUT/COMPLETED"
run_until_done "$CCA_OUTPUT/COMPLETED" "$CCA_PYTHON" "$CCA_HOME/cca_ds/train.py" --cache_reference \
    --ds_config "$CCA_DS_CONFIG" --recipe "$CCA_RECIPE" "${overrides[@]}" "$@"
