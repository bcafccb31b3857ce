"""What VAR's blocks do around their matrix products, with little kept for the backward.

PyTorch's own graph would keep, beside what a block's products give, every input of theirs; here the normalised stream
and the result of the GELU are made again from what they came from, by cheap passes, and a branch is not kept at all.

Scratch: `wide` is [B, L, F], `narrow` and `normed` are [B, L, D], `own` is one image's gradient of a weight.

Legend: B images, L codes per image, N = B * L rows, D width of the stream, F the other width of a linear layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.cpu_kernels import gelu, gelu_backward_, layer_norm, layer_norm_backward, scratch
from cca_ds.ops.linear import input_gradient, product, weight_gradient

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


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
        ctx,
        x_BLD: Tensor,
        weight_BD: Tensor,
        bias_BD: Tensor,
        eps: float,
        weight_FD: Tensor,
        bias_F: Tensor,
        kept: bool,
    ) -> Tensor:
        normed_BLD = scratch.take("normed", x_BLD.shape, x_BLD)
        statistics = layer_norm(x_BLD, weight_BD, bias_BD, eps, normed_BLD)
        ctx.save_for_backward(x_BLD, weight_BD, bias_BD, weight_FD, statistics)
        ctx.eps = eps
        out = None if kept else scratch.take("wide", (*x_BLD.shape[:-1], len(weight_FD)), x_BLD)
        return product(normed_BLD, weight_FD, bias_F, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_BD, bias_BD, weight_FD, statistics = ctx.saved_tensors
        normed_BLD = scratch.take("normed", x_BLD.shape, x_BLD)
        layer_norm(x_BLD, weight_BD, bias_BD, ctx.eps, normed_BLD)
        grad_NF = grad_BLF.flatten(0, 1)
        grad_weight_FD = weight_gradient(grad_NF, normed_BLD.flatten(0, 1))
        grad_BLD = input_gradient(grad_BLF, weight_FD, scratch.take("narrow", x_BLD.shape, x_BLD))
        of_norm = layer_norm_backward(grad_BLD, x_BLD, weight_BD, statistics)
        return *of_norm, None, grad_weight_FD, grad_NF.sum(0), None


class _GatedResidualLinear(torch.autograd.Function):
    """stream + gate * (f(x) W^T + b), f being the identity or a GELU, without the branch in memory.

    The gate's gradient, the sum over an image's positions of grad * branch, comes from the image's own part of the
    weight's gradient, grad^T f(x): it is the row sums of W * grad^T f(x), and the bias's share.
    """

    @staticmethod
    def forward(
        ctx,
        x_BLF: Tensor,
        stream_BLD: Tensor,
        gate_BD: Tensor,
        weight_DF: Tensor,
        bias_D: Tensor,
        with_gelu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_BLF, gate_BD, weight_DF, bias_D)
        ctx.with_gelu = with_gelu
        active_BLF = gelu(x_BLF, scratch.take("wide", x_BLF.shape, x_BLF)) if with_gelu else x_BLF
        branch_BLD = product(active_BLF, weight_DF, bias_D)
        return torch.addcmul(stream_BLD, branch_BLD, gate_BD[:, None], out=branch_BLD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLF, gate_BD, weight_DF, bias_D = ctx.saved_tensors
        grad_weight_DF, grad_gate_BD = torch.zeros_like(weight_DF), torch.empty_like(gate_BD)
        sums_BD = grad_BLD.sum(1)
        own_DF = scratch.take("own", weight_DF.shape, weight_DF)
        active_LF = scratch.take("activated", x_BLF.shape[1:], x_BLF)
        images = zip(grad_BLD, x_BLF, gate_BD, grad_gate_BD, sums_BD, strict=True)
        for grad_LD, x_LF, gate_D, grad_gate_D, sum_D in images:
            own_DF = weight_gradient(grad_LD, gelu(x_LF, active_LF) if ctx.with_gelu else x_LF, own_DF)
            grad_weight_DF.addcmul_(own_DF, gate_D[:, None])
            torch.add(own_DF.mul_(weight_DF).sum(1), sum_D * bias_D, out=grad_gate_D)
        gated_BLD = torch.mul(
            grad_BLD, gate_BD[:, None], out=scratch.take("narrow", grad_BLD.shape, grad_BLD)
        )
        if ctx.with_gelu:
            grad_x_BLF = input_gradient(gated_BLD, weight_DF, scratch.take("wide", x_BLF.shape, x_BLF))
            gelu_backward_(grad_x_BLF, x_BLF)
        else:
            grad_x_BLF = input_gradient(gated_BLD, weight_DF)
        return grad_x_BLF, grad_BLD, grad_gate_BD, grad_weight_DF, (sums_BD * gate_BD).sum(0), None


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES


def modulated_norm(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """(1 + scale) * norm(x) + shift, the scale and shift being an image's own: [B, L, D] in x's dtype."""
    if _on_cpu(x_BLD):
        return _ModulatedNorm.apply(x_BLD, scale_BD.float() + 1.0, shift_BD.float(), eps)
    normed_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps).to(x_BLD.dtype)
    return torch.addcmul(shift_BD[:, None], normed_BLD, scale_BD[:, None] + 1.0)


def modulated_linear(
    x_BLD: Tensor,
    scale_BD: Tensor,
    shift_BD: Tensor,
    eps: float,
    weight_FD: Tensor,
    bias_F: Tensor,
    kept: bool = True,
) -> Tensor:
    """A linear layer of `modulated_norm`: [B, L, D] -> [B, L, F] in x's dtype."""
    if not _on_cpu(x_BLD):
        return F.linear(modulated_norm(x_BLD, scale_BD, shift_BD, eps), weight_FD, bias_F)
    weight_FD, bias_F = weight_FD.to(x_BLD.dtype), bias_F.to(x_BLD.dtype)
    return _ModulatedLinear.apply(
        x_BLD, scale_BD.float() + 1.0, shift_BD.float(), eps, weight_FD, bias_F, kept
    )


def gated_residual_linear(
    x_BLF: Tensor, stream_BLD: Tensor, gate_BD: Tensor, weight_DF: Tensor, bias_D: Tensor, with_gelu: bool
) -> Tensor:
    """stream + gate * linear(f(x)), f being the identity or a GELU in its tanh form: [B, L, D]."""
    if _on_cpu(x_BLF) and x_BLF.dtype == stream_BLD.dtype == gate_BD.dtype:
        weight_DF, bias_D = weight_DF.to(x_BLF.dtype), bias_D.to(x_BLF.dtype)
        return _GatedResidualLinear.apply(x_BLF, stream_BLD, gate_BD, weight_DF, bias_D, with_gelu)
    active_BLF = F.gelu(x_BLF, approximate="tanh") if with_gelu else x_BLF
    return torch.addcmul(stream_BLD, F.linear(active_BLF, weight_DF, bias_D), gate_BD[:, None])
