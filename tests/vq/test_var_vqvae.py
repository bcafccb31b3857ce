"""VAR's tokenizer: the recorded codes and images, the published names, its quantizer by hand, and its training."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cca_ds.vq import create_tokenizer
from cca_ds.vq.digits import load_digit_images
from cca_ds.vq.var_pyramid import ResidualPyramid
from tests.support.golden_tokenizers import VQVAE_OPTIONS, vqvae


@pytest.fixture
def tokenizer(device):
    return vqvae().to(device)


@pytest.fixture(scope="module")
def recorded(golden, device):
    return {name: tensor.to(device) for name, tensor in load_file(golden / "var_io.safetensors").items()}


def test_codes_are_the_recorded_ones(tokenizer, recorded):
    assert torch.equal(tokenizer.encode(recorded["image"]), recorded["codes"])


def test_an_image_has_the_same_codes_alone_and_in_a_batch(tokenizer, recorded):
    alone = [tokenizer.encode(image[None]) for image in recorded["image"]]
    assert torch.equal(torch.cat(alone), recorded["codes"])


def test_decoded_images_are_the_recorded_ones(tokenizer, recorded):
    torch.testing.assert_close(tokenizer.decode(recorded["codes"]), recorded["reconstruction"], atol=1e-3, rtol=0)


def test_any_integer_dtype_decodes(tokenizer, recorded):
    same = tokenizer.decode(recorded["codes"].to(torch.int32))
    assert torch.equal(same, tokenizer.decode(recorded["codes"]))


def test_teacher_input_is_the_recorded_one(tokenizer, recorded):
    torch.testing.assert_close(tokenizer.teacher_input(recorded["codes"]), recorded["var_input"], atol=1e-5, rtol=0)


def test_names_and_shapes_of_the_published_tokenizer(golden):
    published = json.loads((golden / "state_dict_shapes.json").read_text())["tokenizer/VAR-VQVAE"]
    with torch.device("meta"):
        full = create_tokenizer("var-vqvae")
    assert {key: list(value.shape) for key, value in full.state_dict().items()} == published["state_dict"]
    assert sum(parameter.numel() for parameter in full.parameters()) == published["params"]
    assert full.vocab_size == 4096 and full.sequence_length(256) == 680 and full.image_size == 256


def test_bf16_decodes_nearly_the_same_image(tokenizer, recorded):
    images = tokenizer.bfloat16().decode(recorded["codes"])
    assert images.dtype == torch.bfloat16
    assert (images.float() - recorded["reconstruction"]).abs().mean() < 0.03


def test_autocast_leaves_the_quantizer_in_float32(tokenizer, recorded, device):
    with torch.autocast(device, torch.bfloat16):
        seen = tokenizer.teacher_input(recorded["codes"])
        codes = tokenizer.encode(recorded["image"])
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, recorded["var_input"], atol=1e-5, rtol=0)
    # the encoder before it is in bf16: a coarse code that tips over takes finer ones along, how many depends on
    # the processor's convolutions; by chance 1 in 64 would agree
    assert (codes == recorded["codes"]).float().mean() > 0.5


def test_the_hash_outlives_a_cast_and_knows_the_weights(tokenizer):
    before = tokenizer.hash()
    assert tokenizer.bfloat16().hash() == before
    again = vqvae()
    assert again.hash() == before
    assert create_tokenizer("var-vqvae", **VQVAE_OPTIONS).hash() != before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, io: t.encode(io["image"][..., :32]), r"takes images \[B, \[3, 64, 64\]\], not \[3, 3, 64, 32\]"),
        (lambda t, io: t.encode(io["image"][:, :1]), r"not \[3, 1, 64, 64\]"),
        (lambda t, io: t.decode(io["codes"][:, :29]), r"codes of shape \[3, 29\].*take \[B, 30\]"),
        (lambda t, io: t.decode(io["codes"] + 64), "code .* is outside the tokenizer's codebook 0..63"),
        (lambda t, io: t.decode(io["codes"] - 64), "code -.* is outside the tokenizer's codebook 0..63"),
        (lambda t, io: t.sequence_length(128), "are for 64 px images, not 128 px"),
    ],
)
def test_bad_input_is_one_clear_line(tokenizer, recorded, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(tokenizer, recorded)
    assert "\n" not in str(error.value)


def _pyramid(scales, channels=2, codes=3):
    """A pyramid whose phi is the identity, so that its arithmetic can be done by hand."""
    pyramid = ResidualPyramid(codes, channels, scales)
    with torch.no_grad():
        for phi in pyramid.quant_resi.qresi_ls:
            phi.weight.zero_()
            phi.bias.zero_()
            phi.weight[:, :, 1, 1] = torch.eye(channels)
    return pyramid


def test_quantizer_by_hand():
    pyramid = _pyramid((1, 2), channels=1, codes=3)
    with torch.no_grad():
        pyramid.embedding.weight.copy_(torch.tensor([[4.0], [1.0], [-1.0]]))
    features = torch.tensor([[[[5.0, 3.0], [5.0, 5.0]]]])
    # the mean 4.5 takes code 0 (4); what is left, [1, -1, 1, 1], takes codes 1, 2, 1, 1
    codes = pyramid.encode(features)
    assert codes.tolist() == [[0, 1, 2, 1, 1]]
    torch.testing.assert_close(pyramid.feature_sum(codes), features)
    assert pyramid.teacher_input(codes).flatten().tolist() == [4.0] * 4


def test_each_scale_takes_the_nearest_phi_of_four():
    pyramid = ResidualPyramid(4, 2, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    phis = list(pyramid.quant_resi.qresi_ls)
    chosen = [next(i for i in range(4) if phis[i] is pyramid.phi(scale)) for scale in range(10)]
    # places k / 9 against ticks 1/12, 13/36, 23/36, 11/12; 2/9 and 7/9 lie midway and go as in the published program
    assert chosen == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_straight_through_by_hand():
    pyramid = _pyramid((1,), channels=1, codes=2)
    with torch.no_grad():
        pyramid.embedding.weight.copy_(torch.tensor([[2.0], [-2.0]]))
    features = torch.tensor([[[[3.0]]], [[[-1.0]]]], requires_grad=True)
    passed, loss = pyramid.straight_through(features, commitment=0.25)
    assert passed.flatten().tolist() == [2.0, -2.0]
    # both are 1 away: mean square 1, and a quarter of it for the features
    assert loss.item() == pytest.approx(1.25)
    (passed.sum() + loss).backward()
    # 1 through, and 0.25 * 2 * (f - sum) / 2
    assert features.grad.flatten().tolist() == pytest.approx([1.25, 1.25])
    # the codes move towards the features: 2 * (code - f) / 2
    assert pyramid.embedding.weight.grad.flatten().tolist() == pytest.approx([-1.0, -1.0])


def test_a_small_tokenizer_learns_digits():
    torch.manual_seed(0)
    images, _ = load_digit_images()
    tokenizer = create_tokenizer(
        "var-vqvae",
        channels=32,
        channel_multipliers=(1, 1),
        z_channels=8,
        codebook_size=64,
        scales=(1, 2, 4),
        image_channels=1,
    )
    tokenizer.requires_grad_(True).train()
    before = F.mse_loss(tokenizer.decode(tokenizer.encode(images[:64])), images[:64]).item()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    for step in range(20):
        loss, _ = tokenizer.training_loss(images[(torch.arange(32) + 32 * step) % len(images)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval().requires_grad_(False)
    codes = tokenizer.encode(images[:64])
    after = F.mse_loss(tokenizer.decode(codes), images[:64]).item()
    assert codes.shape == (64, 21) and len(codes.unique()) > 8
    assert after < 0.6 * before and after < 0.4  # the digits' own variance is 0.57
