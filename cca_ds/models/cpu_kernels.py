"""The passes between a training step's matrix products on a CPU: kernels of csrc/, and what PyTorch has in their place.

Each function is a pure one of plain tensors; the autograd functions that call them are in `layers.py`,
`var_functions.py` and the two attentions.

Legend: B images, L positions, D = H * C, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_ds.likelihood import backend

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_NORM_EPS = 1e-12
_MOST_CHANNELS = 512


def has_kernel(x: Tensor) -> bool:
    """Whether csrc's passes take a tensor of this device and dtype."""
    return x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES and backend() != "torch"


def has_head_kernel(x: Tensor, channels: int) -> bool:
    """Whether csrc's passes over heads of so many channels do."""
    return has_kernel(x) and channels % 2 == 0 and channels <= _MOST_CHANNELS


def gelu(x: Tensor) -> Tensor:
    """The GELU in its tanh form."""
    return torch.ops.cca_ds.gelu(x) if has_kernel(x) else F.gelu(x, approximate="tanh")


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gelu` at x."""
    if has_kernel(x):
        return torch.ops.cca_ds.gelu_backward(grad, x)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """SwiGLU's product, silu(gate) * value."""
    return torch.ops.cca_ds.gated(gate, value) if has_kernel(gate) else F.silu(gate).mul_(value)


def gated_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated`'s gate and value."""
    if has_kernel(gate):
        return torch.ops.cca_ds.gated_backward(grad, gate, value)
    return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


def split_heads(qkv_BLD: Tensor, heads: int) -> Tensor:
    """[B, L, 3 D] -> a view [3, B, H, L, C]."""
    return qkv_BLD.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(heads_3BHLC: Tensor) -> Tensor:
    """[3, B, H, L, C] -> [B, L, 3 D]."""
    return heads_3BHLC.permute(1, 3, 0, 2, 4).flatten(2)


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
        return torch.ops.cca_ds.turned_heads_backward(grads_3BHLC, table_LP2, scale)
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
        grad_qkv_BLD, along_BHL = torch.ops.cca_ds.normalised_heads_backward(
            grads_3BHLC, heads_3BHLC, factors_2BHL, scale_H
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


def _fake_projection(heads_3BHLC: Tensor) -> Tensor:
    _, batch, heads, length, channels = heads_3BHLC.shape
    return heads_3BHLC.new_empty(batch, length, 3 * heads * channels)


def _fake_normalised(projection: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    heads = _fake_heads(projection, len(scale))
    return heads, scale.new_empty(2, *heads.shape[1:4])


def _fake_prefix_attention(heads: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    _, batch, count, length, channels = heads.shape
    lse_BHL = heads.new_empty(batch, count, length, dtype=torch.float32)
    return heads.new_empty(batch, length, count, channels), lse_BHL


def _register() -> None:
    """What a compiler must know of the kernels."""
    fakes = {
        "block_linear": lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
        "weight_gradient": lambda residual, hidden: hidden.new_empty(residual.shape[1], hidden.shape[1]),
        "gelu": torch.empty_like,
        "gelu_backward": lambda grad, x: torch.empty_like(x),
        "gated": lambda gate, value: torch.empty_like(gate),
        "gated_backward": lambda grad, gate, value: (torch.empty_like(gate), torch.empty_like(gate)),
        "turned_heads": lambda projection, table, heads, scale: _fake_heads(projection, heads),
        "turned_heads_backward": lambda grad_heads, table, scale: _fake_projection(grad_heads),
        "normalised_heads": _fake_normalised,
        "normalised_heads_backward": lambda grad_heads, heads, factors, scale: (
            _fake_projection(heads),
            factors.new_empty(factors.shape[1:]),
        ),
        "prefix_attention": _fake_prefix_attention,
        "prefix_attention_backward": lambda grad, heads, mixed, lse, limits: torch.empty_like(heads),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"cca_ds::{name}", fake)


if backend() != "torch":
    _register()
