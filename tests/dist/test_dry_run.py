"""`--dry_run` refuses what training refuses, with the same line; and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cca_ds import train as entry
from tests.dist.runs import command, generated_table, tiny_weights, train
from tests.support.refusals import called
from tests.training.test_bad_input import rewrite, table

pytestmark = pytest.mark.dist


def weights(path: Path, **changes: torch.Tensor) -> Path:
    save_file(load_file(tiny_weights()) | changes, path)
    return path


def cut(folder: Path) -> Path:
    shard = next(folder.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-8])
    return folder


def flipped(folder: Path) -> Path:
    shard = next(folder.glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return folder


def changed(folder: Path, **values: object) -> Path:
    rewrite(folder, **values)
    return folder


def drawn(folder: Path) -> Path:
    """A copy of the images that the tiny weights drew."""
    return Path(shutil.copytree(generated_table(), folder))


def guided(folder: Path) -> Path:
    settings = json.loads((folder / "manifest.json").read_text())["drawn"]
    return changed(folder, drawn=settings | {"guidance_scale": 1.0})


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


BAD = {
    "no table": lambda t: [f"data.codes={t}/nothing"],
    "codes of another vocabulary": lambda t: [f"data.codes={table(t / 'c', vocab_size=20)}"],
    "more classes": lambda t: [f"data.codes={table(t / 'c', classes=12)}"],
    "fewer images than a batch": lambda t: [f"data.codes={table(t / 'c', 20)}"],
    "a shard cut short": lambda t: [f"data.codes={cut(table(t / 'c'))}"],
    "a flipped bit": lambda t: [f"data.codes={flipped(table(t / 'c'))}"],
    "a manifest that is none": lambda t: [f"data.codes={text(table(t / 'c') / 'manifest.json', '[1]').parent}"],
    "a manifest of words": lambda t: [f"data.codes={changed(table(t / 'c'), images='many')}"],
    "codes of another tokenizer": lambda t: [f"data.codes={changed(table(t / 'c'), tokenizer_hash='0' * 64)}"],
    "a model of other codes": lambda t: ["model.overrides={sequence_length: 32, n_layer: 1, n_head: 2, dim: 32}"],
    "a model of fewer classes": lambda t: ["model.overrides.num_classes=5"],
    "options that the tokenizer has not": lambda t: ["tokenizer.options={x: 3}"],
    "a tokenizer without weights": lambda t: [
        "model.preset=var-d16", "tokenizer.name=var-vqvae", "model.weights=null", "model.from_scratch=true",
        f"data.codes={table(t / 'c')}",
        "model.overrides={depth: 1, width: 64, heads: 1, scales: [8], vocab_size: 17, num_classes: 10}"],
    "a tokenizer's weights that are not there": lambda t: [f"tokenizer.weights={t}/none", "tokenizer.name=var-vqvae"],
    "no weights": lambda t: [f"model.weights={t}/none"],
    "weights that are a text": lambda t: [f"model.weights={text(t / 'w.pt', 'x' * 99)}"],
    "weights of another width": lambda t: [f"model.weights={weights(t / 'w', **{'norm.weight': torch.ones(33)})}"],
    "weights that are no numbers": lambda t: [
        f"model.weights={weights(t / 'w', **{'norm.weight': torch.full((32,), float('nan'))})}"],
    "no reference weights": lambda t: [f"reference.weights={t}/none"],
    "no images drawn": lambda t: ["loss.name=ddo", f"data.generated={t}/none"],
    "encoded images as drawn ones": lambda t: ["loss.name=ddo", f"data.generated={table(t / 'c')}"],
    "a flipped bit in drawn images": lambda t: ["loss.name=ddo", f"data.generated={flipped(drawn(t / 'g'))}"],
    "images drawn with guidance": lambda t: ["loss.name=ddo", f"data.generated={guided(drawn(t / 'g'))}"],
    "images drawn by other weights": lambda t: [
        "loss.name=ddo", f"data.generated={drawn(t / 'g')}",
        f"model.weights={weights(t / 'w', **{'norm.weight': torch.full((32,), 0.5)})}"],
    "images drawn by the policy and not by the reference": lambda t: [
        "loss.name=ddo", f"data.generated={drawn(t / 'g')}",
        f"reference.weights={weights(t / 'w', **{'norm.weight': torch.full((32,), 0.5)})}"],
}  # fmt: skip


def dry_run(folder: Path, *settings: str) -> tuple[int, str, list[str]]:
    """Exit code, what is printed, and the lines of the refusal."""
    words = command(folder, *settings, flags=["--dry_run"])
    arguments = words[next(at for at, word in enumerate(words) if word.endswith("train.py")) + 1 :]
    code, shown, refused = called(entry.main, arguments)
    return code, shown, [line for line in refused.splitlines() if line.strip()]


@pytest.mark.parametrize("case", BAD)
def test_the_same_line(tmp_path, case):
    settings = ["batch.max_steps=1", *BAD[case](tmp_path)]
    (output,) = train(1, tmp_path / "run", *settings, check=False)
    (said,) = [line for line in output.stderr.splitlines() if line.strip()]
    assert output.returncode == 2 and not (tmp_path / "run").exists(), output.stderr
    code, _, refused = dry_run(tmp_path / "run", *settings)
    assert code == 2, refused
    assert re.sub(r"^rank 0 on \S+: ", "", said) in {re.sub("^config error: |^train: ", "", line) for line in refused}


def test_what_can_train_is_not_refused(tmp_path):
    code, shown, refused = dry_run(tmp_path / "run", f"data.codes={table(tmp_path / 'c')}")
    assert (code, refused) == (0, []) and "# memory" in shown and not (tmp_path / "run").exists()


def test_a_round_of_ddo_is_not_refused(tmp_path):
    """Also of a policy that is trained further, while the reference is what drew the images."""
    settings = ["loss.name=ddo", f"data.generated={drawn(tmp_path / 'g')}"]
    trained = weights(tmp_path / "w", **{"norm.weight": torch.full((32,), 0.5)})
    further = [f"model.weights={trained}", f"reference.weights={tiny_weights()}"]
    for more in ([], further):
        code, shown, refused = dry_run(tmp_path / "run", *settings, *more)
        assert (code, refused) == (0, []) and "generated images: " in shown
