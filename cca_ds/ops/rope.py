"""Rotary position embedding (arXiv 2104.09864) over the rows and columns of an image, as LlamaGen has it.

Legend: B images, L positions, H heads, C channels of a head, P = C / 2 pairs of channels, G codes along a side.
"""

import numpy as np
import torch
from torch import Tensor


def rotary_table(grid_size: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of each position's angles, [1 + grid_size^2, head_dim / 2, 2] float32.

    The first half of the pairs encodes the row, the second the column. Position 0, the class token's, is all zeros, as
    in LlamaGen (`autoregressive/models/gpt.py`): its queries and keys become 0, and every code attends to it with score
    0. Computed with NumPy, since `zero.Init` and `torch.device` change what torch's constructors return.
    """
    pairs = head_dim // 4
    frequency_P = 1.0 / base ** (2.0 * np.arange(pairs) / (head_dim // 2))
    angle_GP = np.arange(grid_size)[:, None] * frequency_P
    row_GGP = np.broadcast_to(angle_GP[:, None], (grid_size, grid_size, pairs))
    column_GGP = np.broadcast_to(angle_GP[None], (grid_size, grid_size, pairs))
    angle_LP = np.concatenate([row_GGP, column_GGP], axis=-1).reshape(grid_size**2, 2 * pairs)
    table_LP2 = np.zeros((1 + grid_size**2, 2 * pairs, 2), dtype=np.float32)
    table_LP2[1:, :, 0], table_LP2[1:, :, 1] = np.cos(angle_LP), np.sin(angle_LP)
    return torch.from_numpy(table_LP2)


def rope_eager(x_BLHC: Tensor, table_LP2: Tensor) -> Tensor:
    """Plain version of `rope`, in real arithmetic, which torch.compile fuses."""
    even, odd = x_BLHC.to(_at_least_fp32(x_BLHC)).unflatten(-1, (-1, 2)).unbind(-1)
    cos_LP, sin_LP = table_LP2[:, None, :, 0], table_LP2[:, None, :, 1]
    rotated = torch.stack([even * cos_LP - odd * sin_LP, even * sin_LP + odd * cos_LP], dim=-1)
    return rotated.flatten(-2).to(x_BLHC.dtype)


def rope(x_BLHC: Tensor, table_LP2: Tensor) -> Tensor:
    """Rotate neighbouring channels (2i, 2i + 1) of each head by the angles of its position: [B, L, H, C], same dtype.

    Computed in float32 (float64 from float64). `table_LP2` is `rotary_table`, cut to the positions of `x`.
    """
    if x_BLHC.device.type != "cpu" or torch.compiler.is_compiling():
        return rope_eager(x_BLHC, table_LP2)
    # one complex multiplication is one pass over memory; real arithmetic takes seven
    fp32 = _at_least_fp32(x_BLHC)
    pairs = torch.view_as_complex(x_BLHC.to(fp32).unflatten(-1, (-1, 2)))
    rotated = pairs * torch.view_as_complex(table_LP2.to(fp32))[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x_BLHC.dtype)


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
