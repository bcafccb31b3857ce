#!/bin/bash
# Sample and score what a round of DDO started from and each of its checkpoints, and choose the one with the lowest FID;
# a round without a better one fails. slurm/ddo.sh submits it.
#
#   CCA_OUTPUT     the round's folder: its run is in run/
#   CCA_REFERENCE  real images or their statistics             [the recipe's evaluation.reference]
#   CCA_RESIZE     side to which samples are resized for it    [as they are drawn]
#
# A checkpoint that has its scores is not sampled again. Everything else that can be set is listed in common.sh.
#SBATCH --job-name=cca-choose --output=%x-%j.log
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0
#SBATCH --time=12:00:00 --requeue --signal=B:USR1@300 --open-mode=append
CCA_HOME=${CCA_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/common.sh
. "$CCA_HOME/slurm/common.sh" || { echo "call sbatch in the repository's root, or set CCA_HOME" >&2 && exit 2; }

[ -n "${CCA_OUTPUT:-}" ] || die "CCA_OUTPUT is not set: name the round's folder"
run=$CCA_OUTPUT/run
CCA_RECIPE=$run/config.yaml # the run's own
begin "$CCA_RECIPE" zero3.json
overrides ${CCA_REFERENCE:+"evaluation.reference=$CCA_REFERENCE"}
choose=("$CCA_PYTHON" "$CCA_HOME/cca_ds/choose.py" --round "$CCA_OUTPUT")
progress() { count_files "$CCA_OUTPUT/scores"; }
mark=$CCA_OUTPUT/chosen.json
open_job "$mark"
start=$run/checkpoints/step_00000000
checkpoints=("$run"/checkpoints/step_*) # without one, cca-choose says so
[ -z "${CCA_DRY_RUN:-}" ] || checkpoints=("$run/checkpoints/step_N")
for checkpoint in "$start" "${checkpoints[@]}"; do
    [ -z "$stopped_by" ] || break
    folder=$CCA_OUTPUT/scores/$(basename "$checkpoint")
    what=(--weights "$run" --checkpoint "$checkpoint")
    if [ "$checkpoint" = "$start" ]; then
        what=(--recipe "$CCA_RECIPE") # whose model.weights it is
    elif [ -z "${CCA_DRY_RUN:-}" ]; then # not one that was set aside
        [[ $checkpoint =~ /step_[0-9]+$ && -e $checkpoint/COMPLETE.json ]] || continue
    fi
    [ ! -e "$folder/scores.json" ] || continue
    run_step "$CCA_PYTHON" "$CCA_HOME/cca_ds/sample.py" "${what[@]}" \
        --output "$folder" --npz ${CCA_RESIZE:+--resize "$CCA_RESIZE"} ${overrides[@]+"${overrides[@]}"}
    [ -e "$folder/samples.npz" ] || [ -n "${CCA_DRY_RUN:-}" ] || break
    [ -z "$stopped_by" ] || break
    run_step "$CCA_PYTHON" "$CCA_HOME/cca_ds/evaluate.py" "$folder/samples.npz" --recipe "$CCA_RECIPE" \
        --output "$folder/scores.json" ${overrides[@]+"${overrides[@]}"}
    [ "$status" = 0 ] || break
done
if [ -z "$stopped_by" ] && [ "$status" = 0 ]; then
    step_flags=(--nodes=1 --ntasks=1)
    run_step "${choose[@]}"
fi
close_job "$mark"
