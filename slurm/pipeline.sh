#!/bin/bash
# Images to scores by one command: submits encoding, training, and sampling with evaluation, each to start when the
# one before has succeeded, and prints the chain. Run it, do not sbatch it; its arguments are sbatch's, for all jobs.
#
#   CCA_DATA=imagenet/train CCA_OUTPUT=runs/mine CCA_REFERENCE=VIRTUAL_imagenet256_labeled.npz \
#       CCA_SET="model.weights=c2i_3B_384.pt tokenizer.weights=vq_ds16_c2i.pt" \
#       bash slurm/pipeline.sh --partition=gpu --nodes=4
#
#   CCA_TRAIN      the training's script                            [slurm/cca_3b.sh]
#   CCA_REFERENCE  what the samples are scored against              [the recipe's evaluation.reference]
#
# CCA_OUTPUT gets codes/, run/ and scores/. The other variables of common.sh mean the same for all three jobs.
set -euo pipefail # a submission that fails ends the chain
CCA_HOME=${CCA_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
export CCA_HOME
: "${CCA_DATA:?name the folder of images}" "${CCA_OUTPUT:?name the folder for codes, run and scores}"
train=${CCA_TRAIN:-$CCA_HOME/slurm/cca_3b.sh}
[ -f "$train" ] || { echo "CCA_TRAIN=$train: no such script" >&2 && exit 2; }
mkdir -p "$CCA_OUTPUT"

# submit AFTER NAME=VALUE... SCRIPT: sbatch it with these variables, to start when job AFTER has succeeded
submit() {
    local after=$1 script=${*: -1}
    env "${@:2:$#-2}" sbatch --parsable ${after:+"--dependency=afterok:$after" --kill-on-invalid-dep=yes} \
        ${flags[@]+"${flags[@]}"} "$script" | cut -d';' -f1
}
flags=("$@")
[[ $train != *var* ]] || export CCA_RECIPE=${CCA_RECIPE:-var-d30} # of the codes too
encode=$(submit '' CCA_OUTPUT="$CCA_OUTPUT/codes" "$CCA_HOME/slurm/encode.sh")
run=$(submit "$encode" CCA_DATA="$CCA_OUTPUT/codes" CCA_OUTPUT="$CCA_OUTPUT/run" "$train")
scores=$(submit "$run" CCA_WEIGHTS="$CCA_OUTPUT/run" CCA_OUTPUT="$CCA_OUTPUT/scores" \
    "$CCA_HOME/slurm/sample_and_evaluate.sh")
cat << END
$encode  encode.sh               $CCA_DATA -> $CCA_OUTPUT/codes
$run  $(basename "$train")  after $encode: -> $CCA_OUTPUT/run
$scores  sample_and_evaluate.sh  after $run: -> $CCA_OUTPUT/scores/scores.json
scancel $encode $run $scores ends all of it; a job that fails for good cancels those that wait for it
END
