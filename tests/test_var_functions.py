"""VAR's norms and linear layers, and their gradients, against float64."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.models.var_functions import gelu_linear, modulated_linear, modulated_norm
from tests.compare import error


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_the_linear_layers_and_their_gradients(device, dtype, tolerance):
    torch.manual_seed(0)
    shapes = [(3, 7, 32), (3, 32), (3, 32), (48, 32), (48,), (3, 7, 48)]
    x, scale, shift, weight, bias, grad = (torch.randn(shape, device=device).to(dtype) for shape in shapes)

    def both(x, scale, shift, weight, bias, back):
        normed = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return F.linear(normed, weight, bias), F.linear(F.gelu(x, approximate="tanh"), back.t())

    exact = [
        tensor.double().clone().requires_grad_() for tensor in (x, scale, shift, weight, bias, weight.t())
    ]
    inputs = [tensor.clone().requires_grad_() for tensor in (x, scale, shift, weight, bias, weight.t())]
    expected = both(*exact)
    mine, zero = inputs, torch.zeros(48, dtype=dtype, device=device, requires_grad=True)
    found = (
        modulated_linear(*mine[:3], 1e-6, *mine[3:5]),
        gelu_linear(mine[0], mine[5].t(), zero),
    )
    for index in range(2):
        assert found[index].dtype == dtype and error(found[index], expected[index]) < tolerance
        expected[index].backward(grad.double())
        found[index].backward(grad)
    assert error(zero.grad, grad.double().sum((0, 1))) < tolerance
    for tensor, true in zip(inputs, exact, strict=True):
        assert tensor.grad.dtype == dtype and error(tensor.grad, true.grad) < tolerance
