#!/bin/bash
# CCA on VAR-d30: one epoch over the codes of ImageNet, ZeRO stage 3.
#
#   CCA_DATA=codes/imagenet256_var sbatch slurm/cca_var_d30.sh
#   CCA_SWEEP="loss.lambda=300 loss.lambda=1000 loss.lambda=3000" sbatch --array=0-2 slurm/cca_var_d30.sh
#
# Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-var-d30
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || exit 2

begin var-d30 zero3.json
overrides ${CCA_DATA:+"data.codes=$CCA_DATA"}
run_until_done "$CCA_OUTPUT/COMPLETED" "$CCA_PYTHON" "$CCA_HOME/cca_ds/train.py" \
    --ds_config "$CCA_DS_CONFIG" --recipe "$CCA_RECIPE" --output "$CCA_OUTPUT" --resume auto \
    ${overrides[@]+"${overrides[@]}"} "$@"
