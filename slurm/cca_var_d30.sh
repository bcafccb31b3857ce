#!/bin/bash
# CCA on VAR-d30: one epoch over the codes of ImageNet, ZeRO stage 3.
#
#   CCA_DATA=codes/imagenet256_var sbatch slurm/cca_var_d30.sh
#   CCA_SWEEP="loss.lambda=300 loss.lambda=1000 loss.lambda=3000" sbatch --array=0-2 slurm/cca_var_d30.sh
#
# Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-var-d30 --output=%x-%j.log
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=24:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

begin var-d30 zero3.json
train_until_done "$@"
