"""Layers of the transformers against their definitions: values, gradients, rounding."""

import pytest
import torch
from torch import nn

from cca_ds.models.layers import GatedLinear, LambdaEmbedding, RMSNorm, rotary_table, rotate
from cca_ds.ops.causal_attention import causal_attention


def test_gradients_equal_plain_autograds():
    """Against the layers written out with PyTorch's own operations, in float32."""
    torch.manual_seed(1)
    x = torch.randn(5, 7, 24, requires_grad=True)
    norm = RMSNorm(24)
    nn.init.normal_(norm.weight)
    plain = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight
    seed = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, (x, norm.weight), seed)
    output = norm(x)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(torch.autograd.grad(output, (x, norm.weight), seed), wanted)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), plain)

    gate, value = (torch.randn(5, 7, 24, requires_grad=True) for _ in range(2))
    layer = GatedLinear(24, 6)
    plain = (nn.functional.silu(gate) * value) @ layer.weight.T
    wanted = torch.autograd.grad(plain, (gate, value, layer.weight), seed[..., :6])
    output = layer(gate, value)
    torch.testing.assert_close(output, plain)
    found = torch.autograd.grad(output, (gate, value, layer.weight), seed[..., :6])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("length", "dtype", "tolerance"), [(9, "float32", 1e-5), (400, "float32", 1e-5), (400, "bfloat16", 2e-2)]
)
def test_causal_attention_and_its_gradient_equal_the_definition(length, dtype, tolerance):
    """Against softmax over a masked matrix of scores, in float64 from the same rounded input."""
    torch.manual_seed(4)
    heads, channels = 3, 16
    grid = round(length**0.5)
    table = rotary_table(grid, channels)[:length]
    qkv = torch.randn(2, length, 3 * heads * channels).to(getattr(torch, dtype)).requires_grad_()
    seed = torch.randn(2, length, heads * channels).to(qkv.dtype)
    output = causal_attention(qkv, table, heads)
    gradient = torch.autograd.grad(output, qkv, seed)[0]

    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact.view(2, length, 3, heads, channels).permute(2, 0, 3, 1, 4)
    cos, sin = table.double().unbind(-1)

    def turn(x):
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    scores = turn(q) @ turn(k).transpose(-1, -2) / channels**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    wanted_gradient = torch.autograd.grad(wanted, exact, seed.double())[0]
    for found, true in ((output, wanted), (gradient, wanted_gradient)):
        assert (found.double() - true).norm() < tolerance * true.norm()
        assert found.dtype == qkv.dtype


def test_bfloat16_norm_is_the_rounded_float32_one():
    torch.manual_seed(2)
    x = torch.randn(64, 32).bfloat16()
    norm = RMSNorm(32).bfloat16()
    nn.init.normal_(norm.weight)
    exact = (
        x.double() * torch.rsqrt((x.double() ** 2).mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    )
    error = (norm(x).double() - exact).abs() / exact.abs().clamp(min=1e-2)
    assert error.max() < 2**-7  # two roundings to 8 bits


def test_rotary_turns_by_row_and_column_and_spares_no_class_token():
    table = rotary_table(grid_size=3, head_dim=8, base=100.0)
    assert table.shape == (10, 4, 2) and (table[0] == 0).all()
    row, column = 2, 1
    angles = torch.tensor([row * 1.0, row * 100.0**-0.5, column * 1.0, column * 100.0**-0.5])
    torch.testing.assert_close(table[1 + row * 3 + column], torch.stack([angles.cos(), angles.sin()], -1))
    x = torch.randn(1, 10, 1, 8)
    a, b = x[0, 8, 0, 2], x[0, 8, 0, 3]
    turned = rotate(x, table)[0, :, 0]
    torch.testing.assert_close(turned[8, 2], a * angles[1].cos() - b * angles[1].sin())
    torch.testing.assert_close(turned[8, 3], b * angles[1].cos() + a * angles[1].sin())
    assert (turned[0] == 0).all()


def test_lambda_embedding_tells_neighbouring_lambdas_apart_smoothly():
    embedding = LambdaEmbedding(32)
    nn.init.normal_(embedding.fc2.weight)
    points = embedding(torch.linspace(0, 9, 91))
    steps = (points[1:] - points[:-1]).norm(dim=-1)
    distance = torch.cdist(points, points) + torch.eye(91) * 1e9
    assert distance.min() > 0.1 * steps.median()
    assert steps.max() < 0.5 * torch.cdist(points, points).max()
