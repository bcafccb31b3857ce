"""`cca_ds.load`, and the session of docs/python_api.md as it stands there."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cca_ds
from cca_ds import export
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.config.recipes import ConfigError
from cca_ds.files import save_safetensors
from cca_ds.models import WeightsError
from tests.support.trained_run import trained_run

REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "cca_ds" / "assets" / "digits_base.safetensors"


def test_the_documented_session(tmp_path, monkeypatch, capsys):
    (text,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "python_api.md").read_text(), re.DOTALL)
    (tmp_path / "cca_ds" / "assets").mkdir(parents=True)
    shutil.copy(BASE, tmp_path / "cca_ds" / "assets")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(text, "docs/python_api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert float(re.search(r"recognised: ([\d.]+)", shown)[1]) >= 0.7
    assert 0.5 < float(re.search(r"nats a code: ([\d.]+)", shown)[1]) < 2.5
    assert (names["logp"] > names["unconditional"]).float().mean() >= 0.8
    assert load_file(tmp_path / "digits.safetensors").keys() == dict(names["model"].named_parameters()).keys()


def test_a_run_and_its_export_are_the_same_model(tmp_path):
    run = trained_run()
    assert export.main(["--run", str(run), "--output", str(tmp_path / "w.safetensors")]) == 0
    from_run, from_file = cca_ds.load(run), cca_ds.load(tmp_path / "w.safetensors", precision="bf16")
    assert not from_run.model.training and from_run.recipe.model == from_file.recipe.model
    for one, other in zip(from_run.model.parameters(), from_file.model.parameters(), strict=True):
        assert other.dtype == torch.bfloat16 and torch.equal(one.to(torch.bfloat16), other)


def described(path, **metadata):
    save_safetensors(load_file(BASE), path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: t, CheckpointError, "holds no config.yaml"),
        (lambda t: t / "none", WeightsError, "does not exist"),
        (lambda t: described(t / "w"), ConfigError, "no recipe in its header"),
        (lambda t: described(t / "w", recipe="[1"), ConfigError, "the recipe in its header is none"),
        (lambda t: described(t / "w", recipe="extends: digits"), ConfigError, "the recipe in its header is none"),
        (lambda t: described(t / "w", recipe="model: {preset: x}"), ValueError, "model.preset=x: no such model"),
        (lambda t: described(t / "w", recipe="!!python/object/apply:os.system [x]"), ConfigError, "is none"),
        (lambda t: described(t / "w", recipe="model: {overrides: {dim: 64}}"), WeightsError, "does not fit the model"),
    ],
)
def test_what_cannot_be_loaded(make, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        cca_ds.load(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_exported_names_no_folder_of_this_machine(tmp_path):
    run = trained_run()
    output = tmp_path / "out" / "model.safetensors"
    assert export.main(["--run", str(run), "--output", str(output), "--model_card"]) == 0
    header = output.read_bytes()[8:].split(b"}}")[0].decode(errors="replace")
    card = (output.parent / "README.md").read_text()
    for text in (header, card):
        assert "/tmp" not in text and str(REPOSITORY) not in text and str(Path.home()) not in text
    assert json.loads('"' + re.search(r'"preset":"([^"]+)"', header)[1] + '"') == "digits"
