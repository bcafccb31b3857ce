"""Block-causal attention over the scales of VAR: a code sees its own scale and the coarser ones.

No mask of [L, L] exists. The sequence is cut into segments that end where a scale ends; the queries of a
segment attend to the keys up to its end, which is all they may see, so the 38% of the scores that a mask
would hide (ten scales, 680 codes) are never computed. Only the coarsest scales, too small to be worth a call
each, share a segment, and a mask of its own small size. On a GPU every call but the first is one that
FlashAttention takes.

On a CPU the backward is written out here: PyTorch's own runs at a tenth of the matrix rate.

Legend: B images, L codes per image, H heads, C channels of a head, Q queries of a segment, K keys up to its
end.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_JOINED_CODES = 128  # scales are joined into the first segment up to this many codes
_CHUNK_SCORES = 1 << 20  # scores a CPU step works on: what its cache holds
_NORM_EPS = 1e-12


@dataclass(frozen=True)
class Segment:
    """Queries `start` to `end`, which attend to the keys 0 to `end`; `scales` are the scale sizes it holds."""

    start: int
    end: int
    scales: tuple[int, ...]

    def mask(self, device: torch.device) -> Tensor | None:
        """[Q, K] bool, true where a query may look; None where it may look everywhere."""
        return None if len(self.scales) == 1 else _joined_mask(self.scales, device)


@lru_cache(maxsize=16)
def _joined_mask(scales: tuple[int, ...], device: torch.device) -> Tensor:
    lengths = torch.tensor([scale**2 for scale in scales])
    level_L = torch.repeat_interleave(torch.arange(len(scales)), lengths)
    return (level_L[:, None] >= level_L).to(device)


@lru_cache(maxsize=16)
def segments(scales: tuple[int, ...]) -> tuple[Segment, ...]:
    """The segments of a pyramid of square scales, in order: (1, 2, 3, 4, 5, 6), 8, 10, 13, 16 for VAR at 256
    px.
    """
    ends = list(accumulate(scale**2 for scale in scales))
    joined = max(1, sum(end <= _JOINED_CODES for end in ends))
    cut = [Segment(0, ends[joined - 1], tuple(scales[:joined]))]
    cut += [Segment(ends[i - 1], ends[i], (scales[i],)) for i in range(joined, len(scales))]
    return tuple(cut)


def normalised_heads(qkv_BLD: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of length `scale_H`, keys of length 1, and values, each [B, H, L, C]."""
    q_BHLC, k_BHLC, v_BHLC = _split_heads(qkv_BLD, scale_H.shape[0])
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
            attn_mask=part.mask(qkv_BLD.device),
            scale=1.0,
        )
        for part in segments(scales)
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2).flatten(2)


def _split_heads(qkv_BLD: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv_BLD.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _inverse_norm(x_BHLC: Tensor) -> Tensor:
    """1 / |x| over the channels, [B, H, L, 1], at least float32."""
    dtype = torch.promote_types(x_BHLC.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_BHLC, dim=-1, keepdim=True, dtype=dtype)
    return norm.clamp_min(_NORM_EPS).reciprocal()


def _scaled(x_BHLC: Tensor, factor_BHL1: Tensor) -> Tensor:
    """x times a float32 factor, rounded once to x's dtype, contiguous."""
    out = torch.empty(x_BHLC.shape, dtype=x_BHLC.dtype, device=x_BHLC.device)
    return torch.mul(x_BHLC, factor_BHL1, out=out)


class _CPUAttention(torch.autograd.Function):
    """The forward is PyTorch's flash kernel, segment by segment; the backward five matrix products a segment."""

    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, scale_H: Tensor, scales: tuple[int, ...]) -> Tensor:
        q_BHLC, k_BHLC, v_BHLC = _split_heads(qkv_BLD, scale_H.shape[0])
        inverse_q, inverse_k = _inverse_norm(q_BHLC), _inverse_norm(k_BHLC)
        q_BHLC = _scaled(q_BHLC, inverse_q * scale_H[:, None, None])
        k_BHLC, v_BHLC = _scaled(k_BHLC, inverse_k), v_BHLC.contiguous()
        out_BLHC = qkv_BLD.new_empty(*qkv_BLD.shape[:2], *q_BHLC.shape[1::2])
        lse_BHL = inverse_q.new_empty(q_BHLC.shape[:3])
        for part in segments(scales):
            mask = part.mask(qkv_BLD.device)
            mixed_BHQC, lse_BHL[:, :, part.start : part.end] = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_BHLC[:, :, part.start : part.end],
                    k_BHLC[:, :, : part.end],
                    v_BHLC[:, :, : part.end],
                    attn_mask=None if mask is None else _additive(mask, q_BHLC.dtype),
                    scale=1.0,
                )
            )
            out_BLHC[:, part.start : part.end] = mixed_BHQC.transpose(1, 2)
        ctx.save_for_backward(q_BHLC, k_BHLC, v_BHLC, out_BLHC, lse_BHL, inverse_q, inverse_k, scale_H)
        ctx.scales = scales
        return out_BLHC.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, Tensor, None]:
        q_BHLC, k_BHLC, v_BHLC, out_BLHC, lse_BHL, inverse_q, inverse_k, scale_H = ctx.saved_tensors
        grad_BLHC = grad_BLD.view_as(out_BLHC)
        delta_BHL = torch.mul(grad_BLHC, out_BLHC).sum(-1, dtype=lse_BHL.dtype).transpose(1, 2)
        grad_BHLC = grad_BLHC.transpose(1, 2)
        grads_B3HLC = q_BHLC.new_empty(q_BHLC.shape[0], 3, *q_BHLC.shape[1:])
        for image in range(q_BHLC.shape[0]):
            inputs = (q_BHLC, k_BHLC, v_BHLC, grad_BHLC, lse_BHL, delta_BHL)
            _image_backward(*(x[image] for x in inputs), grads_B3HLC[image], segments(ctx.scales))
        grad_q, grad_k, grad_v = grads_B3HLC.unbind(1)
        grad_qkv_BL3HC = grad_BLD.new_empty(*grad_BLD.shape[:2], 3, *out_BLHC.shape[2:])
        out_q, out_k, out_v = grad_qkv_BL3HC.permute(2, 0, 3, 1, 4).unbind(0)
        scale_H11 = scale_H[:, None, None]
        along_q = _normalise_backward(grad_q, q_BHLC, inverse_q * scale_H11, scale_H11.square(), out_q)
        _normalise_backward(grad_k, k_BHLC, inverse_k, torch.ones_like(scale_H11), out_k)
        out_v.copy_(grad_v)
        return grad_qkv_BL3HC.flatten(2), (along_q.sum((0, 2, 3)) / scale_H).to(scale_H.dtype), None


def _additive(mask_QK: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask_QK.shape, dtype=dtype).masked_fill_(~mask_QK, -torch.inf)


def _normalise_backward(
    grad: Tensor, y: Tensor, factor: Tensor, length_squared: Tensor, out: Tensor
) -> Tensor:
    """Through y = factor * x, |y|^2 = length_squared: factor * (g - y (y.g) / |y|^2) into `out`; returns y.g."""
    along = torch.mul(y, grad).sum(-1, keepdim=True, dtype=factor.dtype)
    torch.mul(torch.addcmul(grad, y, (along / length_squared).to(y.dtype), value=-1.0), factor, out=out)
    return along


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
    q_HLC: Tensor,
    k_HLC: Tensor,
    v_HLC: Tensor,
    grad_HLC: Tensor,
    lse_HL: Tensor,
    delta_HL: Tensor,
    grads_3HLC: Tensor,
    parts: tuple[Segment, ...],
) -> None:
    """Gradients of one image's q, k, v into `grads_3HLC`, from P = exp(q k - lse), dS = P * (g v - delta)."""
    wide_q, wide_k = _with_columns(q_HLC, lse_HL), _with_columns(k_HLC, None)
    wide_g, wide_v = _with_columns(grad_HLC, delta_HL), _with_columns(v_HLC, None)
    # bf16 products copy a transposed score matrix, so the small factors are the ones that are turned
    q_HCL, grad_HCL = q_HLC.transpose(1, 2).contiguous(), grad_HLC.transpose(1, 2).contiguous()
    grad_k_HCL, grad_v_HCL = torch.empty_like(q_HCL), torch.empty_like(q_HCL)
    for part in reversed(parts):  # the last first: its keys are all of them, so it starts the sums
        step = max(1, _CHUNK_SCORES // ((part.end - part.start) * part.end))
        mask = part.mask(q_HLC.device)
        for first in range(0, q_HLC.shape[0], step):
            heads, span = slice(first, first + step), slice(part.start, part.end)
            queries, keys = (heads, span), (heads, slice(0, part.end))
            turned_queries, turned_keys = (heads, slice(None), span), (heads, slice(None), slice(0, part.end))
            p_HQK = torch.bmm(wide_q[queries], wide_k[keys].transpose(1, 2))
            if mask is not None:
                p_HQK.masked_fill_(~mask, -torch.inf)
            p_HQK.exp_()
            ds_HQK = torch.bmm(wide_g[queries], wide_v[keys].transpose(1, 2)).mul_(p_HQK)
            beta = 0.0 if part is parts[-1] else 1.0  # 0 ignores what the memory held
            torch.bmm(ds_HQK, k_HLC[keys], out=grads_3HLC[0][queries])
            grad_k_HCL[turned_keys].baddbmm_(q_HCL[turned_queries], ds_HQK, beta=beta)
            grad_v_HCL[turned_keys].baddbmm_(grad_HCL[turned_queries], p_HQK, beta=beta)
    grads_3HLC[1], grads_3HLC[2] = grad_k_HCL.transpose(1, 2), grad_v_HCL.transpose(1, 2)
