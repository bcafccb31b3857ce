"""What VAR's blocks do around their matrix products, with little kept for the backward.

PyTorch's own graph would keep, beside what a block's products give, every input of theirs; here the normalised stream
and the result of the GELU are made again from what they came from, by cheap passes.

Legend: B images, L codes per image, N = B * L rows, D width, F output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.models.cpu_kernels import gelu, gelu_backward_, layer_norm, layer_norm_backward, scratch
from cca_ds.models.products import linear_backward, product

_KERNEL_DTYPES = (
    torch.float32,
    torch.bfloat16,
)  # float32 weights beside bf16 inputs: PyTorch's CPU layer norm


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float) -> Tensor:
        out_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
        ctx.save_for_backward(x_BLD, weight_BD, layer_norm(x_BLD, weight_BD, bias_BD, eps, out_BLD))
        return out_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        return *layer_norm_backward(grad_BLD, *ctx.saved_tensors), None


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float, weight_FD: Tensor, bias_F: Tensor
    ) -> Tensor:
        normed_BLD = scratch.take("normed", x_BLD)
        statistics = layer_norm(x_BLD, weight_BD, bias_BD, eps, normed_BLD)
        ctx.save_for_backward(x_BLD, weight_BD, bias_BD, weight_FD, statistics)
        ctx.eps = eps
        return product(normed_BLD, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_BD, bias_BD, weight_FD, statistics = ctx.saved_tensors
        normed_BLD = scratch.take("normed", x_BLD)
        layer_norm(x_BLD, weight_BD, bias_BD, ctx.eps, normed_BLD)
        grad_BLD, *of_linear = linear_backward(grad_BLF, normed_BLD, weight_FD)
        return *layer_norm_backward(grad_BLD, x_BLD, weight_BD, statistics), None, *of_linear


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_FD)
        return product(gelu(x_BLD, scratch.take("activated", x_BLD)), weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF: Tensor) -> tuple[Tensor, ...]:
        x_BLD, weight_FD = ctx.saved_tensors
        grad_BLD, *of_linear = linear_backward(
            grad_BLF, gelu(x_BLD, scratch.take("activated", x_BLD)), weight_FD
        )
        return gelu_backward_(grad_BLD, x_BLD), *of_linear


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES


def modulated_norm(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """(1 + scale) * norm(x) + shift, the scale and shift being an image's own: [B, L, D] in x's dtype."""
    if _on_cpu(x_BLD):
        return _ModulatedNorm.apply(x_BLD, scale_BD.float() + 1.0, shift_BD.float(), eps)
    normed_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps).to(x_BLD.dtype)
    return torch.addcmul(shift_BD[:, None], normed_BLD, scale_BD[:, None] + 1.0)


def modulated_linear(
    x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float, weight_FD: Tensor, bias_F: Tensor
) -> Tensor:
    """A linear layer of `modulated_norm`: [B, L, D] -> [B, L, F] in x's dtype."""
    if not _on_cpu(x_BLD):
        return F.linear(modulated_norm(x_BLD, scale_BD, shift_BD, eps), weight_FD, bias_F)
    weight_FD, bias_F = weight_FD.to(x_BLD.dtype), bias_F.to(x_BLD.dtype)
    return _ModulatedLinear.apply(x_BLD, scale_BD.float() + 1.0, shift_BD.float(), eps, weight_FD, bias_F)


def gelu_linear(x_BLD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """A linear layer of gelu(x), in its tanh form: [B, L, D] -> [B, L, F] in x's dtype."""
    if not _on_cpu(x_BLD):
        return F.linear(F.gelu(x_BLD, approximate="tanh"), weight_FD, bias_F)
    return _GeluLinear.apply(x_BLD, weight_FD.to(x_BLD.dtype), bias_F.to(x_BLD.dtype))
