"""LlamaGen's causal attention with its rotary positions, as one step with a backward of its own for CPUs.

PyTorch's flash kernel has a backward that runs at a tenth of the matrix rate there. This one makes five
matrix products for each block of queries, which attend to the keys up to the block's end only.

Legend: B images, L positions, D width, H heads, C channels of a head, P = C / 2 pairs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.models.var_attention import _with_columns

_BLOCK = 192  # queries of a block: a third of 576
_HEADS_AT_ONCE = 4  # what a processor's cache holds of their scores


def _tables(table_LP2: Tensor, scale: float) -> Tensor:
    """Complex factors of queries, which are scaled, and of keys: [L, 2, 1, P]."""
    return torch.view_as_complex(torch.stack([table_LP2 * scale, table_LP2], dim=1)).unsqueeze(2)


class _CausalAttention(torch.autograd.Function):
    """qkv [B, L, 3 H C] -> mixed values [B, L, H C]."""

    @staticmethod
    def forward(ctx, qkv_BLD: Tensor, table_LP2: Tensor, n_head: int) -> Tensor:
        qkv_BL3HC = qkv_BLD.unflatten(-1, (3, n_head, -1))
        batch, length, _, _, channels = qkv_BL3HC.shape
        pairs = torch.view_as_complex(qkv_BL3HC[:, :, :2].float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * _tables(table_LP2, channels**-0.5)).flatten(-2)
        qk_2BHLC = qkv_BLD.new_empty(2, batch, n_head, length, channels)
        qk_2BHLC.permute(1, 3, 0, 2, 4).copy_(turned)
        q_BHLC, k_BHLC = qk_2BHLC.unbind(0)
        v_BHLC = qkv_BL3HC[:, :, 2].transpose(1, 2).contiguous()
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed_BHLC, lse_BHL = flash(q_BHLC, k_BHLC, v_BHLC, is_causal=True, scale=1.0)
        mixed_BLHC = mixed_BHLC.transpose(1, 2).contiguous()
        ctx.save_for_backward(qk_2BHLC, v_BHLC, mixed_BLHC, lse_BHL, table_LP2)
        return mixed_BLHC.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, None, None]:
        qk_2BHLC, v_BHLC, mixed_BLHC, lse_BHL, table_LP2 = ctx.saved_tensors
        grad_BLHC = grad_BLD.view_as(mixed_BLHC)
        delta_BHL = torch.mul(grad_BLHC, mixed_BLHC).sum(-1, dtype=lse_BHL.dtype).transpose(1, 2)
        inputs = (*qk_2BHLC.unbind(0), v_BHLC, grad_BLHC.transpose(1, 2), lse_BHL, delta_BHL)
        batch, heads, length, channels = v_BHLC.shape
        grads_B3HLC = v_BHLC.new_empty(batch, 3, heads, length, channels)
        for image in range(batch):
            _image_backward(*(x[image] for x in inputs), grads_B3HLC[image])
        grads_BL3HC = grads_B3HLC.permute(0, 3, 1, 2, 4)
        pairs = torch.view_as_complex(grads_BL3HC[:, :, :2].float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * _tables(table_LP2, channels**-0.5).conj()).flatten(-2)
        grad_qkv_BL3HC = grad_BLD.new_empty(batch, length, 3, heads, channels)
        grad_qkv_BL3HC[:, :, :2] = turned
        grad_qkv_BL3HC[:, :, 2] = grads_BL3HC[:, :, 2]
        return grad_qkv_BL3HC.flatten(2), None, None


def _image_backward(
    q_HLC: Tensor,
    k_HLC: Tensor,
    v_HLC: Tensor,
    grad_HLC: Tensor,
    lse_HL: Tensor,
    delta_HL: Tensor,
    grads_3HLC: Tensor,
) -> None:
    """Gradients of one image's q, k, v into `grads_3HLC`, from P = exp(q k - lse) and dS = P * (g v - delta)."""
    length = q_HLC.shape[1]
    wide_q, wide_k = _with_columns(q_HLC, lse_HL), _with_columns(k_HLC, None).transpose(1, 2)
    wide_g, wide_v = _with_columns(grad_HLC, delta_HL), _with_columns(v_HLC, None).transpose(1, 2)
    grad_HLC = grad_HLC.contiguous()
    starts = range(0, length, _BLOCK)
    for head in range(0, q_HLC.shape[0], _HEADS_AT_ONCE):
        heads = slice(head, head + _HEADS_AT_ONCE)
        grad_q, grad_k, grad_v = (part[heads] for part in grads_3HLC)
        for start in reversed(starts):  # the last first: its keys are all of them, so it starts the sums
            end = min(start + _BLOCK, length)
            p_HQK = torch.bmm(wide_q[heads, start:end], wide_k[heads, :, :end]).exp_()
            p_HQK[:, :, start:].tril_()  # a query sees no later key of its own block
            ds_HQK = torch.bmm(wide_g[heads, start:end], wide_v[heads, :, :end]).mul_(p_HQK)
            beta = 0.0 if start == starts[-1] else 1.0  # 0 ignores what the memory held
            grad_q[:, start:end] = torch.bmm(ds_HQK, k_HLC[heads, :end])
            grad_k[:, :end].baddbmm_(ds_HQK.transpose(1, 2), q_HLC[heads, start:end], beta=beta)
            grad_v[:, :end].baddbmm_(p_HQK.transpose(1, 2), grad_HLC[heads, start:end], beta=beta)


def causal_attention(qkv_BLD: Tensor, table_LP2: Tensor, n_head: int) -> Tensor:
    """Attention of each position to itself and those before: [B, L, 3 D] projections -> [B, L, D] mixed
    values.

    Queries and keys are turned by `table_LP2` (`rotary_table`) first. For a CPU; worth it in bfloat16 only.
    """
    return _CausalAttention.apply(qkv_BLD, table_LP2, n_head)
