"""Normalised queries and keys."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.ops.library import backend
from cca_ds.ops.qk_norm import qk_norm, qk_norm_eager
from tests.support.ops import TOLERANCE, VERSIONS, check_op, using


def definition(qkv, scale):
    q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return torch.stack([F.normalize(q, dim=-1) * scale[:, None, None], F.normalize(k, dim=-1), v])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [4, 20, 64])
def test_qk_norm_and_its_gradients(device, version, dtype, channels):
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3 * 2 * channels, device=device).to(dtype)
    scale = torch.tensor([3.0, 20.0], device=device)
    eager = 2 * TOLERANCE[dtype]  # rounds the factor before the product
    with using(version):
        by_kernel = version == "kernel" and device == "cpu"
        limits = (TOLERANCE[dtype], 2 * TOLERANCE[dtype]) if by_kernel else (eager, 3 * eager)
        check_op(lambda *x: torch.stack(qk_norm(*x)), definition, [qkv, scale], *limits)
    check_op(lambda *x: torch.stack(qk_norm_eager(*x)), definition, [qkv, scale], eager, 3 * eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scales_gradient_adds_up_in_float32(device, dtype):
    """Its addends cancel: in 16 bits it would be 5% off."""
    torch.manual_seed(0)
    qkv, grad = torch.randn(4, 680, 3 * 2 * 64, device=device).to(dtype), torch.randn(3, 4, 2, 680, 64, device=device)
    scale = torch.tensor([3.0, 20.0], device=device).requires_grad_()
    with using("eager"):
        torch.stack(qk_norm(qkv, scale)).backward(grad.to(dtype))
    exact = scale.detach().double().requires_grad_()
    definition(qkv.double(), exact).backward(grad.to(dtype).double())
    assert ((scale.grad - exact.grad) / exact.grad).abs().max() < 5e-3


def test_a_vector_of_zeros_stays_zero():
    for op in (qk_norm, qk_norm_eager):
        q, k, _ = op(torch.zeros(1, 2, 12), torch.tensor([5.0]))
        assert (q == 0).all() and (k == 0).all()


def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    ops, x, scale = torch.ops.cca_ds, torch.randn(2, 9, 24), torch.tensor([1.0, 2.0])
    heads, factors = ops.qk_norm_heads(x, scale)
    torch.library.opcheck(ops.qk_norm_heads.default, (x, scale))
    arguments = (heads, heads, factors, scale, torch.empty_like(x))
    torch.library.opcheck(ops.qk_norm_heads_backward.default, arguments)
