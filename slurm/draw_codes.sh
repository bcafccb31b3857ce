#!/bin/bash
# Draw images from a model into a table of codes, undecoded: what DDO trains against (data.generated).
#
#   CCA_RECIPE=var-d16-ddo CCA_WEIGHTS=var_d16.pth CCA_OUTPUT=data/imagenet256_var_generated \
#       CCA_SET="tokenizer.weights=vae_ch160v4096z32.pth sampling.images_per_class=1300" sbatch slurm/draw_codes.sh
#
#   CCA_WEIGHTS    a run's folder, or a file of weights   [the recipe's model.weights]
#
# Everything else that can be set is listed in common.sh.
#SBATCH --job-name=cca-draw --output=%x-%j.log
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=24:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

begin var-d16-ddo zero3.json
overrides
progress() { count_files "$CCA_OUTPUT.partial"; }
run_until_done "$CCA_OUTPUT/manifest.json" "$CCA_PYTHON" "$CCA_HOME/cca_ds/sample.py" --codes --recipe "$CCA_RECIPE" \
    ${CCA_WEIGHTS:+--weights "$CCA_WEIGHTS"} --output "$CCA_OUTPUT" ${overrides[@]+"${overrides[@]}"} "$@"
