"""The real wheel, built in isolation and installed into an empty environment, does what the README's commands do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cca_ds.ops.library import backend
from tests.dist.ranks import free_port
from tests.install.machines import ROOT, Machine


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment into which `pip install FOLDER` put cca_ds, with the locked versions.

    With this machine's settings of pip, so that where they name a CPU build of PyTorch not 3 GB are unpacked, and with
    the C++ kernels only: the CUDA ones take minutes, and `make install` has built them.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = Machine(folder, "sources in a path with spaces").source
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    cache = subprocess.check_output([sys.executable, "-m", "pip", "cache", "dir"], text=True).strip()
    settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = subprocess.run(
        [str(folder / "env/bin/python"), "-m", "pip", "install", "--quiet", str(source)],
        capture_output=True, text=True, cwd=folder,
        env={**settings, "PATH": f"{folder / 'env/bin'}:{os.defpath}", "HOME": str(folder), "PIP_CACHE_DIR": cache,
             "PIP_CONSTRAINT": str(ROOT / "requirements.txt"), "CCA_DS_CPU": "default",
             "CCA_DS_BUILD": "none" if backend() == "torch" else "cpu", "PIP_NO_COMPILE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(source)  # nothing of it is needed any more
    return folder / "env/bin"


def run(installed: Path, folder: Path, *command: str) -> str:
    """The output of a command of the environment, in a folder outside the repository."""
    environment = {"PATH": f"{installed}:{os.defpath}", "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_train_export_and_sample(installed, tmp_path):
    built = "no kernels" if backend() == "torch" else "C++ kernels"
    assert built in run(installed, tmp_path, "python", "-m", "cca_ds")
    settings = ("batch.max_steps=2", "logging.sample_every_steps=null", "data.workers=0")
    run(installed, tmp_path, "cca-train", "--output", "alone", "--set", *settings)
    run(
        installed,
        tmp_path,
        "deepspeed",
        f"--master_port={free_port()}",
        "--module",
        "cca_ds.train",
        "--output",
        "launched",
        "--set",
        *settings,
    )
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("alone", "launched")]
    losses = [[line.split('"loss": ')[1].partition(",")[0] for line in lines] for lines in metrics]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    run(installed, tmp_path, "cca-export", "--run", "alone", "--output", "policy.safetensors")
    few = ("sampling.images_per_class=2",)
    run(installed, tmp_path, "cca-sample", "--weights", "alone", "--output", "images", "--npz", "--set", *few)
    assert (tmp_path / "images" / "samples.npz").is_file()
    assert "GPU hours" in run(installed, tmp_path, "cca-plan", "--recipe", "llamagen-3b", "--nodes", "2xh100:8")
