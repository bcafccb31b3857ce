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

from cca_ds.likelihood import linear as few_rows_linear
from cca_ds.models.cpu_kernels import has_kernel

# glibc asks for a little more than an aligned tensor takes, so what a freed tensor leaves is just too small for the
# next of its size, and the heap grows by a hole a layer: 6% of LlamaGen-B's peak. What a forward makes is therefore
# followed by a few numbers more.
_SLACK = 64
_ROWS, _WORTHWHILE = 64, 1 << 24  # rows and multiplications of a product below which the way to it counts


def _is_large(x: Tensor, weight_FD: Tensor) -> bool:
    large = x.numel() >= _ROWS * x.shape[-1] and x.numel() * weight_FD.shape[0] >= _WORTHWHILE
    return large and x.dtype == weight_FD.dtype and has_kernel(x)


def _product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, slack: int) -> Tensor:
    if not _is_large(x, weight_FD) or not torch.ops.cca_ds.has_block_linear(x.dtype == torch.bfloat16):
        return F.linear(x, weight_FD, bias_F)
    shape = (*x.shape[:-1], weight_FD.shape[0])
    out = x.new_empty(math.prod(shape) + slack)[: math.prod(shape)].view(shape)
    torch.ops.cca_ds.block_linear(x, weight_FD, bias_F, out)
    return out


def product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., D] -> [..., F]; no autograd."""
    return _product(x, weight_FD, bias_F, _SLACK)


def input_gradient(grad: Tensor, weight_FD: Tensor) -> Tensor:
    """grad W, [..., F] -> [..., D]."""
    return _product(grad, weight_FD.t(), None, 0)


def weight_gradient(grad_NF: Tensor, x_ND: Tensor) -> Tensor:
    """grad^T x, [F, D]."""
    return torch.ops.cca_ds.weight_gradient(grad_NF, x_ND) if has_kernel(grad_NF) else grad_NF.t() @ x_ND


def linear_backward(grad: Tensor, x: Tensor, weight_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a linear layer's input [..., D], weight [F, D] and bias [F], from that of its output [..., F]."""
    grad_NF = grad.flatten(0, -2)
    grad_weight_FD = weight_gradient(grad_NF, x.flatten(0, -2))
    return input_gradient(grad, weight_FD), grad_weight_FD, grad_NF.sum(0)


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
