"""Block-causal attention over the scales of VAR: a code sees its own scale and the coarser ones.

No mask of [L, L] exists. The sequence is cut into segments that end where a scale ends; the queries of a
segment attend to the keys up to its end, which is all they may see, so the 38% of the scores that a mask
would hide (ten scales, 680 codes) are never computed. Only the coarsest scales, too small to be worth a call
each, share a segment, and a mask of its own small size. On a GPU every call but the first is one that
FlashAttention takes.

On a CPU forward and backward are those of `prefix_attention`.

Legend: B images, L codes per image, H heads, C channels of a head, Q queries of a segment, K keys up to its
end.
"""

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops import cpu_kernels
from cca_ds.ops.cpu_kernels import split_heads
from cca_ds.ops.prefix_attention import Segment, Segments, attend, attend_backward

_CPU = torch.device("cpu")
_JOINED_CODES = 128  # scales are joined into the first segment up to this many codes
_NORM_EPS = 1e-12


@lru_cache(maxsize=16)
def segments(scales: tuple[int, ...], device: torch.device = _CPU) -> Segments:
    """The segments of a pyramid of square scales, in order: (1, 2, 3, 4, 5, 6), 8, 10, 13, 16 for VAR at 256
    px.
    """
    lengths = [scale**2 for scale in scales]
    ends = list(accumulate(lengths))
    joined = max(1, sum(end <= _JOINED_CODES for end in ends))
    mask = None
    if joined > 1:
        level_L = torch.repeat_interleave(torch.arange(joined), torch.tensor(lengths[:joined]))
        mask = (level_L[:, None] >= level_L).to(device)
    cut = [Segment(0, ends[joined - 1], mask)]
    cut += [Segment(ends[i - 1], ends[i]) for i in range(joined, len(scales))]
    return tuple(cut)


def normalised_heads(qkv_BLD: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of length `scale_H`, keys of length 1, and values, each [B, H, L, C]."""
    if qkv_BLD.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu_kernels.normalised_heads(qkv_BLD, scale_H)[0].unbind(0)
    q_BHLC, k_BHLC, v_BHLC = split_heads(qkv_BLD, scale_H.shape[0])
    q_BHLC = q_BHLC * _inverse_norm(q_BHLC).mul(scale_H[:, None, None]).to(q_BHLC.dtype)
    return q_BHLC, k_BHLC * _inverse_norm(k_BHLC).to(k_BHLC.dtype), v_BHLC


def block_causal_attention(qkv_BLD: Tensor, scale_H: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Softmax of scale_H * cosine(q, k) over what each code may see, times v: [B, L, 3 * H * C] -> [B, L, H *
    C].

    `scale_H` is float32 (float64 with float64), differentiable. Equal to VAR's `SelfAttention` with its mask
    (`models/basic_var.py`), up to rounding.
    """
    if qkv_BLD.device.type == "cpu":
        return _CPUAttention.apply(qkv_BLD, scale_H, scales)
    q_BHLC, k_BHLC, v_BHLC = normalised_heads(qkv_BLD, scale_H)
    mixed = [
        F.scaled_dot_product_attention(
            q_BHLC[:, :, part.start : part.end],
            k_BHLC[:, :, : part.end],
            v_BHLC[:, :, : part.end],
            attn_mask=part.mask,  # the first segment's only, so over all of its keys
            scale=1.0,
        )
        for part in segments(scales, qkv_BLD.device)
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2).flatten(2)


def _inverse_norm(x_BHLC: Tensor) -> Tensor:
    """1 / |x| over the channels, [B, H, L, 1], at least float32."""
    dtype = torch.promote_types(x_BHLC.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_BHLC, dim=-1, keepdim=True, dtype=dtype)
    return norm.clamp_min(_NORM_EPS).reciprocal()


class _CPUAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, scale_H: Tensor, scales: tuple[int, ...]) -> Tensor:
        heads_3BHLC, factors_2BHL = cpu_kernels.normalised_heads(qkv_BLD, scale_H)
        mixed_BLHC, lse_BHL = attend(heads_3BHLC, segments(scales))
        ctx.save_for_backward(heads_3BHLC, mixed_BLHC, lse_BHL, factors_2BHL, scale_H)
        ctx.scales = scales
        return mixed_BLHC.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, Tensor, None]:
        heads_3BHLC, mixed_BLHC, lse_BHL, factors_2BHL, scale_H = ctx.saved_tensors
        grad_BLHC = grad_BLD.view_as(mixed_BLHC)
        grads_3BHLC = attend_backward(grad_BLHC, heads_3BHLC, mixed_BLHC, lse_BHL, segments(ctx.scales))
        return *cpu_kernels.normalised_heads_backward(grads_3BHLC, heads_3BHLC, factors_2BHL, scale_H), None
