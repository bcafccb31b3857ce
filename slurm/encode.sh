#!/bin/bash
# Images to a table of codes, on any number of ranks; what is encoded already is kept when the job is cut short.
#
#   CCA_DATA=imagenet/train CCA_OUTPUT=codes/imagenet384 CCA_SET=tokenizer.weights=vq_ds16_c2i.pt \
#       sbatch slurm/encode.sh
#   CCA_RECIPE=var-d30 CCA_DATA=train.tar CCA_OUTPUT=codes/imagenet256_var CCA_SET=tokenizer.weights=vae.pth \
#       sbatch slurm/encode.sh --batch_size 64
#
# Everything that can be set is listed in common.sh.
#SBATCH --job-name=cca-encode --output=%x-%j.log
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=12:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

begin llamagen-3b zero3.json
overrides ${CCA_DATA:+"data.source=$CCA_DATA"}
progress() { count_files "${CCA_OUTPUT%/}.partial/records"; } # one for every finished part of the table
run_until_done "$CCA_OUTPUT/manifest.json" "$CCA_PYTHON" "$CCA_HOME/cca_ds/encode.py" \
    --recipe "$CCA_RECIPE" --output "$CCA_OUTPUT" \
    ${overrides[@]+"${overrides[@]}"} "$@"
