"""Layers of the transformers against their definitions: values, gradients, rounding."""

import torch
from torch import nn

from cca_ds.models.layers import LambdaEmbedding, RMSNorm, SwiGLULinear


def test_gradients_equal_plain_autograds():
    """Against the layers written out with PyTorch's own operations, in float32."""
    torch.manual_seed(1)
    x = torch.randn(5, 7, 24, requires_grad=True)
    norm = RMSNorm(24)
    nn.init.normal_(norm.weight)
    plain = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight
    seed = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, norm.weight), seed)
    output = norm(x)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(torch.autograd.grad(output, (x, norm.weight), seed), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), plain)

    gate, value = (torch.randn(5, 7, 24, requires_grad=True) for _ in range(2))
    layer = SwiGLULinear(24, 6)
    plain = (nn.functional.silu(gate) * value) @ layer.weight.T
    expected = torch.autograd.grad(plain, (gate, value, layer.weight), seed[..., :6])
    output = layer(gate, value)
    torch.testing.assert_close(output, plain)
    found = torch.autograd.grad(output, (gate, value, layer.weight), seed[..., :6])
    torch.testing.assert_close(found, expected)


def test_bfloat16_norm_is_the_rounded_float32_one():
    torch.manual_seed(2)
    x = torch.randn(64, 32).bfloat16()
    norm = RMSNorm(32).bfloat16()
    nn.init.normal_(norm.weight)
    exact = x.double() * torch.rsqrt((x.double() ** 2).mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    error = (norm(x).double() - exact).abs() / exact.abs().clamp(min=1e-2)
    assert error.max() < 2**-7  # two roundings to 8 bits


def test_lambda_embedding_separates_neighbouring_lambdas_smoothly():
    embedding = LambdaEmbedding(32)
    nn.init.normal_(embedding.fc2.weight)
    points = embedding(torch.linspace(0, 9, 91))
    steps = (points[1:] - points[:-1]).norm(dim=-1)
    distance = torch.cdist(points, points) + torch.eye(91) * 1e9
    assert distance.min() > 0.1 * steps.median()
    assert steps.max() < 0.5 * torch.cdist(points, points).max()
