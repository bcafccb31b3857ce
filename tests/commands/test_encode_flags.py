"""The encode command's flags, and --verify."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cca_ds import encode
from tests.support.encoded_digits import IMAGES, ROOT, run


def test_verify_decodes_a_grid(tmp_path, digits_folder, expected, capsys):
    assert run("--source", digits_folder, "--output", tmp_path / "t", "--verify") == 0
    lines = capsys.readouterr().out
    assert f"{IMAGES} images, 10 classes" in lines and "17 of 17 in use" in lines
    labels = [int(label) for label in re.search(r"labels ([\d, ]+)\)", lines)[1].split(",")]
    grid = np.asarray(Image.open(tmp_path / "t" / "verify.png"))
    assert grid.shape == (4 * 34, 4 * 34)  # 8 pixels enlarged to 32, and a gap of 2
    tiles = grid.reshape(4, 34, 4, 34)[:, :32:4, :, :32:4].swapaxes(1, 2).reshape(16, 64)
    for tile, label in zip(tiles, labels, strict=True):
        found = (np.round(tile * (16 / 255)).astype(int) == expected[0]).all(axis=1)
        assert label in expected[1][found]


def test_verify_refuses_a_changed_table_and_another_tokenizer(tmp_path, digits_folder, capsys):
    assert run("--source", digits_folder, "--output", tmp_path / "t") == 0
    path = tmp_path / "t" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tokenizer_hash": "0" * 64}))
    assert run("--output", tmp_path / "t", "--verify") == 2
    assert "made by the tokenizer 000000000000" in capsys.readouterr().err
    histogram = manifest["label_histogram"]
    histogram[0], histogram[1] = histogram[1] + 1, histogram[0] - 1
    path.write_text(json.dumps(manifest | {"label_histogram": histogram}))
    assert run("--output", tmp_path / "t", "--verify") == 2
    assert "differ from the manifest's histogram" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "t"], "--source is missing"),
        (["--source", "."], "--output is missing"),
        (["--source", ".", "--output", "t", "--set", "tokenizer.name=llamagen-vq16"], "tokenizer.weights is missing"),
        (["--import_npy", ".", "--output", "t"], "takes LlamaGen's codes"),
        (["--set", "data.crop=none"], "did you mean crops"),
        (["--verify", "--output", "t"], "no table of codes"),
    ],
)
def test_command_lines_that_cannot_work(tmp_path, monkeypatch, digits_folder, arguments, message, capsys):
    monkeypatch.chdir(digits_folder)
    assert encode.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (digits_folder / "t").exists()


def test_deepspeeds_argument_is_accepted(tmp_path, digits_folder):
    assert run("--local_rank=0", "--source", digits_folder, "--output", tmp_path / "t") == 0


def test_nothing_heavy_is_imported_for_the_command_line():
    heavy = "{'torch', 'datasets', 'pyarrow', 'PIL', 'numpy'}"
    code = f"import sys, cca_ds.encode; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
