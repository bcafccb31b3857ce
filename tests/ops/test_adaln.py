"""adaLN, its linear layer, and the gated residual."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.ops.adaln import (
    adaln,
    adaln_eager,
    adaln_linear,
    adaln_linear_eager,
    gated_residual_linear,
    gated_residual_linear_eager,
)
from cca_ds.ops.library import backend
from tests.support.ops import VERSIONS, check_op, using

TOLERANCE = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def adaln_definition(x, scale, shift):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def random(shapes, device, dtype):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE, ids=str)
@pytest.mark.parametrize(("images", "length", "width"), [(1, 5, 24), (3, 7, 40), (2, 100, 1024)])
def test_adaln_and_its_gradients(device, version, dtype, tolerance, images, length, width):
    inputs = random([(images, length, width), (images, width), (images, width)], device, dtype)
    inputs[0] += 3.0
    with using(version):
        check_op(lambda *x: adaln(*x, 1e-6), adaln_definition, inputs, 2 * tolerance)
    check_op(lambda *x: adaln_eager(*x, 1e-6), adaln_definition, inputs, 2 * tolerance)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE, ids=str)
def test_adaln_linear_and_its_gradients(device, version, dtype, tolerance):
    def definition(x, scale, shift, weight, bias):
        return F.linear(adaln_definition(x, scale, shift), weight, bias)

    inputs = random([(3, 7, 32), (3, 32), (3, 32), (48, 32), (48,)], device, dtype)
    for op in (adaln_linear, adaln_linear_eager):
        with using(version):
            check_op(lambda *x, op=op: op(*x[:3], 1e-6, *x[3:]), definition, inputs, tolerance)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE, ids=str)
def test_gated_residual_linear_and_its_gradients(device, version, dtype, tolerance, gelu):
    """One image's gate is 0, as stochastic depth sets it: the gradient of the gate is not."""

    def definition(x, stream, gate, weight, bias):
        active = F.gelu(x, approximate="tanh") if gelu else x
        return stream + gate[:, None] * F.linear(active, weight, bias)

    inputs = random([(3, 7, 48), (3, 7, 32), (3, 32), (32, 48), (32,)], device, dtype)
    inputs[2][1] = 0.0
    for op in (gated_residual_linear, gated_residual_linear_eager):
        with using(version):
            check_op(lambda *x, op=op: op(*x, gelu), definition, inputs, tolerance)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (3, 33), (2, 100)], ids=str)
def test_gelu_of_all_numbers(version, dtype, shape):
    """Through an identity as weight, with a gate of 1 and a stream of 0: the GELU and its slope."""
    torch.manual_seed(0)
    extreme = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
    x = torch.cat([4 * torch.randn(shape).flatten(), extreme]).to(dtype)[None, :, None].requires_grad_()
    zeros, one = torch.zeros_like(x), torch.ones(1, 1, dtype=dtype)
    with using(version):
        out = gated_residual_linear(x, zeros, one, one, torch.zeros(1, dtype=dtype), gelu=True)
        out.sum().backward()
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    expected.sum().backward()
    limit = 1e-6 if dtype == torch.float32 else 8e-3
    close = {"atol": limit, "rtol": limit}
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close(x.grad.double(), exact.grad, **close)
    not_finite = torch.tensor([torch.nan, torch.inf], dtype=dtype)[None, :, None]
    with using(version), torch.no_grad():
        out = gated_residual_linear(not_finite, zeros[:, :2], one, one, torch.zeros(1, dtype=dtype), gelu=True)
    assert out[0, 0].isnan() and out[0, 1].isinf()


def test_float64_runs_the_plain_version():
    inputs = random([(3, 7, 32), (3, 32), (3, 32)], "cpu", torch.float64)
    check_op(lambda *x: adaln(*x, 1e-6), adaln_definition, inputs, 1e-12)


def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    ops, check = torch.ops.cca_ds, torch.library.opcheck
    x = torch.randn(2, 9, 24)
    check(ops.gelu.default, (x, torch.empty_like(x)))
    check(ops.gelu_backward.default, (x.clone(), x))
