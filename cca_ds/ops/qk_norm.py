"""Queries, keys and values of an attention by cosine, as VAR has it: queries and keys are normalised.

Legend: B images, L positions, D = H * C, H heads, C channels of a head.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.library import has_kernel, register
from cca_ds.ops.scratch import scratch

_EPS = 1e-12
_MAX_CHANNELS = 512


def qk_norm_eager(qkv_BLD: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain version of `qk_norm`."""
    q_BHLC, k_BHLC, v_BHLC = split_heads(qkv_BLD, len(scale_H))
    q_BHLC = q_BHLC * _inverse_norm(q_BHLC).mul(scale_H[:, None, None]).to(q_BHLC.dtype)
    return q_BHLC, k_BHLC * _inverse_norm(k_BHLC).to(k_BHLC.dtype), v_BHLC


def qk_norm(qkv_BLD: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of length `scale_H`, keys of length 1, and values: [B, L, 3 D] -> three of [B, H, L, C].

    `scale_H` is float32 (float64 with float64). The dot product of a query and a key is then scale * cosine.
    """
    if torch.compiler.is_compiling():  # float32 copies, which the compiler fuses away
        q_BHLC, k_BHLC, _ = qk_norm_eager(qkv_BLD.to(torch.promote_types(qkv_BLD.dtype, torch.float32)), scale_H)
        return q_BHLC.to(qkv_BLD.dtype), k_BHLC.to(qkv_BLD.dtype), split_heads(qkv_BLD, len(scale_H))[2]
    if not takes_heads(qkv_BLD, qkv_BLD.shape[-1] // (3 * len(scale_H))):
        if qkv_BLD.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
            return _ReducedQKNorm.apply(qkv_BLD, scale_H).unbind(0)
        return qk_norm_eager(qkv_BLD, scale_H)
    return _QKNorm.apply(qkv_BLD, scale_H).unbind(0)


def split_heads(qkv_BLD: Tensor, heads: int) -> Tensor:
    """[B, L, 3 D] -> a view [3, B, H, L, C]: queries, keys, values."""
    return qkv_BLD.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def takes_heads(x: Tensor, channels: int) -> bool:
    """Whether the kernels that split a projection into heads of `channels` take the device and dtype of `x`."""
    return has_kernel(x) and channels % 2 == 0 and channels <= _MAX_CHANNELS


def projection_like(heads_3BHLC: Tensor) -> Tensor:
    """An uninitialised projection [B, L, 3 D] in scratch memory, for the gradients of heads [3, B, H, L, C]."""
    parts, batch, heads, length, channels = heads_3BHLC.shape
    return scratch.take("wide", (batch, length, parts * heads * channels), heads_3BHLC)


def qk_norm_backward(
    grads_3BHLC: Tensor, heads_3BHLC: Tensor, factors_2BHL: Tensor, scale_H: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the projection [B, L, 3 D] and of the scale [H], from those of the heads, on a CPU.

    `heads_3BHLC` and `factors_2BHL` are the results of the kernel `qk_norm_heads`.
    """
    grad_qkv_BLD = projection_like(grads_3BHLC)
    dot_yg_BHL = torch.ops.cca_ds.qk_norm_heads_backward(grads_3BHLC, heads_3BHLC, factors_2BHL, scale_H, grad_qkv_BLD)
    return grad_qkv_BLD, dot_yg_BHL.sum((0, 2)) / scale_H


class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, scale_H: Tensor) -> Tensor:
        heads_3BHLC, factors_2BHL = torch.ops.cca_ds.qk_norm_heads(qkv_BLD, scale_H)
        ctx.save_for_backward(heads_3BHLC, factors_2BHL, scale_H)
        return heads_3BHLC

    @staticmethod
    @once_differentiable
    def backward(ctx, grads_3BHLC: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_backward(grads_3BHLC, *ctx.saved_tensors)


class _ReducedQKNorm(torch.autograd.Function):
    """`qk_norm_eager` in 16 bits, whose gradient adds up in float32.

    Autograd would round each addend of the scale's gradient to 16 bits, and they cancel: 5% off.
    """

    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, scale_H: Tensor) -> Tensor:
        heads_3BHLC = split_heads(qkv_BLD, len(scale_H))
        factors_2BHL1 = _inverse_norm(heads_3BHLC[:2])
        factors_2BHL1[0] *= scale_H[:, None, None]
        normed_2BHLC = heads_3BHLC[:2] * factors_2BHL1.to(qkv_BLD.dtype)
        ctx.save_for_backward(qkv_BLD, factors_2BHL1, scale_H)
        return torch.cat([normed_2BHLC, heads_3BHLC[2:]])

    @staticmethod
    @once_differentiable
    def backward(ctx, grads_3BHLC: Tensor) -> tuple[Tensor, Tensor]:
        """With y = s x / |x|: dx = (s / |x|) (g - y (y . g) / s^2), ds = (y . g) / s."""
        qkv_BLD, factors_2BHL1, scale_H = ctx.saved_tensors
        grads_2BHLC, y_2BHLC = grads_3BHLC[:2].float(), split_heads(qkv_BLD, len(scale_H))[:2] * factors_2BHL1
        dot_2BHL1 = (grads_2BHLC * y_2BHLC).sum(-1, keepdim=True)
        lengths_2H = torch.stack([scale_H, torch.ones_like(scale_H)])
        along_2BHL1 = dot_2BHL1 / lengths_2H.square()[:, None, :, None, None]
        grad_2BHLC = factors_2BHL1 * torch.addcmul(grads_2BHLC, y_2BHLC, along_2BHL1, value=-1)
        grad_3BHLC = torch.cat([grad_2BHLC.to(grads_3BHLC.dtype), grads_3BHLC[2:]])
        return grad_3BHLC.permute(1, 3, 0, 2, 4).flatten(2), dot_2BHL1[0].sum((0, 2, 3)) / scale_H


def _inverse_norm(x_BHLC: Tensor) -> Tensor:
    """1 / |x| over the channels, [B, H, L, 1], at least float32."""
    dtype = torch.promote_types(x_BHLC.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_BHLC, dim=-1, keepdim=True, dtype=dtype)
    return norm.clamp_min(_EPS).reciprocal()


def _fake_heads(projection: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, width = projection.shape
    heads = projection.new_empty(3, batch, len(scale), length, width // (3 * len(scale)))
    return heads, scale.new_empty(2, *heads.shape[1:4])


register("qk_norm_heads", _fake_heads)
register("qk_norm_heads_backward", lambda grad_heads, heads, factors, scale, out: factors.new_empty(factors.shape[1:]))
