"""LlamaGen's tokenizer: codes and images equal the recorded ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cca_ds.models import WeightsError, load_weights, save_weights
from cca_ds.vq import create_tokenizer
from cca_ds.vq.llamagen_vq import _Codebook
from tests.support.golden_tokenizers import VQ16_OPTIONS, vq16


@pytest.fixture(scope="module")
def tokenizer(device):
    """The recorded tokenizer of 32 channels."""
    return vq16().to(device)


@pytest.fixture(scope="module")
def recorded(golden, device):
    return {key: value.to(device) for key, value in load_file(golden / "vq16_io.safetensors").items()}


def test_codes_and_images_equal_the_originals(tokenizer, recorded):
    codes = tokenizer.encode(recorded["image"])
    assert torch.equal(codes, recorded["codes"]) and codes.dtype == torch.int64
    images = tokenizer.decode(recorded["codes"].to(torch.int32))
    torch.testing.assert_close(images, recorded["decoded"], atol=1e-3, rtol=0)


def test_an_image_does_not_depend_on_its_batch(tokenizer, recorded):
    for row in range(2):
        assert torch.equal(tokenizer.encode(recorded["image"][row : row + 1])[0], recorded["codes"][row])


def test_keys_and_shapes_of_the_published_tokenizer(golden):
    published = json.loads((golden / "state_dict_shapes.json").read_text())["tokenizer/VQ-16"]
    with torch.device("meta"):
        full = create_tokenizer("llamagen-vq16")
    assert {key: list(value.shape) for key, value in full.state_dict().items()} == published["state_dict"]
    learned = sum(parameter.numel() for parameter in full.parameters())
    assert learned == published["params"]
    assert (full.vocab_size, full.sequence_length(384), full.sequence_length(256)) == (16384, 576, 256)


def test_bfloat16_finds_most_of_the_same_codes(recorded, device):
    half = vq16()
    before = half.hash()
    half = half.to(device).bfloat16()
    assert (half.encode(recorded["image"]) == recorded["codes"]).float().mean() > 0.8
    images = half.decode(recorded["codes"])
    assert images.dtype == torch.bfloat16
    assert (images.float() - recorded["decoded"]).abs().mean() < 0.02
    assert half.hash() == before


def test_nearest_is_the_smallest_angle_whatever_the_lengths():
    torch.manual_seed(0)
    codebook = _Codebook(50)
    z = torch.randn(9000, 8) * 3  # more rows than are compared at once
    with torch.no_grad():
        codebook.embedding.weight.mul_(torch.rand(50, 1) * 5 + 0.1)
        found = codebook.nearest(z)
    cosine = torch.nn.functional.cosine_similarity(z.double()[:, None], codebook.embedding.weight.double(), dim=-1)
    best = cosine.max(-1).values
    torch.testing.assert_close(cosine.gather(1, found[:, None])[:, 0], best, atol=1e-6, rtol=0)


def test_it_is_frozen_and_its_hash_tells_weights_apart(tokenizer):
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    shape = {"channels": 32, "channel_multipliers": (1, 1), "z_channels": 32, "codebook_size": 64}
    one, other = create_tokenizer("llamagen-vq16", **shape), create_tokenizer("llamagen-vq16", **shape)
    assert len(one.hash()) == 64 and one.hash() == one.hash() != other.hash() != tokenizer.hash()


def test_saved_weights_load_again(tokenizer, tmp_path):
    save_weights(tokenizer, tmp_path / "vq.safetensors")
    again = create_tokenizer("llamagen-vq16", weights=tmp_path / "vq.safetensors", **VQ16_OPTIONS)
    assert again.hash() == tokenizer.hash()


def test_bad_input_gets_one_line(tokenizer, golden, device):
    with pytest.raises(ValueError, match=r"square RGB, \[B, 3, H, H\], not \[1, 1, 64, 64\]"):
        tokenizer.encode(torch.zeros(1, 1, 64, 64, device=device))
    with pytest.raises(ValueError, match="image_size=60 must be a multiple of 16"):
        tokenizer.encode(torch.zeros(1, 3, 60, 60, device=device))
    with pytest.raises(ValueError, match="15 codes an image are no square"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.long, device=device))
    for code in (64, -1):
        with pytest.raises(ValueError, match=rf"code {code} is outside the tokenizer's codebook 0\.\.63"):
            tokenizer.decode(torch.full((1, 16), code, device=device))
    with pytest.raises(ValueError, match="channels=33 must be a multiple of 32"):
        create_tokenizer("llamagen-vq16", channels=33)
    with pytest.raises(ValueError, match="vq8: no such name; known: digits, llamagen-vq16, var-vqvae"):
        create_tokenizer("vq8")
    with pytest.raises(WeightsError, match="holds VAR's tokenizer, but LlamaGen's tokenizer is needed"):
        load_weights(tokenizer, golden / "var_vae_ch32.pth")
