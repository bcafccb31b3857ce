"""A family that is added by registering its record alone, without a change to the package."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from cca_ds import sample
from cca_ds.models import (
    FAMILIES,
    WeightsError,
    check_weights,
    create_model,
    expected_shapes,
    family_of,
    family_of_model,
    fix_lambda,
    load_weights,
    model_config,
    preset_name,
    save_weights,
)
from cca_ds.models.model_card import model_card
from cca_ds.sampling import generate
from cca_ds.sampling.guidance import describe_guidance
from cca_ds.vq import TOKENIZERS, create_tokenizer
from tests.support.toys import TOY_FAMILY, TOY_TOKENIZER, ToyConfig


@pytest.fixture(autouse=True)
def registered():
    with FAMILIES.temporarily(TOY_FAMILY):
        yield
    assert TOY_FAMILY.name not in FAMILIES


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("toy-s").eval()


def test_built_by_preset_and_by_config():
    assert preset_name("Toy_S") == "toy-s" and family_of("toy-l") is TOY_FAMILY
    assert model_config("toy-l", dim=8) == ToyConfig(n_layer=3, dim=8)
    model = create_model(ToyConfig(dim=4), n_layer=2)
    assert family_of_model(model) is TOY_FAMILY and len(getattr(model, TOY_FAMILY.blocks)) == 2
    with pytest.raises(ValueError, match="ToyConfig has no 'dims': did you mean dim"):
        create_model("toy-s", dims=3)
    with pytest.raises(ValueError, match=r"model\.preset=toy-x: no such model; did you mean toy-"):
        create_model("toy-x")


def test_a_shorter_model_of_the_same_shape():
    config = model_config("toy-l", dim=8)
    assert create_model(config, **TOY_FAMILY.shortened(config, 1)).config == ToyConfig(dim=8)


@torch.no_grad()
def test_likelihoods_are_of_its_logits(model):
    codes_BL, labels_B = torch.randint(17, (3, 64)), torch.tensor([0, 9, 10])
    logp_BLV = model.logits(codes_BL, labels_B).log_softmax(-1)
    expected_B = logp_BLV.gather(-1, codes_BL[..., None]).sum((1, 2))
    torch.testing.assert_close(model(codes_BL, labels_B), expected_B)


def test_sampled_with_its_own_steps(model):
    labels_B = torch.arange(4)
    plain, guided = generate(model, labels_B), generate(model, labels_B, guidance_scale=2.0)
    late = generate(model, labels_B, guidance_scale=2.0, guidance_interval=(8, 32))
    assert plain.shape == (4, 64) and not torch.equal(plain, guided)
    assert torch.equal(late[:, :16], plain[:, :16]) and not torch.equal(late, plain)
    assert describe_guidance(TOY_FAMILY, 0.5) == "guidance s = 0.5 (the toy's weight = 10.5)"


@pytest.mark.parametrize("layout", ["toybox", "safetensors"])
def test_saved_and_loaded_in_its_layout_and_in_safetensors(model, tmp_path, layout):
    save_weights(model, tmp_path / "w", layout)
    again = create_model("toy-s")
    load_weights(again, tmp_path / "w")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"6 missing: mlp\.1\.|4 missing: mlp\.1\."):
        load_weights(create_model("toy-l"), tmp_path / "w")


def test_its_layout_is_its_own(model, tmp_path):
    with pytest.raises(WeightsError, match="layout 'toybox' is for toy models, this one is llamagen"):
        save_weights(create_model("digits"), tmp_path / "w", "toybox")
    with pytest.raises(WeightsError, match="layout 'var' is for var models, this one is toy"):
        save_weights(model, tmp_path / "w", "var")
    with pytest.raises(WeightsError, match="choose one of llamagen, var, toybox, safetensors"):
        save_weights(model, tmp_path / "w", "gguf")


def test_header_and_card_name_it(model, tmp_path):
    card = model_card("toy-cca", TOY_FAMILY, "name: toy\n", base="toy_base")
    save_weights(model, tmp_path / "w.safetensors", beside={"README.md": card})
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert (file.metadata()["family"], file.metadata()["n_layer"]) == ("toy", "1")
    text = (tmp_path / "README.md").read_text()
    assert "license: cc0-1.0" in text and "[Toy](https://example.org/toy)" in text


@torch.no_grad()
def test_one_lambda_is_fixed_in_its_class_embedding():
    conditioned, plain = create_model("toy-s", lambda_conditioning=True).eval(), create_model("toy-s").eval()
    nn.init.normal_(conditioned.lambda_embedding.fc2.weight)
    fixed = fix_lambda(conditioned.state_dict(), 30.0)
    check_weights(expected_shapes(plain), fixed, "the fixed weights")
    plain.load_state_dict(fixed)
    codes_BL, labels_B = torch.randint(17, (2, 64)), torch.tensor([3, 10])
    expected_B = conditioned(codes_BL, labels_B, torch.full((2,), 30.0).log())
    torch.testing.assert_close(plain(codes_BL, labels_B), expected_B)


def test_the_sample_command_draws_with_it(model, tmp_path, capsys):
    save_weights(model, tmp_path / "w.safetensors")
    folder = tmp_path / "s"
    settings = ["model.preset=toy_s", "sampling.images_per_class=1", "logging.progress=false"]
    flags = ["--recipe", "digits", "--weights", str(tmp_path / "w.safetensors"), "--output", str(folder)]
    with TOKENIZERS.temporarily(TOY_TOKENIZER):
        tokenizer = create_tokenizer(TOY_TOKENIZER.name)
        save_weights(tokenizer, tmp_path / "t.safetensors")
        settings += [f"tokenizer.name={TOY_TOKENIZER.name}", f"tokenizer.weights={tmp_path / 't.safetensors'}"]
        assert sample.main([*flags, "--cfg_scale", "10.5", "--npz", "--grid", "--set", *settings]) == 0
    assert "guidance s = 0.5 (the toy's weight = 10.5)" in capsys.readouterr().err
    described = json.loads((folder / "sampling.json").read_text())
    assert (described["model"], described["tokenizer_hash"]) == ("toy-s", tokenizer.hash())
    assert described["guidance_of_family"] == 10.5 and (folder / "samples.npz").is_file()
    codes_BL = generate(model, torch.arange(10), guidance_scale=0.5)
    for index in range(10):
        with Image.open(folder / "images" / f"{index:04d}" / f"{index:06d}.png") as image:
            levels = [round(pixel / 255 * 16) for pixel in image.tobytes()]
        assert levels == codes_BL[index].tolist()


def test_an_unknown_preset_is_one_line_of_the_command(tmp_path, capsys):
    flags = ["--recipe", "digits", "--output", str(tmp_path / "s"), "--set", "model.preset=toy-m"]
    assert sample.main(flags) == 2
    assert "model.preset=toy-m: no such model; did you mean toy-" in capsys.readouterr().err
