"""Layers that both transformers are built from, with their initial weights.

Legend: B images, D width, F hidden width of the feed-forward or number of frequencies.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_ds.ops.linear import linear
from cca_ds.ops.norms import rms_norm
from cca_ds.ops.swiglu import swiglu_linear

_GFT_FREQUENCIES, _LONGEST_PERIOD = 128, 10000.0  # GFT's `TimestepEmbedder`, LlamaGen/autoregressive/models/gpt.py


class Linear(nn.Linear):
    """`nn.Linear` whose weight starts normal with `std` and whose bias starts at 0.

    The weights are drawn in `reset_parameters`, because ZeRO-3's `zero.Init` partitions a module's parameters as soon
    as it is constructed, and for use after `to_empty`.
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


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32; same dtype back."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Start at 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)


class DropPath(nn.Module):
    """Stochastic depth: an image's branch is 0 with probability `rate`, and the others are scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Any tensor with a row for each image, [B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        # not `bernoulli_`, for which torch.compile would make a graph for each rate, so for each block
        kept_B = torch.rand(branch.shape[0], device=branch.device) < keep
        return branch * (kept_B / keep).to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def sinusoid(value_B: Tensor, frequency_F: Tensor) -> Tensor:
    """Cosines, then sines, of value times frequency, [B, 2 F] float32: bf16 would round the angles by whole radians."""
    angle_BF = value_B.float()[:, None] * frequency_F
    return torch.cat([angle_BF.cos(), angle_BF.sin()], dim=-1)


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
        features_BF = sinusoid(log_lambda_B, frequency_F)
        return self.fc2(F.silu(self.fc1(features_BF.to(self.fc1.weight.dtype))))


class GFTBetaEmbedding(nn.Module):
    """GFT's beta -> a vector added to the class embedding (arXiv 2501.15420): a sinusoid of 1000 beta and an MLP.

    Parameter names are the published ones. The last layer starts at 0, so that the model starts as the base model.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(2 * _GFT_FREQUENCIES, dim, bias=True), nn.SiLU(), Linear(dim, dim, bias=True, std=0.0)
        )

    def forward(self, gft_beta_B: Tensor) -> Tensor:
        """[B] beta in [0, 1] -> [B, D]."""
        step_F = torch.arange(_GFT_FREQUENCIES, device=gft_beta_B.device, dtype=torch.float32)
        frequency_F = torch.exp(step_F * (-math.log(_LONGEST_PERIOD) / _GFT_FREQUENCIES))
        features_BF = sinusoid(1000.0 * gft_beta_B.float(), frequency_F)
        return self.mlp(features_BF.to(self.mlp[0].weight.dtype))


class SwiGLULinear(Linear):
    """SwiGLU's last layer: the weight times silu(gate) * value; no bias."""

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        """[..., F], [..., F] -> [..., D]."""
        return swiglu_linear(gate, value, self.weight)
