"""Attention in which a query sees the first so many keys, as both families' do: forward and backward for CPUs.

The sequence is cut into segments; a segment's queries see all keys before it and, within it, those of its mask. In
bf16, where the processor has the products for them, both are csrc's kernels. Else the forward is PyTorch's flash
kernel, segment by segment, and the backward five matrix products a segment: PyTorch's own runs at a tenth of the matrix
rate.

Legend: B images, L positions, H heads, C channels of a head, Q queries of a segment, K keys up to its end.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cca_ds.ops.cpu_kernels import has_head_kernel, has_kernel, scratch

_CHUNK_SCORES = 1 << 19  # scores a step of the backward works on: what a processor's cache holds


@dataclass(frozen=True, eq=False)
class Segment:
    """Queries `start` to `end`, which see all keys before `start` and, among `start` to `end`, those of `mask`.

    The mask [Q, Q] is true where a query may look, for each at a number of the first keys; None is everywhere.
    """

    start: int
    end: int
    mask: Tensor | None = None

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        """[Q, K], 0 where a query may look and minus infinity elsewhere; None where it may look everywhere."""
        if self.mask is None:
            return None
        added = torch.zeros(len(self.mask), self.end, dtype=dtype)
        added[:, self.start :].masked_fill_(~self.mask, -torch.inf)
        return added


Segments = tuple[Segment, ...]


@lru_cache(maxsize=32)
def _limits(segments: Segments) -> Tensor:
    """How many keys each query sees, [L]."""
    parts = []
    for part in segments:
        size = part.end - part.start
        parts.append(torch.full((size,), part.end) if part.mask is None else part.start + part.mask.sum(1))
    return torch.cat(parts)


def has_prefix_kernel(x: Tensor) -> bool:
    """Whether csrc's kernel takes a tensor of this device and dtype on this machine."""
    return has_kernel(x) and torch.ops.cca_ds.has_prefix_attention(x.dtype == torch.bfloat16)


def _has_kernel_for(heads_3BHLC: Tensor) -> bool:
    return has_prefix_kernel(heads_3BHLC) and has_head_kernel(heads_3BHLC, heads_3BHLC.shape[-1])


def attend(heads_3BHLC: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Softmax of q k^T times v: [B, L, H, C], and the log-sum-exps [B, H, L], float32 (float64 from float64).

    Queries come scaled.
    """
    if _has_kernel_for(heads_3BHLC):
        return torch.ops.cca_ds.prefix_attention(heads_3BHLC, _limits(segments))
    q_BHLC, k_BHLC, v_BHLC = heads_3BHLC.unbind(0)
    mixed_BHLC = torch.empty_like(q_BHLC)
    wide = torch.promote_types(q_BHLC.dtype, torch.float32)
    lse_BHL = q_BHLC.new_empty(q_BHLC.shape[:3], dtype=wide)
    for part in segments:
        span = slice(part.start, part.end)
        mixed_BHLC[:, :, span], lse_BHL[:, :, span] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHLC[:, :, span],
                k_BHLC[:, :, : part.end],
                v_BHLC[:, :, : part.end],
                attn_mask=part.additive_mask(q_BHLC.dtype),
                scale=1.0,
            )
        )
    return mixed_BHLC.transpose(1, 2).contiguous(), lse_BHL


def attend_backward(
    grad_BLHC: Tensor, heads_3BHLC: Tensor, mixed_BLHC: Tensor, lse_BHL: Tensor, segments: Segments
) -> Tensor:
    """Gradients [3, B, H, L, C] of `attend`'s queries, keys and values."""
    if _has_kernel_for(heads_3BHLC):
        limits_L = _limits(segments)
        grads_3BHLC = scratch.take("heads", heads_3BHLC.shape, heads_3BHLC)
        torch.ops.cca_ds.prefix_attention_backward(
            grad_BLHC, heads_3BHLC, mixed_BLHC, lse_BHL, limits_L, grads_3BHLC
        )
        return grads_3BHLC
    delta_BHL = torch.mul(grad_BLHC, mixed_BLHC).sum(-1, dtype=lse_BHL.dtype).transpose(1, 2)
    grad_BHLC = grad_BLHC.transpose(1, 2)
    grads_3BHLC = torch.empty_like(heads_3BHLC)
    for image in range(heads_3BHLC.shape[1]):
        inputs = (grad_BHLC[image], lse_BHL[image], delta_BHL[image])
        _image_backward(heads_3BHLC[:, image], *inputs, grads_3BHLC[:, image], segments)
    return grads_3BHLC


def _with_columns(x_HLC: Tensor, negated_HL: Tensor | None) -> Tensor:
    """x with eight more channels: those of minus a float32 number in as many parts as keep it exact, or ones.

    A product with the ones then subtracts the number inside the matrix product, before it is rounded.
    """
    wide = x_HLC.new_zeros(*x_HLC.shape[:2], x_HLC.shape[2] + 8)
    wide[..., :-8] = x_HLC
    if negated_HL is None:
        wide[..., -8:-5] = 1.0
        return wide
    rest_HL = -negated_HL
    for column in (-8, -7, -6):
        wide[..., column] = rest_HL
        rest_HL = rest_HL - wide[..., column]
    return wide


def _image_backward(
    heads_3HLC: Tensor,
    grad_HLC: Tensor,
    lse_HL: Tensor,
    delta_HL: Tensor,
    grads_3HLC: Tensor,
    segments: Segments,
) -> None:
    """Gradients of one image's q, k, v into `grads_3HLC`, from P = exp(q k - lse), dS = P * (g v - delta)."""
    q_HLC, k_HLC, v_HLC = heads_3HLC
    wide_q, wide_k = _with_columns(q_HLC, lse_HL), _with_columns(k_HLC, None)
    wide_g, wide_v = _with_columns(grad_HLC, delta_HL), _with_columns(v_HLC, None)
    # bf16 products copy a transposed score matrix, so the small factors are the ones that are turned
    q_HCL, grad_HCL = q_HLC.transpose(1, 2).contiguous(), grad_HLC.transpose(1, 2).contiguous()
    grad_k_HCL, grad_v_HCL = torch.empty_like(q_HCL), torch.empty_like(q_HCL)
    for part in reversed(segments):  # the last first: its keys are all of them, so it starts the sums
        step = max(1, _CHUNK_SCORES // ((part.end - part.start) * part.end))
        for first in range(0, q_HLC.shape[0], step):
            heads, span = slice(first, first + step), slice(part.start, part.end)
            queries, keys = (heads, span), (heads, slice(0, part.end))
            turned_queries, turned_keys = (heads, slice(None), span), (heads, slice(None), slice(0, part.end))
            p_HQK = torch.bmm(wide_q[queries], wide_k[keys].transpose(1, 2)).exp_()
            if part.mask is not None:
                p_HQK[:, :, part.start :].masked_fill_(~part.mask, 0.0)
            ds_HQK = torch.bmm(wide_g[queries], wide_v[keys].transpose(1, 2)).mul_(p_HQK)
            beta = 0.0 if part is segments[-1] else 1.0  # 0 ignores what the memory held
            torch.bmm(ds_HQK, k_HLC[keys], out=grads_3HLC[0][queries])
            grad_k_HCL[turned_keys].baddbmm_(q_HCL[turned_queries], ds_HQK, beta=beta)
            grad_v_HCL[turned_keys].baddbmm_(grad_HCL[turned_queries], p_HQK, beta=beta)
    grads_3HLC[1], grads_3HLC[2] = grad_k_HCL.transpose(1, 2), grad_v_HCL.transpose(1, 2)
