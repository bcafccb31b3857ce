"""Adaptive layer norm (adaLN, arXiv 2212.09748) and the gated residual, as VAR's blocks have them.

Scale, shift and gate are one vector an image. On a CPU the backward keeps little: the normalised stream and the GELU's
result are computed again, and a branch is not kept at all.

Buffers in scratch memory: "wide" [B, L, F], "narrow" and "normed" [B, L, D], "own" one image's gradient of a weight,
"activated" one image's GELU.

Legend: B images, L codes per image, N = B * L rows, D width of the stream, F the other width of a linear layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.library import has_kernel, register
from cca_ds.ops.linear import input_gradient, matmul, weight_gradient
from cca_ds.ops.scratch import scratch


def adaln_eager(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """Plain version of `adaln`."""
    normed_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps).to(x_BLD.dtype)
    return torch.addcmul(shift_BD[:, None], normed_BLD, scale_BD[:, None] + 1.0)


def adaln(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """(1 + scale) * layer_norm(x) + shift: [B, L, D] in the dtype of `x`; scale and shift [B, D]."""
    if not has_kernel(x_BLD):
        return adaln_eager(x_BLD, scale_BD, shift_BD, eps)
    return _AdaLN.apply(x_BLD, scale_BD.float() + 1.0, shift_BD.float(), eps)


def adaln_linear_eager(
    x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float, weight_FD: Tensor, bias_F: Tensor
) -> Tensor:
    """Plain version of `adaln_linear`."""
    return F.linear(adaln_eager(x_BLD, scale_BD, shift_BD, eps), weight_FD, bias_F)


def adaln_linear(
    x_BLD: Tensor,
    scale_BD: Tensor,
    shift_BD: Tensor,
    eps: float,
    weight_FD: Tensor,
    bias_F: Tensor,
    transient: bool = False,
) -> Tensor:
    """adaln(x) W^T + b: [B, L, D] -> [B, L, F] in the dtype of `x`.

    `transient`: the next op reads the result and no backward keeps it, so that its memory is reused at once.
    """
    if not has_kernel(x_BLD):
        return adaln_linear_eager(x_BLD, scale_BD, shift_BD, eps, weight_FD, bias_F)
    weight_FD, bias_F = weight_FD.to(x_BLD.dtype), bias_F.to(x_BLD.dtype)
    return _AdaLNLinear.apply(x_BLD, scale_BD.float() + 1.0, shift_BD.float(), eps, weight_FD, bias_F, transient)


def gated_residual_linear_eager(
    x_BLF: Tensor, stream_BLD: Tensor, gate_BD: Tensor, weight_DF: Tensor, bias_D: Tensor, gelu: bool = False
) -> Tensor:
    """Plain version of `gated_residual_linear`."""
    active_BLF = F.gelu(x_BLF, approximate="tanh") if gelu else x_BLF
    return torch.addcmul(stream_BLD, F.linear(active_BLF, weight_DF, bias_D), gate_BD[:, None])


def gated_residual_linear(
    x_BLF: Tensor, stream_BLD: Tensor, gate_BD: Tensor, weight_DF: Tensor, bias_D: Tensor, gelu: bool = False
) -> Tensor:
    """stream + gate * (f(x) W^T + b): [B, L, D]; f is the identity, or with `gelu` a GELU in its tanh form."""
    if not has_kernel(x_BLF) or not x_BLF.dtype == stream_BLD.dtype == gate_BD.dtype:
        return gated_residual_linear_eager(x_BLF, stream_BLD, gate_BD, weight_DF, bias_D, gelu)
    weight_DF, bias_D = weight_DF.to(x_BLF.dtype), bias_D.to(x_BLF.dtype)
    return _GatedResidualLinear.apply(x_BLF, stream_BLD, gate_BD, weight_DF, bias_D, gelu)


# ---- with the CPU kernels ------------------------------------------------------------------------------------------


def _layer_norm(x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float, out_BLD: Tensor) -> Tensor:
    """Layer norm with float32 weight and bias per image, written into `out_BLD`; returns [B, 2, L, 1]: mean, 1/std."""
    statistics = []
    for image, (weight_D, bias_D) in enumerate(zip(weight_BD, bias_BD, strict=True)):
        out_BLD[image], *of_image = torch.native_layer_norm(x_BLD[image], weight_D.shape, weight_D, bias_D, eps)
        statistics.append(torch.stack(of_image))
    return torch.stack(statistics)


def _layer_norm_backward(
    grad_BLD: Tensor, x_BLD: Tensor, weight_BD: Tensor, statistics_B2L1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_layer_norm`'s x, weight and bias."""
    grads = [  # the bias's values do not matter here, so the weight is passed in its place
        torch.ops.aten.native_layer_norm_backward(
            grad_LD, x_LD, weight_D.shape, *of_image, weight_D, weight_D, (True, True, True)
        )
        for grad_LD, x_LD, weight_D, of_image in zip(grad_BLD, x_BLD, weight_BD, statistics_B2L1, strict=True)
    ]
    grad_x_BLD, grad_weight_BD, grad_bias_BD = (torch.stack(grad) for grad in zip(*grads, strict=True))
    return grad_x_BLD, grad_weight_BD, grad_bias_BD


def _gelu(x: Tensor, out: Tensor) -> Tensor:
    """The GELU in its tanh form, written into `out`."""
    torch.ops.cca_ds.gelu(x, out)
    return out


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float) -> Tensor:
        out_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
        ctx.save_for_backward(x_BLD, weight_BD, _layer_norm(x_BLD, weight_BD, bias_BD, eps, out_BLD))
        return out_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        return *_layer_norm_backward(grad_BLD, *ctx.saved_tensors), None


class _AdaLNLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BLD: Tensor,
        weight_BD: Tensor,
        bias_BD: Tensor,
        eps: float,
        weight_FD: Tensor,
        bias_F: Tensor,
        transient: bool,
    ) -> Tensor:
        normed_BLD = scratch.take("normed", x_BLD.shape, x_BLD)
        statistics = _layer_norm(x_BLD, weight_BD, bias_BD, eps, normed_BLD)
        ctx.save_for_backward(x_BLD, weight_BD, bias_BD, weight_FD, statistics)
        ctx.eps = eps
        out = scratch.take("wide", (*x_BLD.shape[:-1], len(weight_FD)), x_BLD) if transient else None
        return matmul(normed_BLD, weight_FD, bias_F, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_BD, bias_BD, weight_FD, statistics = ctx.saved_tensors
        normed_BLD = scratch.take("normed", x_BLD.shape, x_BLD)
        _layer_norm(x_BLD, weight_BD, bias_BD, ctx.eps, normed_BLD)
        grad_NF = grad_BLF.flatten(0, 1)
        grad_weight_FD = weight_gradient(grad_NF, normed_BLD.flatten(0, 1))
        grad_BLD = input_gradient(grad_BLF, weight_FD, scratch.take("narrow", x_BLD.shape, x_BLD))
        of_norm = _layer_norm_backward(grad_BLD, x_BLD, weight_BD, statistics)
        return *of_norm, None, grad_weight_FD, grad_NF.sum(0), None


class _GatedResidualLinear(torch.autograd.Function):
    """Without keeping the branch f(x) W^T + b.

    The gate's gradient is the sum over an image's positions of grad * branch. With G = grad^T f(x), the image's share
    of the weight's gradient, it is the row sums of W * G, plus b times the sum of grad.
    """

    @staticmethod
    def forward(
        ctx, x_BLF: Tensor, stream_BLD: Tensor, gate_BD: Tensor, weight_DF: Tensor, bias_D: Tensor, gelu: bool
    ) -> Tensor:
        ctx.save_for_backward(x_BLF, gate_BD, weight_DF, bias_D)
        ctx.gelu = gelu
        active_BLF = _gelu(x_BLF, scratch.take("wide", x_BLF.shape, x_BLF)) if gelu else x_BLF
        branch_BLD = matmul(active_BLF, weight_DF, bias_D)
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
            own_DF = weight_gradient(grad_LD, _gelu(x_LF, active_LF) if ctx.gelu else x_LF, own_DF)
            grad_weight_DF.addcmul_(own_DF, gate_D[:, None])
            torch.add(own_DF.mul_(weight_DF).sum(1), sum_D * bias_D, out=grad_gate_D)
        gated_BLD = torch.mul(grad_BLD, gate_BD[:, None], out=scratch.take("narrow", grad_BLD.shape, grad_BLD))
        if ctx.gelu:
            grad_x_BLF = input_gradient(gated_BLD, weight_DF, scratch.take("wide", x_BLF.shape, x_BLF))
            torch.ops.cca_ds.gelu_backward(grad_x_BLF, x_BLF)
        else:
            grad_x_BLF = input_gradient(gated_BLD, weight_DF)
        return grad_x_BLF, grad_BLD, grad_gate_BD, grad_weight_DF, (sums_BD * gate_BD).sum(0), None


register("gelu", lambda x, out: None)
register("gelu_backward", lambda grad, x: None)
