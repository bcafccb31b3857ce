"""VAR's norms and linear layers, and their gradients, against float64."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.ops.adaln import gated_residual_linear, modulated_linear, modulated_norm
from tests.support.compare import error


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_modulated_norm_and_its_gradients(device, dtype, tolerance):
    torch.manual_seed(0)
    x, scale, shift, grad = (
        torch.randn(shape, device=device).to(dtype) for shape in [(3, 7, 32), (3, 32), (3, 32), (3, 7, 32)]
    )
    exact = [tensor.double().clone().requires_grad_() for tensor in (x, scale, shift)]
    centred = exact[0] - exact[0].mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + exact[1][:, None]) + exact[2][:, None]
    expected.backward(grad.double())
    inputs = [tensor.clone().requires_grad_() for tensor in (x, scale, shift)]
    found = modulated_norm(*inputs, 1e-6)
    found.backward(grad)
    assert found.dtype == dtype and error(found, expected) < tolerance
    for mine, true in zip(inputs, exact, strict=True):
        assert mine.grad.dtype == dtype and error(mine.grad, true.grad) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_modulated_linear_and_its_gradients(device, dtype, tolerance):
    torch.manual_seed(0)
    shapes = [(3, 7, 32), (3, 32), (3, 32), (48, 32), (48,)]

    def definition(x, scale, shift, weight, bias):
        normed = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return F.linear(normed, weight, bias)

    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    compare(
        lambda x, scale, shift, *linear: modulated_linear(x, scale, shift, 1e-6, *linear),
        definition,
        inputs,
        tolerance,
    )


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_gated_residual_linear_and_its_gradients(device, dtype, tolerance, with_gelu):
    """One image's gate is 0, as stochastic depth leaves it: its gradient is not."""
    torch.manual_seed(0)
    shapes = [(3, 7, 48), (3, 7, 32), (3, 32), (32, 48), (32,)]

    def definition(x, stream, gate, weight, bias):
        active = F.gelu(x, approximate="tanh") if with_gelu else x
        return stream + gate[:, None] * F.linear(active, weight, bias)

    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs[2][1] = 0.0
    compare(lambda *inputs: gated_residual_linear(*inputs, with_gelu), definition, inputs, tolerance)


def compare(function, definition, inputs, tolerance):
    """Value and gradients against the definition in float64."""
    exact = [tensor.double().clone().requires_grad_() for tensor in inputs]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    expected, found = definition(*exact), function(*inputs)
    assert found.dtype == inputs[0].dtype and error(found, expected) < tolerance
    grad = torch.randn_like(found)
    expected.backward(grad.double())
    found.backward(grad)
    for tensor, true in zip(inputs, exact, strict=True):
        assert tensor.grad.dtype == tensor.dtype and error(tensor.grad, true.grad) < tolerance
