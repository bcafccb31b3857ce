#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most nine minutes on one H200 with PyTorch 2.11 and Python 3.12:
#
#     bash benchmarks/gpu.sh build kernels tests llamagen-3b var-d30 sampling memcheck
#     bash benchmarks/gpu.sh wheels FOLDER            on another machine: what such a one lacks, for pip --target
#     bash benchmarks/gpu.sh --rehearse all           every stage on tiny shapes, on a CPU
#
#   build         compile the extension (4 minutes)
#   kernels       the log-likelihood beside PyTorch's, Liger's, QuACK's and Apple's
#   tests         every test that asks for the device
#   llamagen-3b   a few steps of training under ZeRO-3, with compiled blocks and without, random weights and codes
#   var-d30       the same
#   sampling      48 images of each, with CUDA graphs and without
#   memcheck      the kernels' tests under compute-sanitizer
#
# The package need not be installed: packages may lie in a folder on PYTHONPATH. Results go to
# $RESULTS/<device>-<date>.json and .md (benchmarks/results), a part of them after every measurement; a later run of a
# stage replaces its part. $PYTHON is the interpreter. Exits non-zero when a stage failed; the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
all=(build kernels tests llamagen-3b var-d30 sampling memcheck)
rehearse=''
[ "${1:-}" != --rehearse ] || { rehearse=1 && shift; }

if [ "${1:-}" = wheels ]; then
  folder=${2:?name a folder for the wheels}
  # 14 MiB. Not among them: nvidia-cutlass-dsl-libs-cu13, 92 MB, without which QuACK's and Liger's kernels for Hopper
  # are left out of the table, with the reason
  packages=(hjson pydantic pydantic-core annotated-types typing-inspection py-cpuinfo datasets dill multiprocess xxhash
    msgpack einops ninja tensorboard liger-kernel quack-kernels cut-cross-entropy)
  DS_BUILD_OPS=0 "$python" -m pip wheel --no-deps --no-build-isolation -w "$folder" "$(grep -i '^deepspeed==' requirements.txt)" &&
    "$python" -m pip download -c requirements.txt --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
      --platform manylinux_2_28_x86_64 -d "$folder" "${packages[@]}" || exit 1
  size=$(du -sm "$folder" | cut -f1)
  echo "$folder: $size MiB; on the other machine: pip install --no-deps --target DIR FOLDER/*.whl, PYTHONPATH=DIR"
  [ "$size" -le 64 ]
  exit
fi

[ "$#" != 0 ] || { sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3- && exit 2; }
[ "$1" != all ] || set -- "${all[@]}"
for stage in "$@"; do
  [[ " ${all[*]} " == *" $stage "* ]] || { echo "gpu.sh: no stage $stage; there are ${all[*]}" >&2 && exit 2; }
done
[ -n "$rehearse" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: PyTorch sees no GPU here; run it on a machine with one and a CUDA build of PyTorch" >&2
  exit 2
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# record STAGE VERDICT: into the results, with what the stage has left in its folder
record() { "$python" benchmarks/gpu_results.py "$results" "$1" "$2" "$scratch/$1"; }

# within SECONDS COMMAND...: of this stage; what it prints ends in its log
within() {
  timeout --kill-after=10 "$1" "${@:2}" > "$scratch/$stage/log" 2>&1
  local code=$?
  case $code in
    0) verdict=passed ;;
    124 | 137) verdict="out of time after $1 s" ;; # what was measured by then counts
    *) verdict="failed ($code)" && failed=1 && tail -n 30 "$scratch/$stage/log" >&2 ;;
  esac
  return $code
}

small() { [ -n "$rehearse" ] && printf '%s\n' "$@"; }
whole_models() {
  within "$1" "$python" benchmarks/speed/whole_models.py --output "$scratch/$stage" "${@:2}"
}
tiny_gpt='model.overrides={n_layer: 1, n_head: 2, dim: 32, multiple_of: 16, sequence_length: 16}'
tiny_var='model.overrides={depth: 1, width: 32, heads: 2, vocab_size: 64, scales: [1, 2, 3]}'

failed=0
for stage in "$@"; do
  mkdir -p "$scratch/$stage"
  verdict=passed started=$SECONDS
  case $stage in
    build)
      if [ -n "$rehearse" ]; then # what is built here is used
        within 60 "$python" -c 'from cca_ds.likelihood import backend; assert backend() != "torch"'
      else
        CCA_DS_BUILD=cuda within 480 "$python" setup.py build_ext --inplace
      fi ;;
    kernels)
      if [ -n "$rehearse" ]; then
        within 300 "$python" benchmarks/speed/sequence_logp.py --shapes tiny --dtypes bf16 --repeats 1 --output "$scratch/$stage"
      else
        within 500 "$python" benchmarks/speed/sequence_logp.py --device cuda --shapes llamagen-3b var-d30 --repeats 15 \
          --output "$scratch/$stage"
      fi ;;
    tests)
      mapfile -t only < <(small --collect-only)
      within 500 "$python" -m pytest -q -p no:cacheprovider -m "gpu and not slow" ${only[@]+"${only[@]}"} tests ;;
    llamagen-3b)
      mapfile -t only < <(small --pairs 4 --steps 3 --set "$tiny_gpt" precision=fp32 model.compile=true)
      whole_models 520 --recipes llamagen-3b --parts training uncompiled ${only[@]+"${only[@]}"} ;;
    var-d30)
      mapfile -t only < <(small --pairs 4 --steps 3 --set "$tiny_var" precision=fp32 model.compile=false) # the compiler: above
      whole_models 520 --recipes var-d30 --parts training uncompiled ${only[@]+"${only[@]}"} ;;
    sampling)
      if [ -n "$rehearse" ]; then
        whole_models 300 --recipes llamagen-3b --parts sampling --images 2 --set "$tiny_gpt" precision=fp32
      else
        whole_models 520 --recipes llamagen-3b var-d30 --parts sampling
      fi ;;
    memcheck)
      if command -v compute-sanitizer > /dev/null && [ -z "$rehearse" ]; then
        within 500 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q tests/likelihood \
          -k "edges or not_finite or outside or non_contiguous or test_linear"
      else
        verdict="not run: compute-sanitizer is not here"
      fi ;;
  esac
  echo "gpu.sh: $stage: $verdict, $((SECONDS - started)) s"
  record "$stage" "$verdict, $((SECONDS - started)) s" || failed=1
done
exit "$failed"
