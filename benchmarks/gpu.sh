#!/usr/bin/env bash
# Builds the extension, runs the GPU tests and every GPU benchmark, inside 9 minutes, on a machine with a GPU:
#
#     bash benchmarks/gpu.sh [python]
#
# Writes benchmarks/results/<device>-<date>.json (and .md) with the commit. Exits non-zero when the build or a test fails;
# the benchmarks run all the same after a failed test, and the result file records the failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${1:-python}
deadline=$((SECONDS + 540))
# `within 90 command`: at most 90 seconds, and never beyond the nine minutes; 124 when the time is up.
within() {
  local seconds=$((deadline - SECONDS))
  [ "$seconds" -ge 1 ] || return 124
  timeout "$((seconds < $1 ? seconds : $1))" "${@:2}"
}
results=benchmarks/results
mkdir -p "$results"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: PyTorch sees no GPU here; run it on a machine with one and a CUDA build of PyTorch" >&2
  exit 2
}

CCA_DS_BUILD=cuda within 240 "$python" setup.py build_ext --inplace >"$scratch/build.log" 2>&1 || {
  tail -n 40 "$scratch/build.log" >&2
  exit 1
}

tests=passed
within 150 "$python" -m pytest -q -m "gpu and not slow" tests || tests=failed

memcheck="compute-sanitizer is not installed"
if command -v compute-sanitizer >/dev/null; then
  within 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q tests/likelihood \
    -k "edges or not_finite or outside or non_contiguous or test_linear" >"$scratch/memcheck.log" 2>&1
  code=$?
  case $code in
    0) memcheck=clean ;;
    124) memcheck="ran out of time" ;;
    *) memcheck="failed ($code)"; tests=failed; tail -n 40 "$scratch/memcheck.log" >&2 ;;
  esac
fi

# Benchmarks: each writes one JSON and one table in the scratch folder. The shapes that the targets speak of, then real
# steps and images of the two largest models; what was measured before the time was up is kept.
benchmark() {
  local name=$1
  within "$2" "$python" "benchmarks/speed/$name.py" --output "$scratch" "${@:3}" >"$scratch/$name.log" 2>&1 && return
  echo "gpu.sh: $name failed or ran out of time" >&2
  tail -n 20 "$scratch/$name.log" >&2
  tests=failed
}
benchmark sequence_logp 200 --device cuda --shapes llamagen-3b var-d30 --repeats 15
benchmark whole_models 540

"$python" - "$scratch" "$results" "$tests" "$memcheck" <<'PYTHON'
import json, re, sys
from datetime import date
from pathlib import Path

import torch

scratch, results, tests, memcheck = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
stem = results / f"{device}-{date.today().isoformat()}"
report = {"tests": tests, "memcheck": memcheck, "cuda": torch.version.cuda}
for found in sorted(scratch.glob("*.json")):
    report |= json.loads(found.read_text())
stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
tables = "\n".join(t.read_text() for t in sorted(scratch.glob("*.md")))
stem.with_suffix(".md").write_text(f"tests {tests}, memcheck {memcheck}\n\n{tables}")
print(stem.with_suffix(".json"))
PYTHON
[ "$tests" = passed ]
