"""Attention: causal with rotary positions (LlamaGen), over the scales of an image (VAR), of one query (decoding).

In the first two a query sees a prefix of the keys. On a CPU one pair of kernels, `prefix_attention` and its backward,
serves both, where the processor has small-block matmuls for the dtype (bf16: AMX or AVX-512 with bf16); PyTorch's own
CPU backward runs at a tenth of the matmul rate. Measured: without the kernels a float32 LlamaGen-B step takes 2.9 s
more on one thread of AVX2; in bf16 (AVX-512 only) they and the fused activations took a step to 0.78 of the original
program's time (29a78eb). For one query, PyTorch's kernel took 43 of 73 ms of a bf16 decoding step (b97ef55).

Legend: B images, L positions, D = H * C width, H heads, C channels of a head, P = C / 2 pairs of channels, R rows of a
decoding step, S live slots of its cache.
"""

from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from cca_ds.ops.library import has_kernel, register
from cca_ds.ops.qk_norm import projection_like, qk_norm, qk_norm_backward, takes_heads
from cca_ds.ops.rope import rope
from cca_ds.ops.scratch import scratch

_CPU = torch.device("cpu")
_JOINED_CODES = 128  # scales are joined into the first segment up to this many codes
_ONE_QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS = 8  # a head's channels are a multiple of it for the GPUs' attention kernels


# ---- causal, with rotary positions ---------------------------------------------------------------------------------


def padded_channels(channels: int) -> int:
    """Channels of a head as the attention kernels of GPUs take them: the next multiple of 8.

    For another number (100 in LlamaGen-3B) PyTorch copies queries, keys and values at every call, and a decoding step
    in a CUDA graph falls to its plain version, which reads the cache several times.
    """
    return -(-channels // _CHANNELS) * _CHANNELS


def rope_qkv(qkv_BLD: Tensor, table_LP2: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with their positions' rotation, and values: [B, L, 3 D] -> three of [B, H, L, C].

    C is `padded_channels`; channels that a head does not have are 0, in the values too.
    """
    rotated, per_head = 2 * qkv_BLD.shape[-1] // 3, (-1, qkv_BLD.shape[-1] // (3 * heads))
    q_BLHC, k_BLHC = rope(qkv_BLD[..., :rotated].unflatten(-1, per_head), table_LP2).split(heads, dim=2)
    v_BLHC = qkv_BLD[..., rotated:].unflatten(-1, per_head)
    missing = padded_channels(per_head[1]) - per_head[1]
    if missing:
        q_BLHC, k_BLHC, v_BLHC = (F.pad(part, (0, missing)) for part in (q_BLHC, k_BLHC, v_BLHC))
    return q_BLHC.transpose(1, 2), k_BLHC.transpose(1, 2), v_BLHC.transpose(1, 2)


def causal_attention_eager(qkv_BLD: Tensor, table_LP2: Tensor, heads: int, dropout: float = 0.0) -> Tensor:
    """Plain version of `causal_attention`."""
    channels = qkv_BLD.shape[-1] // (3 * heads)
    q_BHLC, k_BHLC, v_BHLC = rope_qkv(qkv_BLD, table_LP2, heads)
    mixed_BHLC = F.scaled_dot_product_attention(
        q_BHLC, k_BHLC, v_BHLC, dropout_p=dropout, is_causal=True, scale=channels**-0.5
    )
    return mixed_BHLC[..., :channels].transpose(1, 2).flatten(2)


def causal_attention(qkv_BLD: Tensor, table_LP2: Tensor, heads: int, dropout: float = 0.0) -> Tensor:
    """softmax(rope(q) rope(k)^T / sqrt(C)) v over each position and those before it: [B, L, 3 D] -> [B, L, D].

    Args:
        qkv_BLD: queries, keys and values of all heads, one after another.
        table_LP2: `rotary_table`, cut to the positions; float32.
        dropout: probability with which an attention weight is left out.
    """
    if dropout or not _takes_prefix_attention(qkv_BLD, qkv_BLD.shape[-1] // (3 * heads)):
        return causal_attention_eager(qkv_BLD, table_LP2, heads, dropout)
    return _CausalAttention.apply(qkv_BLD, table_LP2, heads)


# ---- over the scales of an image -----------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Queries `start` to `end`, which see all keys before `end`, or in the first segment those where `mask` is true.

    Only the first segment, which starts at 0, may have a mask, [end, end] boolean.
    """

    start: int
    end: int
    mask: Tensor | None = None


def scale_segments(scales: tuple[int, ...], device: torch.device = _CPU) -> tuple[Segment, ...]:
    """Cut a pyramid of square scales where scales end, so that no [L, L] mask is needed.

    The queries of a segment attend to the keys up to its end. The 38% of the scores that a mask would hide (ten scales,
    680 codes) are not computed, and on a GPU FlashAttention takes every segment but the first: the coarsest scales, too
    small for a call each, share that one. VAR at 256 px: (1, 2, 3, 4, 5, 6), 8, 10, 13, 16.
    """
    lengths = [scale**2 for scale in scales]
    ends = list(accumulate(lengths))
    joined = max(1, sum(end <= _JOINED_CODES for end in ends))
    mask = None
    if joined > 1:
        # from numbers alone, which a compiled block need not copy from the host
        position_L = torch.arange(ends[joined - 1], device=device)
        level_L = torch.stack([position_L >= end for end in ends[: joined - 1]]).sum(0)
        mask = level_L[:, None] >= level_L
    segments = [Segment(0, ends[joined - 1], mask)]
    segments += [Segment(ends[i - 1], ends[i]) for i in range(joined, len(scales))]
    return tuple(segments)


@lru_cache(maxsize=16)
def _kept_segments(scales: tuple[int, ...], device: torch.device) -> tuple[Segment, ...]:
    with torch.inference_mode(False):  # a mask made while sampling is used in training too
        return scale_segments(scales, device)


class _Prefixes(torch.autograd.Function):
    """Views of the first positions of keys or values, one a segment, whose gradients are added up in one tensor.

    Autograd would write each gradient into zeros of the whole length first, and add those: two to five times the bytes.
    """

    @staticmethod
    def forward(ctx, x_BHLC: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(x_BHLC[:, :, :end] for end in ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        total_BHLC = grads[-1].clone()  # of the last segment, which sees all positions
        for grad in grads[:-1]:
            total_BHLC[:, :, : grad.shape[2]] += grad
        return total_BHLC, None


def _prefixes(x_BHLC: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`x_BHLC[:, :, :end]` of every end, the last of which is all of it."""
    if torch.compiler.is_compiling():  # which adds up the slices' gradients in one pass itself
        return tuple(x_BHLC[:, :, :end] for end in ends)
    return _Prefixes.apply(x_BHLC, ends)


def scale_attention_eager(qkv_BLD: Tensor, scale_H: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Plain version of `scale_attention`, one call of PyTorch's attention a segment."""
    q_BHLC, k_BHLC, v_BHLC = qk_norm(qkv_BLD, scale_H)
    find_segments = scale_segments if torch.compiler.is_compiling() else _kept_segments
    segments = find_segments(scales, qkv_BLD.device)
    ends = tuple(part.end for part in segments)
    keys, values = _prefixes(k_BHLC, ends), _prefixes(v_BHLC, ends)
    mixed = [
        F.scaled_dot_product_attention(q_BHLC[:, :, part.start : part.end], k, v, attn_mask=part.mask, scale=1.0)
        for part, k, v in zip(segments, keys, values, strict=True)
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2).flatten(2)


def scale_attention(qkv_BLD: Tensor, scale_H: Tensor, scales: tuple[int, ...]) -> Tensor:
    """softmax(scale_H * cosine(q, k)) v over a code's own scale and the coarser ones: [B, L, 3 D] -> [B, L, D].

    Equal to VAR's `SelfAttention` with its mask (`models/basic_var.py`), up to rounding.

    Args:
        qkv_BLD: queries, keys and values of all heads, one after another.
        scale_H: factor of each head; float32 (float64 with float64), differentiable.
        scales: sides of the square scales, coarse to fine; L is the sum of their squares.
    """
    if not _takes_prefix_attention(qkv_BLD, qkv_BLD.shape[-1] // (3 * len(scale_H))):
        return scale_attention_eager(qkv_BLD, scale_H, scales)
    return _ScaleAttention.apply(qkv_BLD, scale_H, scales)


# ---- one query -----------------------------------------------------------------------------------------------------


def one_query_attention_eager(
    query_RH1C: Tensor, keys_RHSC: Tensor, values_RHSC: Tensor, scale: float, live_1S: Tensor | None = None
) -> Tensor:
    """Plain version of `one_query_attention`."""
    return F.scaled_dot_product_attention(query_RH1C, keys_RHSC, values_RHSC, attn_mask=live_1S, scale=scale)


def one_query_attention(
    query_RH1C: Tensor, keys_RHSC: Tensor, values_RHSC: Tensor, scale: float, live_1S: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T) v of one position over all S slots: [R, H, 1, C].

    A head's slots must lie one after another in memory. On a CPU without gradients a kernel reads the cache once and
    sums in float32.

    Args:
        live_1S: bool, the slots that count where that is not all of them.
    """
    if (
        live_1S is not None
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or query_RH1C.dtype != keys_RHSC.dtype
        or not has_kernel(query_RH1C, _ONE_QUERY_DTYPES)
    ):
        return one_query_attention_eager(query_RH1C, keys_RHSC, values_RHSC, scale, live_1S)
    return torch.ops.cca_ds.one_query_attention(query_RH1C, keys_RHSC, values_RHSC, scale)


def decoding_attention_backends() -> AbstractContextManager[None]:
    """Within it attention takes the first of a fixed list of PyTorch's backends that can.

    cuDNN's is not among them: it plans anew for every length of the cache, in milliseconds each.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


# ---- the CPU kernels -----------------------------------------------------------------------------------------------


def _takes_prefix_attention(qkv_BLD: Tensor, channels: int) -> bool:
    in_bf16 = qkv_BLD.dtype == torch.bfloat16
    return takes_heads(qkv_BLD, channels) and torch.ops.cca_ds.has_prefix_attention(in_bf16)


@lru_cache(maxsize=16)
def _causal_limits(length: int) -> Tensor:
    """How many keys each query sees, [L] int64."""
    return torch.arange(1, length + 1)


@lru_cache(maxsize=16)
def _scale_limits(scales: tuple[int, ...]) -> Tensor:
    """How many keys each query sees, [L] int64."""
    lengths = torch.tensor([scale**2 for scale in scales])
    return torch.repeat_interleave(lengths.cumsum(0), lengths)


def _prefix_backward(
    grad_BLD: Tensor, heads_3BHLC: Tensor, mixed_BLHC: Tensor, lse_BHL: Tensor, limits_L: Tensor
) -> Tensor:
    """Gradients of the heads, [3, B, H, L, C], in scratch memory."""
    grads_3BHLC = scratch.take("heads", heads_3BHLC.shape, heads_3BHLC)
    torch.ops.cca_ds.prefix_attention_backward(
        grad_BLD.view_as(mixed_BLHC), heads_3BHLC, mixed_BLHC, lse_BHL, limits_L, grads_3BHLC
    )
    return grads_3BHLC


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, table_LP2: Tensor, heads: int) -> Tensor:
        ctx.scale = (qkv_BLD.shape[-1] // (3 * heads)) ** -0.5
        heads_3BHLC = torch.ops.cca_ds.rope_heads(qkv_BLD, table_LP2, heads, ctx.scale)
        limits_L = _causal_limits(qkv_BLD.shape[1])
        mixed_BLHC, lse_BHL = torch.ops.cca_ds.prefix_attention(heads_3BHLC, limits_L)
        ctx.limits_L = limits_L
        ctx.save_for_backward(heads_3BHLC, mixed_BLHC, lse_BHL, table_LP2)
        return mixed_BLHC.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, None, None]:
        *saved, table_LP2 = ctx.saved_tensors
        grads_3BHLC = _prefix_backward(grad_BLD, *saved, ctx.limits_L)
        grad_qkv_BLD = projection_like(grads_3BHLC)
        torch.ops.cca_ds.rope_heads_backward(grads_3BHLC, table_LP2, ctx.scale, grad_qkv_BLD)
        return grad_qkv_BLD, None, None


class _ScaleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, scale_H: Tensor, scales: tuple[int, ...]) -> Tensor:
        heads_3BHLC, factors_2BHL = torch.ops.cca_ds.qk_norm_heads(qkv_BLD, scale_H)
        limits_L = _scale_limits(scales)
        mixed_BLHC, lse_BHL = torch.ops.cca_ds.prefix_attention(heads_3BHLC, limits_L)
        ctx.limits_L = limits_L
        ctx.save_for_backward(heads_3BHLC, mixed_BLHC, lse_BHL, factors_2BHL, scale_H)
        return mixed_BLHC.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, Tensor, None]:
        *saved, factors_2BHL, scale_H = ctx.saved_tensors
        grads_3BHLC = _prefix_backward(grad_BLD, *saved, ctx.limits_L)
        return *qk_norm_backward(grads_3BHLC, saved[0], factors_2BHL, scale_H), None


def _fake_rope_heads(projection: Tensor, table: Tensor, heads: int, scale: float) -> Tensor:
    batch, length, width = projection.shape
    return projection.new_empty(3, batch, heads, length, width // (3 * heads))


def _fake_prefix_attention(heads: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    _, batch, count, length, channels = heads.shape
    lse_BHL = heads.new_empty(batch, count, length, dtype=torch.float32)
    return heads.new_empty(batch, length, count, channels), lse_BHL


def _flops(heads_shape: torch.Size) -> int:
    """Of the forward: all scores, visible or not, as torch counts its own causal kernels; two matmuls a score."""
    _, batch, heads, length, channels = heads_shape
    return 4 * batch * heads * length**2 * channels


register("rope_heads", _fake_rope_heads)
register("rope_heads_backward", lambda grad_heads, table, scale, out: None)
register("prefix_attention", _fake_prefix_attention, flops=lambda heads, limits, **_: _flops(heads))
register(
    "prefix_attention_backward",
    lambda grad, heads, mixed, lse, limits, out: None,
    flops=lambda grad, heads, *rest, **_: 5 * _flops(heads) // 2,
)
register("one_query_attention", lambda query, keys, values, scale: keys.new_empty(query.shape))
