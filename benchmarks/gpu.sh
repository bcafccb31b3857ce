#!/usr/bin/env bash
# Builds the extension, runs the GPU tests and every GPU benchmark, inside 9 minutes, on a machine with a GPU:
#
#     bash benchmarks/gpu.sh [python]
#
# Writes benchmarks/results/<device>-<date>.json (and .md) with the commit. Exits non-zero when the build or a test fails;
# the benchmarks run all the same after a failed test, and the file says so.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
deadline=$((SECONDS + 540))
left() { echo $((deadline - SECONDS)); }
results=benchmarks/results
mkdir -p "$results"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: PyTorch sees no GPU here; run it on a machine with one and a CUDA build of PyTorch" >&2
  exit 2
}

CCA_DS_BUILD=cuda timeout "$(left)" "$python" setup.py build_ext --inplace >"$scratch/build.log" 2>&1 || {
  tail -n 40 "$scratch/build.log" >&2
  exit 1
}

# The kernels' tests, then what the rest of the package marks for a GPU.
tests=passed
timeout 150 "$python" -m pytest -q tests/test_likelihood.py tests/test_likelihood_head.py \
  --deselect tests/test_likelihood.py::test_every_instruction_set ||
  tests=failed
timeout 60 "$python" -m pytest -q -m gpu tests
code=$?
[ "$code" -eq 0 ] || [ "$code" -eq 5 ] || tests=failed # 5: nothing is marked

memcheck="compute-sanitizer is not installed"
if command -v compute-sanitizer >/dev/null; then
  timeout 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q tests/test_likelihood.py \
    -k "edges or not_finite or outside or non_contiguous or test_linear" >"$scratch/memcheck.log" 2>&1
  code=$?
  case $code in
    0) memcheck=clean ;;
    124) memcheck="ran out of time" ;;
    *) memcheck="failed ($code)"; tests=failed; tail -n 40 "$scratch/memcheck.log" >&2 ;;
  esac
fi

# Benchmarks: each writes one JSON in the scratch folder; what is left of the time goes to them.
timeout "$(left)" "$python" benchmarks/sequence_logp.py --device cuda --repeats 15 --output "$scratch" >"$scratch/bench.log" 2>&1 ||
  { tail -n 20 "$scratch/bench.log" >&2; tests=failed; }

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
