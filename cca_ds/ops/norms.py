"""Root-mean-square normalisation. Legend: D width, R rows."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.library import has_kernel, register


def rms_norm_eager(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Plain version of `rms_norm`."""
    return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [..., D] in the dtype of `x`.

    Computed in float32 and rounded once. On a CPU the backward keeps `x` and one float32 number a row.
    """
    if not has_kernel(x):
        return rms_norm_eager(x, weight_D, eps)
    if not torch.is_grad_enabled():  # autograd's wrapper takes a tenth of a small model's decoding step
        return _kernel(x, weight_D, eps)[0]
    return _RMSNorm.apply(x.flatten(0, -2), weight_D, eps).view_as(x)


def _kernel(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, and their float32 factors [R]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.ops.cca_ds.rms_norm(x, weight_D.float(), eps, out)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_RD, factors_R = _kernel(x_RD, weight_D, eps)
        ctx.save_for_backward(x_RD, weight_D, factors_R)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weight_D, factors_R = ctx.saved_tensors
        grad_x_RD, grad_weight_D = torch.ops.cca_ds.rms_norm_backward(grad_RD, x_RD, weight_D.float(), factors_R)
        return grad_x_RD, grad_weight_D.to(weight_D.dtype), None


register("rms_norm", lambda x, weight, eps, out: weight.new_empty(x.shape[:-1].numel()))
register("rms_norm_backward", lambda grad, x, weight, factors: (torch.empty_like(x), torch.empty_like(weight)))
