#!/bin/bash
# Rounds of DDO by one command: for each round, draw images from the reference, train against them, score the
# checkpoints, and make the best the next round's reference; a round without a better one ends the chain. Submits jobs,
# each to start when the one before has succeeded. Run it, do not sbatch it; its arguments are sbatch's, for all jobs.
#
#   CCA_RECIPE=var-d16-ddo CCA_WEIGHTS=var_d16.pth CCA_DATA=codes/imagenet256_var CCA_OUTPUT=runs/ddo \
#       CCA_REFERENCE=VIRTUAL_imagenet256_labeled.npz CCA_SET="tokenizer.weights=vae_ch160v4096z32.pth" \
#       bash slurm/ddo.sh --partition=gpu
#
#   CCA_ROUNDS     rounds                                                      [2]
#   CCA_DRAWN      images of each class that are drawn for a round             [1300, about as many as ImageNet has]
#   CCA_SCORED     images of each class that a checkpoint is scored by         [5]
#   CCA_REFERENCE  what the samples are scored against                         [the recipe's evaluation.reference]
#   CCA_RESIZE     side to which samples are resized for it, 256 for LlamaGen  [as they are drawn]
#   CCA_TRAIN      the script of slurm/ that trains                            [cca_var_d30.sh]
#
# CCA_OUTPUT gets round1/, round2/, ... (cca_ds/checkpoints/rounds.py says what is in them) and rounds.md, the table of
# all checkpoints. The other variables of common.sh mean the same for all jobs. Called again, it continues: a finished
# stage's job ends at once.
set -euo pipefail # a submission that fails ends the chain
CCA_HOME=${CCA_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
export CCA_HOME
: "${CCA_RECIPE:?name the recipe, e.g. var-d16-ddo}" "${CCA_WEIGHTS:?name the weights that the first round starts from}"
: "${CCA_OUTPUT:?name the folder for the rounds}"
[[ ${CCA_ROUNDS:-2} =~ ^[1-9][0-9]?$ ]] || { echo "CCA_ROUNDS=$CCA_ROUNDS: give a number from 1 to 99" >&2 && exit 2; }
flags=("$@") jobs=() own=${CCA_SET:-} weights=$CCA_WEIGHTS
train=${CCA_TRAIN:-cca_var_d30.sh}
[ -f "$CCA_HOME/slurm/$train" ] || { echo "CCA_TRAIN=$train: no such script in slurm/" >&2 && exit 2; }
mkdir -p "$CCA_OUTPUT"

# submit SCRIPT NAME=VALUE...: sbatch it with these variables, to start when the last one has succeeded
submit() {
    local after=${jobs[*]+${jobs[-1]}}
    jobs+=("$(env "${@:2}" sbatch --parsable ${after:+"--dependency=afterok:$after" --kill-on-invalid-dep=yes} \
        ${flags[@]+"${flags[@]}"} "$CCA_HOME/slurm/$1" | cut -d';' -f1)")
    echo "${jobs[-1]}  $1${after:+  after $after}: $round"
}

for ((number = 1; number <= ${CCA_ROUNDS:-2}; number++)); do
    round=$CCA_OUTPUT/round$number
    drawn="sampling.images_per_class=${CCA_DRAWN:-1300} sampling.seed=$((1000 + number))" # not that of scores
    submit draw_codes.sh CCA_OUTPUT="$round/generated" CCA_WEIGHTS="$weights" \
        CCA_SET="data.generated=$round/generated $drawn $own"
    submit "$train" CCA_OUTPUT="$round/run" \
        CCA_SET="model.weights=$weights data.generated=$round/generated $own"
    submit choose.sh CCA_OUTPUT="$round" CCA_SET="sampling.images_per_class=${CCA_SCORED:-5} $own"
    weights=$round/best.safetensors
done
echo "scancel ${jobs[*]} ends all of it; the table will be $CCA_OUTPUT/rounds.md"
