"""The benchmark of whole models, on models small enough for a processor."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "llamagen-3b": "model.overrides={n_layer: 1, n_head: 2, dim: 32, multiple_of: 16, sequence_length: 16}",
    "var-d30": "model.overrides={depth: 1, width: 32, heads: 2, vocab_size: 64, scales: [1, 2, 3]}",
}


@pytest.mark.dist
@pytest.mark.parametrize("recipe", SMALL)
def test_a_model_is_trained_and_sampled(recipe, tmp_path):
    command = [sys.executable, "benchmarks/speed/whole_models.py", "--recipes", recipe, "--pairs", "4", "--steps", "3"]
    command += ["--images", "2", "--output", str(tmp_path), "--set", SMALL[recipe], "precision=fp32"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "whole_models.json").read_text())["whole_models"][recipe]
    training, sampling = found["training"], found["sampling"]
    assert training["step_seconds"] > 0 and math.isfinite(training["last grad_norm"])
    assert training["first loss"] == pytest.approx(math.log(2), rel=0.01)  # (1 + lambda) log 2 / lambda
    assert sampling["codes per second, eager"] > 0
    assert (tmp_path / "whole_models.md").read_text() in done.stdout + "\n"


@pytest.mark.dist
def test_a_failed_part_is_reported_and_sets_the_exit_code(tmp_path):
    command = [
        sys.executable,
        "benchmarks/speed/whole_models.py",
        "--recipes",
        "llamagen-3b",
        "--output",
        str(tmp_path),
    ]
    command += ["--images", "1", "--set", SMALL["llamagen-3b"], "loss.beta=-1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    found = json.loads((tmp_path / "whole_models.json").read_text())["whole_models"]["llamagen-3b"]
    assert "loss.beta" in found["training"]["failed"]


@pytest.mark.dist
def test_a_time_limit_keeps_what_was_measured(tmp_path):
    command = [sys.executable, "benchmarks/speed/whole_models.py", "--recipes", "llamagen-3b", "--pairs", "4"]
    command += ["--steps", "100000", "--output", str(tmp_path), "--set", SMALL["llamagen-3b"], "precision=fp32"]
    results = tmp_path / "whole_models.json"
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not results.exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143
    training = json.loads(results.read_text())["whole_models"]["llamagen-3b"]["training"]
    assert training["steps so far"] >= 2 and training["step_seconds"] > 0
