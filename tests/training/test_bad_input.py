"""What a user can get wrong on the command line of `train`: one clear line, a non-zero exit, nothing half-written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cca_ds import train as entry
from cca_ds.config.recipes import dump_recipe, load_recipe
from cca_ds.data.table_files import write_codes
from cca_ds.vq import create_tokenizer
from tests.dist.ranks import REPOSITORY
from tests.dist.runs import tiny_weights, train

ZERO3 = str(REPOSITORY / "ds_configs/zero3.json")


def refusal(capsys, *arguments: str, ds: str | Path = ZERO3) -> str:
    """The one line that `train` says before it starts anything."""
    assert entry.main(["--ds_config", str(ds), *arguments]) == 2
    message = capsys.readouterr()
    assert message.out == "" and message.err.count("\n") == 1, message
    assert "Traceback" not in message.err
    return message.err


def ds_file(folder: Path, **changes) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(json.loads(Path(ZERO3).read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{'stage': 3}", "not JSON"),
        ("[1]", "holds a list, not an object"),
        ("\xff", "not JSON"),
    ],
)
def test_ds_config_that_is_no_json_object(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "ds.json").write_bytes(content.encode("latin-1"))
    line = refusal(capsys, "--output", str(tmp_path / "run"), ds=tmp_path / "ds.json")
    assert str(tmp_path / "ds.json") in line and message in line
    assert not (tmp_path / "run").exists()


def test_a_stage_there_is_not(tmp_path, capsys):
    line = refusal(capsys, ds=ds_file(tmp_path, zero_optimization={"stage": 4}))
    assert "zero_optimization.stage=4 is none of 0, 1, 2, 3" in line


def test_a_forward_larger_than_the_batch(capsys):
    line = refusal(capsys, "--set", "batch.micro_size=64")
    assert "batch.micro_size=64 is larger than batch.global_size=32" in line


@pytest.mark.parametrize("output", ["a file", "/proc/run"])
def test_an_output_that_cannot_be_written(tmp_path, capsys, output):
    if output == "a file":
        (tmp_path / "taken").write_text("")
        output = str(tmp_path / "taken/run")
    line = refusal(capsys, "--output", output)
    assert f"--output {output}" in line and f"{Path(output).parent} cannot be written (" in line


def test_an_output_that_holds_another_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(dump_recipe(load_recipe("digits", ["loss.beta=0.7"])))
    assert "already holds another run" in refusal(capsys, "--output", str(tmp_path))
    (tmp_path / "config.yaml").write_text("loss: [")
    assert "config.yaml is unreadable" in refusal(capsys, "--output", str(tmp_path))
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds a run without its config.yaml" in refusal(capsys, "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_never_wants_a_fresh_folder_and_a_path_a_checkpoint(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(dump_recipe(load_recipe("digits")))
    assert "already holds this run" in refusal(capsys, "--output", str(tmp_path), "--resume", "never")
    line = refusal(capsys, "--output", str(tmp_path), "--resume", str(tmp_path / "step_00000002"))
    assert "step_00000002" in line and "no such file; give auto, never or" in line


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(dump_recipe(load_recipe("digits")))
    (tmp_path / "COMPLETED").write_text("{}")
    assert entry.main(["--ds_config", ZERO3, "--output", str(tmp_path)]) == 0
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["COMPLETED", "config.yaml"]


def table(folder: Path, images: int = 40, *, vocab_size: int = 17, classes: int = 10) -> Path:
    """A table of random codes of the digits' length."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, vocab_size, (images, 1, 64))
    labels = np.arange(images) % classes
    tokenizer_hash = create_tokenizer("digits").hash()
    described = {"family": "llamagen", "tokenizer": "digits", "tokenizer_hash": tokenizer_hash}
    write_codes(folder, codes, labels, vocab_size=vocab_size, classes=classes, **described)
    return folder


def started_and_refused(tmp_path: Path, *settings: str) -> str:
    """The one line of a run of one rank that found what is wrong only once it had begun to read."""
    (output,) = train(1, tmp_path / "run", "batch.max_steps=1", *settings, check=False)
    assert output.returncode in (1, 2), output
    lines = [line for line in output.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, output.stderr
    assert not (tmp_path / "run").exists()
    return lines[0]


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


def spoil(kind: str, tmp_path: Path) -> Path:
    """A weights file that must not be loaded."""
    path = tmp_path / ("w.pt" if kind in ("code", "truncated.pt") else "w.safetensors")
    state = load_file(tiny_weights())
    if kind == "code":
        bad = Malicious()
        bad.target = str(tmp_path / "touched")
        torch.save({"model": bad}, path)
    elif kind == "truncated.pt":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "truncated":
        path.write_bytes(Path(tiny_weights()).read_bytes()[:5000])
    elif kind == "wrong size":
        save_file(state | {"norm.weight": torch.ones(48)}, path)
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "truncated.pt", "wrong size", "code"])
def test_a_checkpoint_that_must_not_be_loaded(kind, tmp_path):
    path = spoil(kind, tmp_path)
    line = started_and_refused(tmp_path, f"model.weights={path}")
    assert str(path) in line and "rank 0 on " in line and "Error:" not in line.split(str(path))[0]
    assert kind != "wrong size" or "norm.weight" in line
    assert not (tmp_path / "touched").exists()


def test_codes_that_do_not_fit_the_model(tmp_path):
    line = started_and_refused(tmp_path, f"data.codes={table(tmp_path / 'more', vocab_size=20)}")
    assert "vocabulary of 20, but digits takes 64 from 17" in line
    line = started_and_refused(tmp_path, f"data.codes={table(tmp_path / 'classes', classes=12)}")
    assert "12 classes, but digits has 10" in line


def test_labels_codes_and_tables_that_are_damaged(tmp_path):
    """The shard is changed and its manifest message that it has the fewer classes or codes."""
    shutil.copytree(table(tmp_path / "good", classes=10), tmp_path / "labels")
    rewrite(tmp_path / "labels", classes=9, label_histogram=[5] * 4 + [4] * 5)
    assert "label 9 is outside 0..8" in started_and_refused(tmp_path, f"data.codes={tmp_path / 'labels'}")
    line = started_and_refused(tmp_path, f"data.codes={tmp_path / 'nothing'}")
    assert str(tmp_path / "nothing") in line
    shutil.copytree(tmp_path / "good", tmp_path / "empty")
    rewrite(tmp_path / "empty", images=0, shards=[], label_histogram=[0] * 10)
    assert "the data set is empty" in started_and_refused(tmp_path, f"data.codes={tmp_path / 'empty'}")


def rewrite(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_batch_larger_than_the_data_set(tmp_path):
    line = started_and_refused(tmp_path, f"data.codes={table(tmp_path / 'few', 20)}")
    assert "20 images, fewer than batch.global_size=32: lower batch.global_size" in line


def test_a_precision_that_the_machine_cannot_do(tmp_path):
    assert "precision=fp16 needs a GPU" in started_and_refused(tmp_path, "precision=fp16")
