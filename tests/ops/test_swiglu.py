"""SwiGLU and the linear layer after it."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.ops.library import backend
from cca_ds.ops.swiglu import swiglu_linear, swiglu_linear_eager
from tests.support.ops import TOLERANCE, VERSIONS, check_op, using


def definition(gate, value, weight):
    return F.linear(gate * torch.sigmoid(gate) * value, weight)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (2, 7, 100), (40, 512)], ids=str)
def test_swiglu_linear_and_its_gradients(device, version, dtype, shape):
    torch.manual_seed(0)
    gate, value = ((4 * torch.randn(shape, device=device)).to(dtype) for _ in range(2))
    weight = torch.randn(24, shape[-1], device=device).to(dtype)
    with using(version):
        check_op(swiglu_linear, definition, [gate, value, weight], 2 * TOLERANCE[dtype])
    check_op(swiglu_linear_eager, definition, [gate, value, weight], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_numbers(version, dtype):
    """Through a weight of 1, and gradients of 1: silu(x) and its slope."""
    x = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4]).to(dtype)[:, None]
    gate, value = x.clone().requires_grad_(), torch.ones_like(x, requires_grad=True)
    with using(version):
        out = swiglu_linear(gate, value, torch.ones(1, 1, dtype=dtype))
        out.sum().backward()
    close = {"atol": 1e-6, "rtol": 4e-3}
    torch.testing.assert_close(out.double(), F.silu(x.double()), **close)
    slopes = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(gate.grad.float(), slopes, **close)
    torch.testing.assert_close(value.grad.double(), F.silu(x.double()), **close)
    with using(version), torch.no_grad():
        not_finite = torch.tensor([[torch.nan], [torch.inf]], dtype=dtype)
        out = swiglu_linear(not_finite, torch.ones_like(not_finite), torch.ones(1, 1, dtype=dtype))
    assert out[0].isnan().all() and out[1].isinf().all()


def test_autocast_and_other_dtypes():
    gate, value, weight = torch.randn(5, 16), torch.randn(5, 16), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = swiglu_linear(gate.bfloat16(), value.bfloat16(), weight)
    assert out.dtype == torch.bfloat16
    check_op(swiglu_linear, definition, [gate.double(), value.double(), weight.double()], 1e-12)


def test_shapes_that_do_not_fit_are_an_error():
    with using("kernel"), pytest.raises(RuntimeError, match="must be alike"):
        swiglu_linear(torch.randn(4, 8), torch.randn(5, 8), torch.randn(3, 8))


def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    x = torch.randn(2, 9, 24)
    torch.library.opcheck(torch.ops.cca_ds.swiglu.default, (x, x, torch.empty_like(x)))
    torch.library.opcheck(torch.ops.cca_ds.swiglu_backward.default, (x, x, x))
