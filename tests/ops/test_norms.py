"""Root-mean-square normalisation."""

import pytest
import torch

from cca_ds.ops.library import backend
from cca_ds.ops.norms import rms_norm, rms_norm_eager
from tests.support.ops import TOLERANCE, VERSIONS, check_op, using


def definition(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 24), (3, 7, 40), (200, 1024)], ids=str)
def test_rms_norm_and_its_gradients(device, version, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).add(3.0).to(dtype)
    inputs = [x, torch.randn(shape[-1], device=device).to(dtype)]
    # plain PyTorch rounds the weight's gradient per row in bf16
    loose = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    with using(version):
        gradients = 3 * TOLERANCE[dtype] if version == "kernel" and device == "cpu" else loose
        check_op(lambda *x: rms_norm(*x, 1e-5), definition, inputs, 2 * TOLERANCE[dtype], gradients)
    check_op(lambda *x: rms_norm_eager(*x, 1e-5), definition, inputs, 2 * TOLERANCE[dtype], loose)


def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    x, weight, ops = torch.randn(2, 9, 24), torch.randn(24), torch.ops.cca_ds
    factors = ops.rms_norm(x, weight, 1e-6, torch.empty_like(x))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, torch.empty_like(x)))
    torch.library.opcheck(ops.rms_norm_backward.default, (x, x, weight, factors))
