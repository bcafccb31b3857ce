#!/bin/bash
# CCA on LlamaGen-3B: one epoch over the codes of ImageNet, ZeRO stage 3.
#
#   CCA_DATA=codes/imagenet384 sbatch slurm/cca_3b.sh
#   CCA_SWEEP="loss.lambda=300 loss.lambda=500 loss.lambda=1000" sbatch --array=0-2 slurm/cca_3b.sh
#
# Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-3b --output=%x-%j.log
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=24:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

begin llamagen-3b zero3.json
train_until_done "$@"
