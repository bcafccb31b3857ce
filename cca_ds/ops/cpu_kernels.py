"""The passes between a training step's matrix products on a CPU: kernels of csrc/, and what PyTorch has in their place.

Functions of plain tensors, of which some write where they are told to; the autograd functions that call them are in
`layers.py`, `var_functions.py` and the two attentions.

Legend: B images, L positions, D = H * C, H heads, C channels of a head.
"""

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cca_ds.ops.library import backend

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_NORM_EPS = 1e-12
_MOST_CHANNELS = 512


def has_kernel(x: Tensor) -> bool:
    """Whether csrc's passes take a tensor of this device and dtype."""
    return x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES and backend() != "torch"


def has_head_kernel(x: Tensor, channels: int) -> bool:
    """Whether csrc's passes over heads of so many channels do."""
    return has_kernel(x) and channels % 2 == 0 and channels <= _MOST_CHANNELS


class _Scratch(threading.local):
    """Memory for what a step makes and soon forgets, kept: freed, it would be a hole that what is kept splits up."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of the dtype and device of the last one.

        Its memory is that of an earlier call for the same use in this thread, once nothing holds that any more.
        """
        if not has_kernel(like):
            return like.new_empty(shape)
        size, key = math.prod(shape), (use, like.dtype)
        piece = self.pieces.get(key)
        if piece is None or len(piece) < size or torch.ops.cca_ds.owners(piece) > 1:
            with torch.inference_mode(False):  # what is made for sampling must serve training too
                piece = self.pieces[key] = torch.empty(size, dtype=like.dtype)
        return piece[:size].view(shape)


scratch = _Scratch()


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The GELU in its tanh form; in the memory of `out`, if that is given."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not has_kernel(x):
        return out.copy_(F.gelu(x, approximate="tanh"))
    torch.ops.cca_ds.gelu(x, out)
    return out


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gelu` at x, in the place of `grad`."""
    if not has_kernel(x):
        return grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
    torch.ops.cca_ds.gelu_backward(grad, x)
    return grad


def gated(gate: Tensor, value: Tensor, out: Tensor | None = None) -> Tensor:
    """SwiGLU's product, silu(gate) * value; in the memory of `out`, if that is given."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
    if not has_kernel(gate):
        return torch.mul(F.silu(gate), value, out=out)
    torch.ops.cca_ds.gated(gate, value, out)
    return out


def gated_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated`'s gate and value."""
    if has_kernel(gate):
        return torch.ops.cca_ds.gated_backward(grad, gate, value)
    return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight, computed in float32 and rounded once, and what the backward needs of the rows."""
    if has_kernel(x_ND):
        out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        return out_ND, torch.ops.cca_ds.rms_norm(x_ND, weight_D.float()[None], eps, out_ND)
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    factor_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=wide)
    factor_N1.square_().mul_(1.0 / x_ND.shape[-1]).add_(eps).rsqrt_()
    return (x_ND * factor_N1 * weight_D).to(x_ND.dtype), factor_N1


def rms_norm_backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`'s x and weight."""
    if has_kernel(x_ND):
        grad_x_ND, grad_weight_1D = torch.ops.cca_ds.rms_norm_backward(
            grad_ND, x_ND, weight_D.float()[None], statistics
        )
        return grad_x_ND, grad_weight_1D[0].to(weight_D.dtype)
    normed_ND, slope_ND = x_ND * statistics, grad_ND * weight_D
    mean_N1 = (slope_ND * normed_ND).mean(-1, keepdim=True, dtype=statistics.dtype)
    grad_weight_D = (grad_ND * normed_ND).sum(0, dtype=statistics.dtype).to(weight_D.dtype)
    return ((slope_ND - normed_ND * mean_N1) * statistics).to(x_ND.dtype), grad_weight_D


def layer_norm(x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float, out_BLD: Tensor) -> Tensor:
    """Layer norm into `out_BLD` with a weight and a bias per image, float32; what the backward needs of the rows."""
    if has_kernel(x_BLD):
        return torch.ops.cca_ds.layer_norm(x_BLD, weight_BD, bias_BD, eps, out_BLD)
    statistics = []
    for image, (weight_D, bias_D) in enumerate(zip(weight_BD, bias_BD, strict=True)):
        out_BLD[image], *of_image = torch.native_layer_norm(
            x_BLD[image], weight_D.shape, weight_D, bias_D, eps
        )
        statistics.append(torch.stack(of_image))
    return torch.stack(statistics)


def layer_norm_backward(
    grad_BLD: Tensor, x_BLD: Tensor, weight_BD: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm`'s x, weight and bias."""
    if has_kernel(x_BLD):
        return torch.ops.cca_ds.layer_norm_backward(grad_BLD, x_BLD, weight_BD, statistics)
    grads = [  # the bias's values count for nothing, so the weight stands for it
        torch.ops.aten.native_layer_norm_backward(
            grad_LD, x_LD, weight_D.shape, *of_image, weight_D, weight_D, (True, True, True)
        )
        for grad_LD, x_LD, weight_D, of_image in zip(grad_BLD, x_BLD, weight_BD, statistics, strict=True)
    ]
    grad_x, grad_weight, grad_bias = (torch.stack(grad) for grad in zip(*grads, strict=True))
    return grad_x, grad_weight, grad_bias


def split_heads(qkv_BLD: Tensor, heads: int) -> Tensor:
    """[B, L, 3 D] -> a view [3, B, H, L, C]."""
    return qkv_BLD.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(heads_3BHLC: Tensor) -> Tensor:
    """[3, B, H, L, C] -> [B, L, 3 D]."""
    return heads_3BHLC.permute(1, 3, 0, 2, 4).flatten(2)


def _shape_of_projection(heads_3BHLC: Tensor) -> tuple[int, int, int]:
    """[B, L, 3 D]."""
    parts, batch, heads, length, channels = heads_3BHLC.shape
    return batch, length, parts * heads * channels


def _turned(qk_2BHLC: Tensor, table_LP2: Tensor, scale: float, back: bool) -> Tensor:
    angles_LP = torch.view_as_complex(table_LP2)
    angles_2LP = torch.stack([angles_LP * scale, angles_LP])[:, None, None]
    pairs = torch.view_as_complex(qk_2BHLC.to(table_LP2.dtype).contiguous().unflatten(-1, (-1, 2)))
    turned = pairs * (angles_2LP.conj() if back else angles_2LP)
    return torch.view_as_real(turned).flatten(-2).to(qk_2BHLC.dtype)


def turned_heads(qkv_BLD: Tensor, table_LP2: Tensor, heads: int, scale: float) -> Tensor:
    """Queries and keys turned by their positions' angles, queries times `scale`, and values: [3, B, H, L, C].

    `table_LP2` is `rotary_table`, float32; rounded once to the projection's dtype.
    """
    if has_head_kernel(qkv_BLD, qkv_BLD.shape[-1] // (3 * heads)):
        return torch.ops.cca_ds.turned_heads(qkv_BLD, table_LP2, heads, scale)
    heads_3BHLC = split_heads(qkv_BLD, heads)
    return torch.cat([_turned(heads_3BHLC[:2], table_LP2, scale, False), heads_3BHLC[2:]])


def turned_heads_backward(grads_3BHLC: Tensor, table_LP2: Tensor, scale: float) -> Tensor:
    """The gradient [B, L, 3 D] of `turned_heads`' projection."""
    if has_head_kernel(grads_3BHLC, grads_3BHLC.shape[-1]):
        grad_BLD = scratch.take("wide", _shape_of_projection(grads_3BHLC), grads_3BHLC)
        torch.ops.cca_ds.turned_heads_backward(grads_3BHLC, table_LP2, scale, grad_BLD)
        return grad_BLD
    return join_heads(torch.cat([_turned(grads_3BHLC[:2], table_LP2, scale, True), grads_3BHLC[2:]]))


def _lengths(scale_H: Tensor) -> Tensor:
    """Of the queries and the keys, [2, 1, H, 1]."""
    return torch.stack([scale_H, torch.ones_like(scale_H)])[:, None, :, None]


def normalised_heads(qkv_BLD: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of length `scale_H`, keys of length 1, and values: [3, B, H, L, C]; and the factors [2, B, H, L].

    `scale_H` and the factors are float32 (float64 with float64); rounded once to the projection's dtype.
    """
    if has_head_kernel(qkv_BLD, qkv_BLD.shape[-1] // (3 * len(scale_H))):
        return torch.ops.cca_ds.normalised_heads(qkv_BLD, scale_H)
    heads_3BHLC = split_heads(qkv_BLD, len(scale_H))
    norms_2BHL = torch.linalg.vector_norm(heads_3BHLC[:2], dim=-1, dtype=scale_H.dtype).clamp_min(_NORM_EPS)
    factors_2BHL = _lengths(scale_H) / norms_2BHL
    qk_2BHLC = (heads_3BHLC[:2] * factors_2BHL[..., None]).to(qkv_BLD.dtype)
    return torch.cat([qk_2BHLC, heads_3BHLC[2:]]), factors_2BHL


def normalised_heads_backward(
    grads_3BHLC: Tensor, heads_3BHLC: Tensor, factors_2BHL: Tensor, scale_H: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `normalised_heads`: of the projection [B, L, 3 D], and of the scale [H]."""
    if has_head_kernel(grads_3BHLC, grads_3BHLC.shape[-1]):
        grad_qkv_BLD = scratch.take("wide", _shape_of_projection(grads_3BHLC), grads_3BHLC)
        along_BHL = torch.ops.cca_ds.normalised_heads_backward(
            grads_3BHLC, heads_3BHLC, factors_2BHL, scale_H, grad_qkv_BLD
        )
    else:
        along_2BHL = torch.mul(heads_3BHLC[:2], grads_3BHLC[:2]).sum(-1, dtype=scale_H.dtype)
        shares_2BHL = along_2BHL / _lengths(scale_H).square()
        across = grads_3BHLC[:2] - heads_3BHLC[:2] * shares_2BHL[..., None]
        grad_qk = (across * factors_2BHL[..., None]).to(grads_3BHLC.dtype)
        grad_qkv_BLD, along_BHL = join_heads(torch.cat([grad_qk, grads_3BHLC[2:]])), along_2BHL[0]
    return grad_qkv_BLD, along_BHL.sum((0, 2)) / scale_H


def _fake_heads(projection: Tensor, heads: int) -> Tensor:
    batch, length, width = projection.shape
    return projection.new_empty(3, batch, heads, length, width // (3 * heads))


def _fake_normalised(projection: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    heads = _fake_heads(projection, len(scale))
    return heads, scale.new_empty(2, *heads.shape[1:4])


def _fake_statistics(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    return weight.new_empty(2, x.shape[:-1].numel())


def _fake_prefix_attention(heads: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    _, batch, count, length, channels = heads.shape
    lse_BHL = heads.new_empty(batch, count, length, dtype=torch.float32)
    return heads.new_empty(batch, length, count, channels), lse_BHL


def _register() -> None:
    """What a compiler must know of the kernels."""
    fakes = {
        "block_linear": lambda x, weight, bias, out: None,
        "weight_gradient": lambda residual, hidden: hidden.new_empty(residual.shape[1], hidden.shape[1]),
        "gelu": lambda x, out: None,
        "gelu_backward": lambda grad, x: None,
        "gated": lambda gate, value, out: None,
        "gated_backward": lambda grad, gate, value: (torch.empty_like(gate), torch.empty_like(gate)),
        "rms_norm": _fake_statistics,
        "rms_norm_backward": lambda grad, x, weight, statistics: (
            torch.empty_like(x),
            torch.empty_like(weight),
        ),
        "layer_norm": lambda x, weight, bias, eps, out: _fake_statistics(x, weight, eps, out),
        "layer_norm_backward": lambda grad, x, weight, statistics: (
            torch.empty_like(x),
            torch.empty_like(weight),
            torch.empty_like(weight),
        ),
        "turned_heads": lambda projection, table, heads, scale: _fake_heads(projection, heads),
        "turned_heads_backward": lambda grad_heads, table, scale, out: None,
        "normalised_heads": _fake_normalised,
        "normalised_heads_backward": lambda grad_heads, heads, factors, scale, out: factors.new_empty(
            factors.shape[1:]
        ),
        "prefix_attention": _fake_prefix_attention,
        "prefix_attention_backward": lambda grad, heads, mixed, lse, limits, out: None,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"cca_ds::{name}", fake)


def _attention_flops(heads_shape: torch.Size) -> int:
    """All scores, seen or not, as torch's counter counts its own causal kernels; two products a score."""
    _, batch, heads, length, channels = heads_shape
    return 4 * batch * heads * length**2 * channels


def _register_flops() -> None:
    """What torch's counter of operations must know of the kernels: those of their products."""
    ops = torch.ops.cca_ds
    formulas = {
        ops.block_linear: lambda x, weight, bias, out, **_: 2 * math.prod(x) * weight[0],
        ops.weight_gradient: lambda residual, hidden, **_: 2 * math.prod(residual) * hidden[1],
        ops.prefix_attention: lambda heads, limits, **_: _attention_flops(heads),
        ops.prefix_attention_backward: lambda grad, heads, *rest, **_: 5 * _attention_flops(heads) // 2,
    }
    for op, formula in formulas.items():
        register_flop_formula(op)(formula)


if backend() != "torch":
    _register()
    _register_flops()
