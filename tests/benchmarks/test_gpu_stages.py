"""The stages of benchmarks/gpu.sh, rehearsed on a CPU as on a borrowed machine: packages in a folder, ours not among
them."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
STAGES = ["build", "kernels", "tests", "llamagen-3b", "var-d30", "sampling", "memcheck"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


@pytest.mark.slow  # two minutes, most of them the compiler's
def test_every_stage_runs_without_the_package_installed(tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in site.getsitepackages():
        for entry in Path(folder).iterdir():
            if not entry.name.lower().startswith(("cca_ds", "__editable__")) and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    base = getattr(sys, "_base_executable", sys.executable)
    outside = {"PYTHON": base, "PYTHONPATH": str(packages), "RESULTS": str(tmp_path / "results"), "HOME": str(tmp_path)}
    found = subprocess.run(
        [base, "-c", "import cca_ds"], cwd=tmp_path, env={**os.environ, **outside}, capture_output=True
    )
    assert found.returncode != 0, "the package is installed for this interpreter"
    done = run("--rehearse", "all", **outside)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "results").glob("*.json")
    report = json.loads(results.read_text())
    assert list(report) == STAGES
    assert all(report[stage]["verdict"].startswith("passed") for stage in STAGES[:-1]), report
    assert report["memcheck"]["verdict"].startswith("not run")
    for part in ("training", "uncompiled"):
        assert report["llamagen-3b"]["whole_models"]["llamagen-3b"][part]["step_seconds"] > 0
    assert "| llamagen-3b | sampling: codes per second, eager |" in results.with_suffix(".md").read_text()


def test_a_later_run_of_a_stage_replaces_its_part(tmp_path):
    for verdict in ("out of time after 9 s", "passed, 3 s"):
        (tmp_path / "scratch").mkdir(exist_ok=True)
        (tmp_path / "scratch" / "x.json").write_text('{"found": 1}')
        command = [
            sys.executable,
            "benchmarks/gpu_results.py",
            tmp_path / "results",
            "tests",
            verdict,
            tmp_path / "scratch",
        ]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (results,) = (tmp_path / "results").glob("*.json")
    report = json.loads(results.read_text())
    assert report["tests"]["verdict"] == "passed, 3 s" and report["tests"]["found"] == 1 and list(report) == ["tests"]


def test_what_cannot_run_is_said():
    done = run("kernel")
    assert done.returncode == 2 and "no stage kernel; there are build kernels" in done.stderr
    assert run().returncode == 2
    if not torch.cuda.is_available():
        done = run("kernels")
        assert done.returncode == 2 and "PyTorch sees no GPU here" in done.stderr
