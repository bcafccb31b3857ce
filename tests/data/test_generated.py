"""Images that the reference drew: which one a pair gets, how their table is made, and which tables are refused."""

import collections
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cca_ds import sample as entry
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import PLAIN, GeneratedCodes, open_generated, require_drawn_by, require_plain
from cca_ds.data.manifest import CodesError, read_manifest
from cca_ds.models import create_model
from cca_ds.models.weight_files import state_hash
from cca_ds.sampling import generate
from cca_ds.sampling.code_table import draw_code_table
from tests.support.digits_table import digits_table
from tests.support.two_ranks import torchrun

SMALL = {"n_layer": 1, "n_head": 2, "dim": 32}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return create_model("digits", **SMALL).eval()


def drawn(module, folder, indices=range(40), **settings):
    about = {"weights_sha256": state_hash(dict(module.named_parameters())), "tokenizer_hash": "", **PLAIN, **settings}
    draw_code_table(folder, module, "digits", indices, {"seed": 7}, 16, about)
    return folder


class Rows:
    """A table whose rows have these labels."""

    folder = "drawn"

    def __init__(self, labels):
        self.labels = np.array(labels)


def test_each_drawn_image_of_a_class_is_used_once_before_any_again():
    """Class 0 has three images and two drawn ones, class 1 two and three; over six epochs all are used equally."""
    data, table = np.array([0, 1, 0, 1, 0]), Rows([1, 0, 1, 0, 1, 2])
    generated = GeneratedCodes(table, data)
    assert generated.rows(np.arange(5), 0).tolist() == [1, 0, 3, 2, 1]
    assert generated.rows(np.arange(5), 1).tolist() == [3, 4, 1, 0, 3]
    assert generated.rows(np.array([4, 0]), 0).tolist() == [1, 1]  # whatever else is asked for
    rows = np.concatenate([generated.rows(np.arange(5), epoch) for epoch in range(6)])
    assert collections.Counter(rows.tolist()) == {1: 9, 3: 9, 0: 4, 2: 4, 4: 4}
    far = generated.rows(np.arange(5), 10**6)  # the baseline's epoch
    assert (table.labels[far] == data).all()


def test_a_class_that_was_not_drawn_is_named():
    with pytest.raises(CodesError, match=r"has no image of class 2 \(2 classes of the data are missing\).*--codes"):
        GeneratedCodes(Rows([0, 1]), np.array([0, 2, 1, 3]))


def test_a_table_holds_what_generate_draws(module, tmp_path):
    table = CodeTable.open(drawn(module, tmp_path / "t"))
    codes_BL, labels_B = table.take(np.arange(40))
    assert labels_B.tolist() == [index % 10 for index in range(40)]
    alone = generate(module, torch.arange(40) % 10, seed=7, image_indices_B=range(40))
    assert (torch.from_numpy(codes_BL) == alone).all()
    open_generated(tmp_path / "t", digits_table(tmp_path / "data"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 0.5}, r"drawn with sampling.guidance_scale=0.5, .*--set sampling.guidance_scale=0$"),
        ({"top_k": 900, "top_p": 0.96}, r"top_k=900, sampling.top_p=0.96, .* sampling.top_k=0 sampling.top_p=1$"),
        ({"temperature": 0.9}, r"sampling.temperature=0.9"),
        ({"tokenizer_hash": "another"}, r"of another tokenizer than data.codes: draw them with the tokenizer.weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tables_that_are_not_the_models_own_distribution_are_refused(settings, message, module, tmp_path):
    folder = drawn(module, tmp_path / "t", **settings)
    with pytest.raises(CodesError, match=message) as caught:
        open_generated(folder, digits_table(tmp_path / "data"))
    assert f"data.generated={folder}" in str(caught.value)


def test_tables_of_something_else_are_refused(module, tmp_path):
    data = digits_table(tmp_path / "data")
    with pytest.raises(CodesError, match="holds encoded images; draw some with cca-sample --codes"):
        open_generated(data.folder, data)
    with pytest.raises(CodesError, match="nowhere: holds no table of codes; draw one with cca-sample --codes"):
        open_generated(tmp_path / "nowhere", data)
    generated = open_generated(drawn(module, tmp_path / "t"), data)
    require_drawn_by(generated, state_hash(dict(module.named_parameters())))
    with pytest.raises(CodesError, match=r"was drawn by other weights .* set reference.weights to what drew it"):
        require_drawn_by(generated, "0" * 64)
    require_plain(PLAIN, "")


@pytest.mark.parametrize("value", [[], "text", 5, {"top_k": 0}, {"weights_sha256": 5}], ids=str)
def test_an_odd_description_of_who_drew_a_table_is_one_line(module, tmp_path, value):
    folder = drawn(module, tmp_path / "t")
    described = json.loads((folder / "manifest.json").read_text()) | {"drawn": value}
    (folder / "manifest.json").write_text(json.dumps(described))
    with pytest.raises(CodesError, match=r"encode the images again|draw it again with cca-sample|draw some with"):
        open_generated(folder, digits_table(tmp_path / "data"))


@pytest.fixture(scope="module")
def weights(module, tmp_path_factory):
    from cca_ds.models import save_weights

    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(module, path)
    settings = [f"model.overrides={json.dumps(SMALL)}", "sampling.images_per_class=60", "logging.progress=false"]
    return ["--weights", str(path), "--codes", "--set", *settings]


def test_two_ranks_and_a_kill_give_the_table_of_one(weights, tmp_path):
    """600 images in three shards; killed after the first, continued on two ranks."""
    assert entry.main(["--output", str(tmp_path / "whole"), *weights]) == 0
    whole = read_manifest(tmp_path / "whole")
    assert (whole.images, len(whole.shards), whole.classes) == (600, 3, 10)
    assert whole.drawn["weights_sha256"] and "weights" not in whole.drawn
    command = [sys.executable, "-m", "cca_ds.sample", "--output", str(tmp_path / "cut"), *weights]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        records, patience = tmp_path / "cut.partial/records", time.monotonic() + 60
        while not list(records.glob("*.json")) and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "cut").exists() and list(records.glob("*.json"))
    torchrun("cca_ds/sample.py", "--output", tmp_path / "cut", *weights)
    assert read_manifest(tmp_path / "cut").content_hash() == whole.content_hash()
    assert not (tmp_path / "cut.partial").exists()


def test_a_table_of_other_settings_is_not_continued(weights, tmp_path, capsys):
    assert entry.main(["--output", str(tmp_path / "t"), *weights]) == 0
    capsys.readouterr()
    assert entry.main(["--output", str(tmp_path / "t"), *weights]) == 0
    assert "is finished already: 600 images" in capsys.readouterr().err
    for more in (["sampling.seed=3"], ["sampling.images_per_class=61"], ["--classes", "1", "2"]):
        assert entry.main(["--output", str(tmp_path / "t"), *weights, *more]) == 2
        assert "exists already, with other contents: choose another --output" in capsys.readouterr().err


def test_some_classes_of_a_table_are_not_taken_for_others(module, tmp_path, monkeypatch):
    """Begun or finished: as many images of other classes are another table."""
    of = {name: [index for index in range(40) if index % 10 in pair] for name, pair in (("a", (1, 2)), ("b", (3, 4)))}
    table = CodeTable.open(drawn(module, tmp_path / "t", of["a"]))
    assert set(table.labels.tolist()) == {1, 2} and table.manifest.drawn["classes"] == [1, 2]
    with pytest.raises(CodesError, match="exists already, with other contents"):
        drawn(module, tmp_path / "t", of["b"])
    monkeypatch.setattr("cca_ds.data.table_builder.TableBuilder.finish", lambda builder, share: None)  # cut off before
    drawn(module, tmp_path / "u", of["a"])
    with pytest.raises(CodesError, match=r"was begun with another table\.drawn\.classes"):
        drawn(module, tmp_path / "u", of["b"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--npz"], "--npz needs images, and --codes decodes none"),
        (["--grid"], "--grid needs images"),
        (["--resize", "16"], "--resize needs images"),
        (["--guidance_scale", "0.5"], "would draw with sampling.guidance_scale=0.5"),
        (["--set", "sampling.top_k=5"], "would draw with sampling.top_k=5, .* draw with --set sampling.top_k=0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_codes_are_drawn_plain_or_not_at_all(flags, message, weights, tmp_path, capsys):
    assert entry.main(["--output", str(tmp_path / "t"), *weights, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())
