#!/bin/bash
# Draw images with a run's policy on all ranks, then score them against a reference.
#
#   CCA_WEIGHTS=runs/cca-3b-4711 CCA_REFERENCE=VIRTUAL_imagenet256_labeled.npz \
#       CCA_SET="tokenizer.weights=vq_ds16_c2i.pt evaluation.inception_weights=inception.pth" \
#       sbatch slurm/sample_and_evaluate.sh --resize 256
#
#   CCA_WEIGHTS    a run's folder, or a file of weights; further arguments are the sampler's
#   CCA_REFERENCE  real images or their statistics                [the recipe's evaluation.reference]
#
# Everything else that can be set is listed in common.sh.
#SBATCH --job-name=cca-evaluate --output=%x-%j.log
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=12:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

[ -n "${CCA_WEIGHTS:-}" ] || die "CCA_WEIGHTS is not set: name a run's folder or a file of weights"
# a run's folder knows its own recipe
[ ! -f "$CCA_WEIGHTS/config.yaml" ] || CCA_RECIPE=${CCA_RECIPE:-$CCA_WEIGHTS/config.yaml}
begin llamagen-3b zero3.json
overrides ${CCA_REFERENCE:+"evaluation.reference=$CCA_REFERENCE"}
progress() { count_files "$CCA_OUTPUT"; }
mark=$CCA_OUTPUT/scores.json samples=$CCA_OUTPUT/samples.npz
open_job "$mark"
if [ ! -e "$samples" ]; then
    run_step "$CCA_PYTHON" "$CCA_HOME/cca_ds/sample.py" --recipe "$CCA_RECIPE" --weights "$CCA_WEIGHTS" \
        --output "$CCA_OUTPUT" --npz --grid ${overrides[@]+"${overrides[@]}"} "$@"
fi
if [ -e "$samples" ] && [ -z "$stopped_by" ] || [ -n "${CCA_DRY_RUN:-}" ]; then
    run_step "$CCA_PYTHON" "$CCA_HOME/cca_ds/evaluate.py" "$samples" --recipe "$CCA_RECIPE" \
        --output "$mark" ${overrides[@]+"${overrides[@]}"}
fi
close_job "$mark"
