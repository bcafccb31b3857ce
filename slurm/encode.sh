#!/bin/bash
# Images to a table of codes, on any number of ranks; what is encoded already is kept when the job is cut short.
#
#   CCA_DATA=imagenet/train CCA_OUTPUT=codes/imagenet384 CCA_SET=tokenizer.weights=vq_ds16_c2i.pt \
#       sbatch slurm/encode.sh
#   CCA_RECIPE=var-d30 CCA_DATA=train.tar CCA_OUTPUT=codes/imagenet256_var CCA_SET=tokenizer.weights=vae.pth \
#       sbatch slurm/encode.sh --batch_size 64
#
# Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-encode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || exit 2

begin llamagen-3b zero3.json
overrides ${CCA_DATA:+"data.source=$CCA_DATA"}
# the table's folder appears whole, by renaming: nothing may be put there before
state_folder=$CCA_OUTPUT.job
progress() { count_files "$(dirname "$CCA_OUTPUT")"; }
run_until_done "$CCA_OUTPUT/manifest.json" "$CCA_PYTHON" "$CCA_HOME/cca_ds/encode.py" \
    --recipe "$CCA_RECIPE" --output "$CCA_OUTPUT" \
    ${overrides[@]+"${overrides[@]}"} "$@"
