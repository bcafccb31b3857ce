"""What VAR's blocks do around their matrix products, with little kept for the backward.

PyTorch's own graph would keep, beside what a block's products give, every input of theirs; here the normalised stream
and the result of the GELU are made again from what they came from, by cheap passes.

Legend: B images, L codes per image, N = B * L rows, D width, F output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.models.cpu_kernels import gelu, gelu_backward
from cca_ds.models.products import linear_backward, product

_KERNEL_DTYPES = (
    torch.float32,
    torch.bfloat16,
)  # float32 weights beside bf16 inputs: PyTorch's CPU layer norm


def _layer_norm(x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float) -> tuple[Tensor, list[Tensor]]:
    """Layer norm with a weight and a bias per image: PyTorch's kernel once an image, and its means and deviations."""
    out_BLD = torch.empty_like(x_BLD)
    statistics = []
    for image, (weight_D, bias_D) in enumerate(zip(weight_BD, bias_BD, strict=True)):
        normed_LD, *of_image = torch.native_layer_norm(x_BLD[image], weight_D.shape, weight_D, bias_D, eps)
        out_BLD[image] = normed_LD
        statistics += of_image
    return out_BLD, statistics


def _layer_norm_backward(
    grad_BLD: Tensor, x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, statistics: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, the weights and the biases."""
    grads = [
        torch.ops.aten.native_layer_norm_backward(
            grad_BLD[image],
            x_BLD[image],
            weight_BD.shape[1:],
            *statistics[2 * image : 2 * image + 2],
            weight_BD[image],
            bias_BD[image],
            (True, True, True),
        )
        for image in range(len(x_BLD))
    ]
    grad_x, grad_weight, grad_bias = (torch.stack(grad) for grad in zip(*grads, strict=True))
    return grad_x, grad_weight, grad_bias


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float) -> Tensor:
        out_BLD, statistics = _layer_norm(x_BLD, weight_BD, bias_BD, eps)
        ctx.save_for_backward(x_BLD, weight_BD, bias_BD, *statistics)
        return out_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_BD, bias_BD, *statistics = ctx.saved_tensors
        return *_layer_norm_backward(grad_BLD, x_BLD, weight_BD, bias_BD, statistics), None


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float, weight_FD: Tensor, bias_F: Tensor
    ) -> Tensor:
        normed_BLD, statistics = _layer_norm(x_BLD, weight_BD, bias_BD, eps)
        ctx.save_for_backward(x_BLD, weight_BD, bias_BD, weight_FD, *statistics)
        ctx.eps = eps
        return product(normed_BLD, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_BD, bias_BD, weight_FD, *statistics = ctx.saved_tensors
        normed_BLD, _ = _layer_norm(x_BLD, weight_BD, bias_BD, ctx.eps)
        grad_BLD, *of_linear = linear_backward(grad_BLF, normed_BLD, weight_FD)
        return *_layer_norm_backward(grad_BLD, x_BLD, weight_BD, bias_BD, statistics), None, *of_linear


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_FD)
        return product(gelu(x_BLD), weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF: Tensor) -> tuple[Tensor, ...]:
        x_BLD, weight_FD = ctx.saved_tensors
        grad_BLD, *of_linear = linear_backward(grad_BLF, gelu(x_BLD), weight_FD)
        return gelu_backward(grad_BLD, x_BLD), *of_linear


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
