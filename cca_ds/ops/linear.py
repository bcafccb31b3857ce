"""The three products of a linear layer on a CPU: csrc's where they are faster than PyTorch's.

PyTorch hands float32 products to MKL, which keeps its best code for its maker's processors, and bf16 ones to oneDNN,
which loses a tenth of its rate at the shapes of these models. Both have faster products of small blocks.

Legend: N rows, D width, F output width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.cpu_kernels import has_kernel
from cca_ds.ops.decoding import linear as few_rows_linear

# glibc asks for a little more than an aligned tensor takes, so what a freed tensor leaves is just too small for the
# next of its size, and the heap grows by a hole a layer: 6% of LlamaGen-B's peak. What a forward makes is therefore
# followed by a few numbers more.
_SLACK = 64
_ROWS, _WORTHWHILE = 64, 1 << 24  # rows and multiplications of a product below which the way to it counts


def _is_large(x: Tensor, weight_FD: Tensor) -> bool:
    large = x.numel() >= _ROWS * x.shape[-1] and x.numel() * weight_FD.shape[0] >= _WORTHWHILE
    return large and x.dtype == weight_FD.dtype and has_kernel(x)


def _product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, out: Tensor | None, slack: int) -> Tensor:
    if not _is_large(x, weight_FD) or not torch.ops.cca_ds.has_block_linear(x.dtype == torch.bfloat16):
        if out is None:
            return F.linear(x, weight_FD, bias_F)
        factors, out_NF = (x.flatten(0, -2), weight_FD.t()), out.flatten(0, -2)
        torch.mm(*factors, out=out_NF) if bias_F is None else torch.addmm(bias_F, *factors, out=out_NF)
        return out
    if out is None:
        shape = (*x.shape[:-1], weight_FD.shape[0])
        out = x.new_empty(math.prod(shape) + slack)[: math.prod(shape)].view(shape)
    torch.ops.cca_ds.block_linear(x, weight_FD, bias_F, out)
    return out


def product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., D] -> [..., F]; in the memory of `out`, if that is given; no autograd."""
    return _product(x, weight_FD, bias_F, out, _SLACK)


def input_gradient(grad: Tensor, weight_FD: Tensor, out: Tensor | None = None) -> Tensor:
    """grad W, [..., F] -> [..., D]; in the memory of `out`, if that is given."""
    return _product(grad, weight_FD.t(), None, out, 0)


def weight_gradient(grad_NF: Tensor, x_ND: Tensor, out: Tensor | None = None) -> Tensor:
    """grad^T x, [F, D]; in float32 in the memory of `out`, if that is given."""
    if grad_NF.dtype == torch.bfloat16 and has_kernel(grad_NF):
        return torch.ops.cca_ds.weight_gradient(grad_NF, x_ND)
    return torch.mm(grad_NF.t(), x_ND, out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        return product(x_ND, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_FD = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            input_gradient(grad_NF, weight_FD) if for_x else None,
            weight_gradient(grad_NF, x_ND) if for_weight else None,
            grad_NF.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, [..., D] -> [..., F]."""
    if not _is_large(x, weight_FD):
        return few_rows_linear(x, weight_FD, bias_F)
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_FD, bias_F)
    if not torch.is_grad_enabled():
        return product(x, weight_FD, bias_F)
    return _Linear.apply(x.flatten(0, -2), weight_FD, bias_F).unflatten(0, x.shape[:-1])
