"""Pieces of the two transformers: normalisation, gated activation, rotary positions, conditioning, initial
values.

Legend: B images, L positions, D width, H heads, C channels of a head, F hidden width of the feed-forward.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cca_ds.ops.cpu_kernels import gated, gated_backward, rms_norm, rms_norm_backward, scratch
from cca_ds.ops.linear import input_gradient, linear, product, weight_gradient


class Linear(nn.Linear):
    """`nn.Linear` whose weight starts normal with `std` and whose bias starts at 0.

    The values are drawn in `reset_parameters`, so that they are right under ZeRO-3's `zero.Init`, which takes
    a module's parameters away as soon as it is constructed, and after `to_empty`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, std: float = 0.02) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weight; a `std` of 0 makes a layer that starts by returning 0."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose rows start normal with `std`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = 0.02) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the rows."""
        nn.init.normal_(self.weight, std=self.std)


class _RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight in the input's dtype, keeping the input and little more."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_RD, statistics = rms_norm(x_RD, weight_D, eps)
        ctx.save_for_backward(x_RD, weight_D, statistics)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weight_D, statistics = ctx.saved_tensors
        return *rms_norm_backward(grad_RD, x_RD, weight_D, statistics), None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32, returned in the input's
    dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Start at 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        if not torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.eps)[0]
        return _RMSNormFunction.apply(x.flatten(0, -2), self.weight, self.eps).view_as(x)


class DropPath(nn.Module):
    """Stochastic depth: a whole sample's branch is left out with probability `rate`, the others grow by 1 /
    (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        mask_B = (
            torch.empty(branch.shape[0], device=branch.device, dtype=branch.dtype).bernoulli_(keep).div_(keep)
        )
        return branch * mask_B.view(-1, *[1] * (branch.ndim - 1))


class LambdaEmbedding(nn.Module):
    """log lambda -> a vector added to the class embedding (arXiv 2410.09347, Table 5): a sinusoid and an MLP.

    The last layer starts at 0, so that the model starts as the base model.
    """

    def __init__(self, dim: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = Linear(2 * frequencies, dim, bias=True)
        self.fc2 = Linear(dim, dim, bias=True, std=0.0)

    def forward(self, log_lambda_B: Tensor) -> Tensor:
        """[B] natural logarithms of lambda, 0 to 9 in the paper -> [B, D]."""
        # periods from 63 (all of 0..9 is a seventh of a turn) down to 0.6
        octave_F = torch.arange(self.frequencies, device=log_lambda_B.device, dtype=torch.float32)
        frequency_F = torch.exp(octave_F * (math.log(100.0) / (self.frequencies - 1))) * 0.1
        angle_BF = log_lambda_B.float()[:, None] * frequency_F
        features_BF = torch.cat([angle_BF.cos(), angle_BF.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(features_BF.to(self.fc1.weight.dtype))))


class _GatedLinearFunction(torch.autograd.Function):
    """(silu(gate) * value) @ weight.T, keeping gate and value only and making the product again in the
    backward.
    """

    @staticmethod
    def forward(ctx, gate_RF: Tensor, value_RF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_RF, value_RF, weight_DF)
        return product(gated(gate_RF, value_RF, scratch.take("wide", gate_RF.shape, gate_RF)), weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate_RF, value_RF, weight_DF = ctx.saved_tensors
        grad_weight_DF = None
        if ctx.needs_input_grad[2]:
            grad_weight_DF = weight_gradient(
                grad_RD, gated(gate_RF, value_RF, scratch.take("wide", gate_RF.shape, gate_RF))
            )
        return *gated_backward(input_gradient(grad_RD, weight_DF), gate_RF, value_RF), grad_weight_DF


class GatedLinear(Linear):
    """SwiGLU's last layer: the weight times silu(gate) * value, without the product in memory while training."""

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        """[..., F], [..., F] -> [..., D]; no bias."""
        if gate.is_cuda or gate.dtype != self.weight.dtype:  # the latter: autocast
            return super().forward(F.silu(gate) * value)
        if not torch.is_grad_enabled():
            return super().forward(gated(gate, value))
        product_RD = _GatedLinearFunction.apply(gate.flatten(0, -2), value.flatten(0, -2), self.weight)
        return product_RD.unflatten(0, gate.shape[:-1])


def rotary_table(grid_size: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of the two-dimensional rotary embedding, [1 + grid_size^2, head_dim / 2, 2] float32.

    The first half of the pairs turns with the row, the second with the column. Position 0, the class token's,
    is all zeros, as in LlamaGen (`autoregressive/models/gpt.py`): its queries and keys vanish, and every code
    attends to it with score 0. Made with NumPy, since `zero.Init` and `torch.device` change what torch's
    constructors return.
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


def rotate(x_BLHC: Tensor, table_LP2: Tensor) -> Tensor:
    """Turn neighbouring channels (2i, 2i + 1) of each head by the angles of its position, in float32; same
    dtype back.
    """
    pairs_BLHP2 = x_BLHC.float().unflatten(-1, (-1, 2))
    if x_BLHC.is_cuda:  # real arithmetic, which torch.compile fuses
        cos_LP, sin_LP = table_LP2[:, None, :, 0], table_LP2[:, None, :, 1]
        even, odd = pairs_BLHP2.unbind(-1)
        turned = torch.stack([even * cos_LP - odd * sin_LP, even * sin_LP + odd * cos_LP], dim=-1)
    else:  # one pass of a vectorised kernel instead of seven
        turned = torch.view_as_real(
            torch.view_as_complex(pairs_BLHP2) * torch.view_as_complex(table_LP2)[:, None]
        )
    return turned.flatten(-2).to(x_BLHC.dtype)
