"""Out of the shards of two ranks: bit-equal, in the original's keys, the moving average too; and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cca_ds import export as entry
from cca_ds.checkpoints.deepspeed_state import consolidated_weights
from cca_ds.checkpoints.export_weights import _base, _shared_recipe
from cca_ds.checkpoints.run_weights import join_shards
from cca_ds.checkpoints.store import complete_checkpoints
from cca_ds.config.recipes import dump_recipe, load_recipe
from cca_ds.config.schema import path_keys
from cca_ds.models import create_model, load_weights, read_weights
from tests.support.trained_run import DECAY, trained_run

BASE = Path(__file__).parents[2] / "cca_ds" / "assets" / "digits_base.safetensors"

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def run_folder() -> Path:
    return trained_run()


def export(run_folder: Path, output: Path, *flags: str) -> int:
    return entry.main(["--run", str(run_folder), "--output", str(output), *flags])


@pytest.mark.parametrize(("layout", "name"), [("safetensors", "p.safetensors"), ("llamagen", "p.pt")])
def test_loads_again_bit_equal(run_folder, tmp_path, capsys, layout, name):
    assert export(run_folder, tmp_path / name, "--layout", layout) == 0
    assert "after step 2" in capsys.readouterr().out
    shards = consolidated_weights(complete_checkpoints(run_folder / "checkpoints")[0])
    module = create_model("digits")
    load_weights(module, tmp_path / name)
    own = dict(module.named_parameters())
    assert own.keys() <= shards.keys()
    for key, parameter in own.items():
        assert torch.equal(parameter, shards[key]), key
    base = read_weights(BASE)
    assert any(not torch.equal(parameter, base[key].float()) for key, parameter in own.items())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_llamagen_layout_is_strict_in_the_originals_keys(run_folder, tmp_path, golden):
    export(run_folder, tmp_path / "p.pt", "--layout", "llamagen")
    state = torch.load(tmp_path / "p.pt", weights_only=True)["model"]
    recorded = json.loads((golden / "state_dict_shapes.json").read_text())["llamagen/GPT-B"]
    original = recorded["state_dict"].keys()
    computed = {"freqs_cis"}
    few = {key for key in original if key not in computed and not key.startswith("layers.")}
    layer = {key.split(".", 2)[2] for key in original if key.startswith("layers.")}
    assert {key for key in state if not key.startswith("layers.")} == few
    assert {key.split(".", 2)[2] for key in state if key.startswith("layers.")} == layer


def test_older_checkpoint_and_moving_average(run_folder, tmp_path):
    second, first = complete_checkpoints(run_folder / "checkpoints")
    export(run_folder, tmp_path / "w1.safetensors", "--checkpoint", str(first))
    export(run_folder, tmp_path / "w2.safetensors", "--checkpoint", str(second))
    export(run_folder, tmp_path / "ema.safetensors", "--ema")
    one, two = read_weights(tmp_path / "w1.safetensors"), read_weights(tmp_path / "w2.safetensors")
    average, base = read_weights(tmp_path / "ema.safetensors"), read_weights(BASE)
    for key, value in average.items():
        after_one = DECAY * base[key].double() + (1 - DECAY) * one[key].double()
        expected = DECAY * after_one + (1 - DECAY) * two[key].double()
        assert torch.allclose(value.double(), expected, atol=1e-7), key
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_shards_of_an_average_join_in_the_order_of_ranks():
    shards = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0])}]
    assert join_shards(shards)["w"].tolist() == [1.0, 2.0, 3.0]


def test_recipe_in_the_metadata_and_card_beside_the_file(run_folder, tmp_path):
    report = tmp_path / "scores.json"
    report.write_text(json.dumps({"metrics": {"fid": 1.5, "recall": None}}))
    output = tmp_path / "hub" / "model.safetensors"
    assert export(run_folder, output, "--model_card", "--metrics", str(report), "--dtype", "bf16") == 0
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    (tmp_path / "recipe.yaml").write_text(metadata["recipe"])
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe(str(run_folder / "config.yaml"))
    assert metadata["step"] == "2"
    card = (output.parent / "README.md").read_text()
    assert "`digits_base.safetensors`" in card and "| FID | 1.500 |" in card and "recall |" not in card
    assert 'cca_ds.load("model.safetensors")' in card and str(tmp_path) not in card
    config = json.loads((output.parent / "config.json").read_text())
    assert (config["num_classes"], config["tokenizer"]["name"]) == (10, "digits")
    assert config["id2label"] == {str(label): str(label) for label in range(10)}  # by the run, whose table is built in


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_umasks_mode(run_folder, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        assert export(run_folder, tmp_path / "w.safetensors", "--model_card") == 0
        assert export(run_folder, tmp_path / "w.pt", "--layout", "llamagen") == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("w.safetensors", "w.pt", "README.md", "config.json"), mode)


@pytest.mark.parametrize("text", ["# My project\n", "# cca_ds\n\nlibrary_name: cca_ds\n", "---\nx: cca_ds\n---\n"])
def test_a_card_replaces_its_own_kind_alone(run_folder, tmp_path, capsys, text):
    (tmp_path / "README.md").write_text(text)
    message = refused(capsys, "--run", run_folder, "--output", tmp_path / "w.safetensors", "--model_card")
    assert "README.md is there and not of an export" in message
    assert (tmp_path / "README.md").read_text() == text and len(list(tmp_path.iterdir())) == 1
    for _ in range(2):
        assert export(run_folder, tmp_path / "out" / "w.safetensors", "--model_card") == 0


def test_what_is_shared_names_no_folder_of_this_machine():
    where = "/home/someone/secret"
    values = [f"{section}.{name}={where}/{name}" for section, name in path_keys()]
    run = load_recipe("llamagen-b-ddo", [*values, "reference.placement=cached"])
    assert where in dump_recipe(run)
    shared = _shared_recipe(run)
    assert where not in shared and "generated: generated" in shared and "cache: cache" in shared


def test_the_base_of_a_run_that_began_with_a_run(tmp_path):
    for name, weights in (("a", "weights/c2i_B_384.pt"), ("b", tmp_path / "a"), ("loop", tmp_path / "loop")):
        (tmp_path / name).mkdir()
        dumped = dump_recipe(load_recipe("llamagen-b", [f"model.weights={weights}"]))
        (tmp_path / name / "config.yaml").write_text(dumped)
    assert [_base(str(tmp_path / name)) for name in ("a", "b", "gone", "loop")] == ["c2i_B_384.pt"] * 2 + [
        "gone",
        "loop",
    ]
    (tmp_path / "a" / "config.yaml").write_text("model: 5")
    assert _base(str(tmp_path / "b")) == "a"  # damaged
    assert _base(None) is None and _base("mine.safetensors") == "mine.safetensors"


def refused(capsys, *flags: object) -> str:
    assert entry.main([str(flag) for flag in flags]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    return message


def test_what_is_refused_leaves_nothing(run_folder, tmp_path, capsys):
    output = tmp_path / "new" / "p.pth"
    message = refused(capsys, "--run", run_folder, "--output", output, "--layout", "var")
    assert "--layout llamagen" in message
    message = refused(capsys, "--run", tmp_path / "nowhere", "--output", output)
    assert "no such folder" in message
    assert "name is empty" in refused(capsys, "--run", run_folder, "--output", output, "--push_to_hub", "")
    (tmp_path / "empty").mkdir()
    assert "config.yaml" in refused(capsys, "--run", tmp_path / "empty", "--output", output)
    message = refused(capsys, "--run", run_folder, "--output", output, "--checkpoint", tmp_path / "step_7")
    assert "no such folder" in message
    assert "name the file" in refused(capsys, "--run", run_folder, "--output", tmp_path)
    assert "--layout safetensors" in refused(
        capsys, "--run", run_folder, "--output", output, "--layout", "llamagen", "--model_card"
    )
    assert not output.parent.exists()


def test_damaged_checkpoints_are_passed_over_or_told(run_folder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    second, first = complete_checkpoints(copy / "checkpoints")
    victim = next((second / "deepspeed").rglob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-10])
    assert export(copy, tmp_path / "p.safetensors") == 0
    assert "after step 1" in capsys.readouterr().out
    (first / "average_rank_00001.safetensors").unlink()
    message = refused(capsys, "--run", copy, "--output", tmp_path / "q.safetensors")
    assert "no checkpoint is intact" in message and "average_rank_00001.safetensors is missing" in message
    assert not (tmp_path / "q.safetensors").exists()
