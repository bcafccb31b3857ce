"""A loss, a tokenizer and a family that the package does not know train, export and sample once they are registered."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cca_ds.data.table_files import write_codes
from cca_ds.vq.digits import load_digit_images
from tests.dist.ranks import REPOSITORY, clean_environment
from tests.dist.runs import PATIENCE, metrics
from tests.support.toys import TOY_FAMILY, TOY_TOKENIZER, ToyTokenizer

pytestmark = pytest.mark.dist


def command(name: str, *arguments: object) -> subprocess.CompletedProcess:
    program = [sys.executable, "tests/dist/toy_commands.py", name, *map(str, arguments)]
    environment = clean_environment() | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_train_export_sample_with_a_loss_a_tokenizer_and_a_family_of_the_test(tmp_path):
    tokenizer = ToyTokenizer().requires_grad_(False)
    images_BCHW, labels_B = load_digit_images()
    save_file({"values": tokenizer.values.clone()}, tmp_path / "toy.safetensors")
    write_codes(
        tmp_path / "codes", tokenizer.encode(images_BCHW)[:, None].numpy(), labels_B.numpy(), vocab_size=17, classes=10,
        family=TOY_FAMILY.name, tokenizer=TOY_TOKENIZER.name, tokenizer_hash=tokenizer.hash(),
    )  # fmt: skip
    recipe = {
        "name": "toy", "model": {"preset": "toy-l", "from_scratch": True},
        "tokenizer": {"name": "toy-levels", "weights": str(tmp_path / "toy.safetensors")},
        "data": {"codes": str(tmp_path / "codes"), "workers": 0},
        "loss": {"name": "margin", "beta": 0.5, "options": {"margin": 3.0}},
        "batch": {"global_size": 32, "micro_size": 16, "max_steps": 6}, "optimizer": {"learning_rate": 1e-3},
        "sampling": {"images_per_class": 1}, "logging": {"progress": False, "tensorboard": False},
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    done = command("train", "--ds_config", "ds_configs/zero3.json", "--recipe", tmp_path / "toy.yaml", "--output", run)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(run)]
    assert losses[0] == pytest.approx(3.0, abs=1e-3) and losses[-1] < losses[0]  # r = 0: the margin itself

    done = command("export", "--run", run, "--output", tmp_path / "toy.pt", "--layout", "toybox")
    assert done.returncode == 0, done.stderr
    file = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert file["epoch"] == 0 and "module.head.weight" in file["state_dict"]
    done = command("export", "--run", run, "--output", tmp_path / "policy.safetensors")
    assert done.returncode == 0 and "head.weight" in load_file(tmp_path / "policy.safetensors")

    done = command("sample", "--weights", run, "--output", tmp_path / "samples", "--cfg_scale", 11)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "samples/images").rglob("*.png"))) == 10
    assert json.loads((tmp_path / "samples/sampling.json").read_text())["guidance_scale"] == 1.0

    done = command("train", "--ds_config", "ds_configs/zero3.json", "--recipe", tmp_path / "toy.yaml", "--output", run,
                   "--set", "loss.options.margn=3")  # fmt: skip
    assert done.returncode == 2 and "did you mean margin?" in done.stderr
