"""Codes and scores do not depend on whether a GPU would round convolutions to TF32."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.metrics.inception import InceptionFID
from cca_ds.ops.exact_convolutions import exact_convolutions
from cca_ds.vq import create_tokenizer


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To TF32: ten bits of fraction, to the nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def as_a_gpu_by_default(monkeypatch):
    """conv2d as cuDNN has it where TF32 is allowed, which is PyTorch's default."""
    plain = F.conv2d

    def conv2d(x, weight, *rest, **more):
        if torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32:
            x, weight = rounded(x), rounded(weight)
        return plain(x, weight, *rest, **more)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # the tests' own choice is another
    monkeypatch.setattr(F, "conv2d", conv2d)
    return plain


def test_the_stand_in_rounds(as_a_gpu_by_default):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    assert not torch.equal(F.conv2d(x, weight), as_a_gpu_by_default(x, weight))
    with exact_convolutions():
        assert torch.equal(F.conv2d(x, weight), as_a_gpu_by_default(x, weight))
    assert torch.backends.cudnn.allow_tf32


VQ = {"channels": 32, "channel_multipliers": [1, 1], "codebook_size": 64}
VAR = {"channels": 32, "scales": [1, 2], "codebook_size": 64}


def scored(images):
    return InceptionFID().eval()((images * 255).to(torch.uint8))


def encoded(name, options, images):
    tokenizer = create_tokenizer(name, **options)
    codes = tokenizer.encode(images * 2 - 1)
    return codes, tokenizer.decode(codes), *([tokenizer.features(images * 2 - 1)] if name == "var-vqvae" else [])


PATHS = {
    "metrics": scored,
    "LlamaGen's tokenizer": lambda images: encoded("llamagen-vq16", VQ, images),
    "VAR's tokenizer": lambda images: encoded("var-vqvae", VAR, images),
}


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_codes_and_scores_do_not_use_it(path, as_a_gpu_by_default, monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    torch.manual_seed(1)
    found = PATHS[path](images)
    monkeypatch.setattr(F, "conv2d", as_a_gpu_by_default)
    torch.manual_seed(1)
    assert all(torch.equal(*pair) for pair in zip(found, PATHS[path](images), strict=True))
