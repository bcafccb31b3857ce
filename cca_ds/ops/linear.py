"""The linear layer.

On a CPU three kernels may take it. `few_rows_linear` reads the weight once where a decoding step has up to 16 rows.
`block_linear` multiplies small blocks where that is faster than PyTorch's matmul: MKL keeps its fastest float32 code
for Intel processors, and oneDNN's bf16 loses a tenth of its rate at these shapes; it needs AVX-512. `weight_gradient`
transposes the bf16 gradient before the matmul, which is twice as slow with a transposed factor.

Measured on AVX-512 (29a78eb, 8715d6b; it cannot be repeated on AVX2): together with float32 attention, the norms and
scratch memory, `block_linear` took a float32 training step from 0.99 (LlamaGen-B) and 0.96 (VAR-d16) of the original
program's time to 0.83 and 0.82.

Legend: N rows, D input width, F output width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.library import has_kernel, register

_FEW_ROWS = 16
_FEW_ROWS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS, _MULTIPLICATIONS = 64, 1 << 24  # below either, calling `block_linear` costs more than it saves
# glibc requests slightly more memory than an aligned tensor takes, so a freed tensor leaves a block that is just too
# small for the next one of its size: the heap grows by one block a layer, 6% of LlamaGen-B's peak. Results of a forward
# are therefore allocated this many elements longer.
_SLACK = 64


def linear_eager(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Plain version of `linear`."""
    return F.linear(x, weight_FD, bias_F)


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b: [..., D] -> [..., F], as `torch.nn.functional.linear`, under autocast too.

    Without gradients and for up to 16 rows on a CPU, a row's result does not depend on the other rows.
    """
    if not _is_large(x, weight_FD):
        if 0 < x.numel() <= _FEW_ROWS * x.shape[-1] and _takes_few_rows(x, weight_FD):
            return torch.ops.cca_ds.few_rows_linear(x, weight_FD, bias_F)
        return linear_eager(x, weight_FD, bias_F)
    if torch.is_autocast_enabled("cpu"):
        return linear_eager(x, weight_FD, bias_F)
    if not torch.is_grad_enabled():
        return matmul(x, weight_FD, bias_F)
    return _Linear.apply(x.flatten(0, -2), weight_FD, bias_F).unflatten(0, x.shape[:-1])


def matmul(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b outside autograd, [..., D] -> [..., F]; written into `out` [..., F] where it is given."""
    return _matmul(x, weight_FD, bias_F, out, _SLACK)


def input_gradient(grad: Tensor, weight_FD: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a linear layer's input, grad W: [..., F] -> [..., D]; written into `out` where it is given."""
    return _matmul(grad, weight_FD.t(), None, out, 0)


def weight_gradient(grad_NF: Tensor, x_ND: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a linear layer's weight, grad^T x: [F, D]; float32 is written into `out` where it is given."""
    if grad_NF.dtype == torch.bfloat16 and has_kernel(grad_NF):
        return torch.ops.cca_ds.weight_gradient(grad_NF, x_ND)
    return torch.mm(grad_NF.t(), x_ND, out=out)


def _takes_few_rows(x: Tensor, weight_FD: Tensor) -> bool:
    free = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return free and x.dtype == weight_FD.dtype and has_kernel(x, _FEW_ROWS_DTYPES)


def _is_large(x: Tensor, weight_FD: Tensor) -> bool:
    large = x.numel() >= _ROWS * x.shape[-1] and x.numel() * weight_FD.shape[0] >= _MULTIPLICATIONS
    return large and x.dtype == weight_FD.dtype and has_kernel(x)


def _matmul(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, out: Tensor | None, slack: int) -> Tensor:
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        return matmul(x_ND, weight_FD, bias_F)

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


register("few_rows_linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])))
register(
    "block_linear",
    lambda x, weight, bias, out: None,
    flops=lambda x, weight, bias, out, **_: 2 * math.prod(x) * weight[0],
)
register(
    "weight_gradient",
    lambda residual, hidden: hidden.new_empty(residual.shape[1], hidden.shape[1]),
    flops=lambda residual, hidden, **_: 2 * math.prod(residual) * hidden[1],
)
