"""LlamaGen's causal attention with its rotary positions, as one step with a backward of its own for CPUs.

Legend: B images, L positions, D width, H heads, C channels of a head, P = C / 2 pairs.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.cpu_kernels import turned_heads, turned_heads_backward
from cca_ds.ops.prefix_attention import Segment, Segments, attend, attend_backward, has_prefix_kernel

_BLOCK = 192  # queries of a segment: a third of 576


@lru_cache(maxsize=16)
def _segments(length: int) -> Segments:
    cuts = [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]
    return tuple(
        Segment(start, end, torch.ones(end - start, end - start, dtype=torch.bool).tril())
        for start, end in cuts
    )


class _CausalAttention(torch.autograd.Function):
    """qkv [B, L, 3 D] -> mixed values [B, L, D]."""

    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, table_LP2: Tensor, n_head: int) -> Tensor:
        ctx.scale = (qkv_BLD.shape[-1] // (3 * n_head)) ** -0.5
        heads_3BHLC = turned_heads(qkv_BLD, table_LP2, n_head, ctx.scale)
        mixed_BLHC, lse_BHL = attend(heads_3BHLC, _segments(qkv_BLD.shape[1]))
        ctx.save_for_backward(heads_3BHLC, mixed_BLHC, lse_BHL, table_LP2)
        return mixed_BLHC.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, None, None]:
        heads_3BHLC, mixed_BLHC, lse_BHL, table_LP2 = ctx.saved_tensors
        grad_BLHC = grad_BLD.view_as(mixed_BLHC)
        segments = _segments(mixed_BLHC.shape[1])
        grads_3BHLC = attend_backward(grad_BLHC, heads_3BHLC, mixed_BLHC, lse_BHL, segments)
        return turned_heads_backward(grads_3BHLC, table_LP2, ctx.scale), None, None


def worthwhile(qkv_BLD: Tensor) -> bool:
    """Whether `causal_attention` beats PyTorch's own: in bf16 by time, in float32 by what the backward keeps."""
    if qkv_BLD.device.type != "cpu" or qkv_BLD.dtype not in (torch.bfloat16, torch.float32):
        return False
    return qkv_BLD.requires_grad or has_prefix_kernel(qkv_BLD)


def causal_attention(qkv_BLD: Tensor, table_LP2: Tensor, n_head: int) -> Tensor:
    """Attention of each position to itself and those before: [B, L, 3 D] projections -> [B, L, D] mixed
    values.

    Queries and keys are turned by `table_LP2` (`rotary_table`) first. For a CPU.
    """
    return _CausalAttention.apply(qkv_BLD, table_LP2, n_head)
