"""The blocks of VAR's transformer: adaptive layer norm, attention with normalised queries and keys,
feed-forward.

Legend: B images, L codes per image, D width, H heads, F hidden width of the feed-forward.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_ds.likelihood import LikelihoodHead
from cca_ds.models.layers import Linear
from cca_ds.ops.adaln import gated_residual_linear, modulated_linear, modulated_norm
from cca_ds.ops.scale_attention import block_causal_attention, normalised_heads

_MAX_LOG_SCALE = math.log(100.0)


class Modulation(NamedTuple):
    """What an image's class makes of a layer norm: scale and shift [B, D], and the norm's epsilon."""

    scale: Tensor
    shift: Tensor
    eps: float


class ModulatedLinear(Linear):
    """`nn.Linear` behind a layer norm that an image's own scale and shift modulate."""

    def forward(
        self, x_BLD: Tensor, modulation: Modulation, bias: Tensor | None = None, kept: bool = True
    ) -> Tensor:
        """[B, L, D] -> [B, L, F]; `bias` in place of the layer's own, where it has none; `kept` for a backward."""
        bias = self.bias if bias is None else bias
        return modulated_linear(x_BLD, *modulation, self.weight, bias, kept)


class GatedResidualLinear(Linear):
    """The last `nn.Linear` of a branch, added to the stream as an image's own gate lets it."""

    with_gelu = False

    def forward(self, x_BLF: Tensor, stream_BLD: Tensor, gate_BD: Tensor) -> Tensor:
        """[B, L, F], [B, L, D], [B, D] -> [B, L, D]."""
        return gated_residual_linear(x_BLF, stream_BLD, gate_BD, self.weight, self.bias, self.with_gelu)


class GeluGatedResidualLinear(GatedResidualLinear):
    """The same behind a GELU."""

    with_gelu = True


class Attention(nn.Module):
    """Self-attention by cosine, with a learned scale per head of at most 100."""

    def __init__(self, width: int, heads: int, scales: tuple[int, ...], std: float, out_std: float) -> None:
        super().__init__()
        self.heads, self.scales = heads, scales
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.register_buffer("zero_k_bias", torch.empty(width))  # the published files hold it
        self.mat_qkv = ModulatedLinear(width, 3 * width, std=std)  # its bias has no part for the keys
        self.proj = GatedResidualLinear(width, width, bias=True, std=out_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A scale of 4, and no biases."""
        nn.init.constant_(self.scale_mul_1H11, math.log(4.0))
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)
        nn.init.zeros_(self.zero_k_bias)

    def _project(self, x_BLD: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        bias = torch.cat([self.q_bias, self.zero_k_bias.to(self.q_bias.dtype), self.v_bias])
        scale_1H11 = self.scale_mul_1H11.to(torch.promote_types(self.scale_mul_1H11.dtype, torch.float32))
        scale_H = scale_1H11.clamp_max(_MAX_LOG_SCALE).exp().flatten()
        return self.mat_qkv(x_BLD, modulation, bias, kept=False), scale_H

    def forward(self, x_BLD: Tensor, modulation: Modulation, gate_BD: Tensor) -> Tensor:
        """All scales at once, added to the stream: [B, L, D] -> [B, L, D]."""
        qkv_BLD, scale_H = self._project(x_BLD, modulation)
        return self.proj(block_causal_attention(qkv_BLD, scale_H, self.scales), x_BLD, gate_BD)

    def step(
        self, x_BLD: Tensor, modulation: Modulation, gate_BD: Tensor, cache_2BHLC: Tensor, start: int
    ) -> Tensor:
        """One scale, whose codes begin at `start`, against itself and the coarser ones in the cache."""
        end = start + x_BLD.shape[1]
        q_BHLC, k_BHLC, v_BHLC = normalised_heads(*self._project(x_BLD, modulation))
        cache_2BHLC[0, :, :, start:end] = k_BHLC
        cache_2BHLC[1, :, :, start:end] = v_BHLC
        k_BHLC, v_BHLC = cache_2BHLC[:, :, :, :end].unbind(0)
        mixed_BHLC = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, scale=1.0)
        return self.proj(mixed_BHLC.transpose(1, 2).flatten(2), x_BLD, gate_BD)


class FeedForward(nn.Module):
    """Two layers with a GELU (its tanh form) between."""

    def __init__(self, width: int, hidden: int, std: float, out_std: float) -> None:
        super().__init__()
        self.fc1 = ModulatedLinear(width, hidden, bias=True, std=std)
        self.fc2 = GeluGatedResidualLinear(hidden, width, bias=True, std=out_std)

    def forward(self, x_BLD: Tensor, modulation: Modulation, gate_BD: Tensor) -> Tensor:
        """Added to the stream: [B, L, D] -> [B, L, D]."""
        return self.fc2(self.fc1(x_BLD, modulation), x_BLD, gate_BD)


class AdaptiveLinear(Linear):
    """The class embedding's linear map to the gates, scales and shifts of a block; the gates start near 0."""

    def reset_parameters(self) -> None:
        """Rows of the two gates 1e-5 of `std`, the others half of it, as in the original's `init_weights`."""
        super().reset_parameters()
        with torch.no_grad():
            gates = 2 * self.out_features // 6
            self.weight[:gates] *= 1e-5
            self.weight[gates:] *= 0.5


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm modulated by the class, and gated by it."""

    def __init__(self, config, drop_path: float) -> None:
        super().__init__()
        self.width, self.eps, self.drop_path_rate = config.dim, config.norm_eps, drop_path
        std, out_std = config.initializer_range, config.initializer_range / math.sqrt(2 * config.depth)
        self.attn = Attention(config.dim, config.n_head, config.scales, std, out_std)
        self.ffn = FeedForward(config.dim, round(config.dim * config.mlp_ratio), std, out_std)
        self.shared_aln = config.shared_aln
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, config.dim))
            self.reset_parameters()
        else:
            self.ada_lin = nn.Sequential(
                nn.SiLU(), AdaptiveLinear(config.dim, 6 * config.dim, bias=True, std=std)
            )

    def reset_parameters(self) -> None:
        """The block's own offsets to the shared modulation, those of the two gates near 0."""
        if self.shared_aln:
            nn.init.normal_(self.ada_gss[:, :, :2], std=1e-5 * self.width**-0.5)
            nn.init.normal_(self.ada_gss[:, :, 2:], std=0.5 * self.width**-0.5)

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Two gates, two scales, two shifts, each [B, D], of the class embedding [B, D] (shared: of [B, 6,
        D]).
        """
        if self.shared_aln:
            return (self.ada_gss[:, 0] + condition).unbind(1)
        return self.ada_lin(condition).unflatten(-1, (6, self.width)).unbind(1)

    def _gate(self, gate_BD: Tensor) -> Tensor:
        """The gate [B, D], with stochastic depth: a branch left out is one whose gate is 0 for an image."""
        if self.training and self.drop_path_rate > 0.0:
            keep = 1.0 - self.drop_path_rate
            gate_BD = gate_BD * gate_BD.new_empty(len(gate_BD), 1).bernoulli_(keep).div_(keep)
        return gate_BD

    def forward(self, x_BLD: Tensor, condition: Tensor) -> Tensor:
        """All scales at once: [B, L, D] -> [B, L, D]; `condition` as in `modulation`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(condition)
        x_BLD = self.attn(x_BLD, Modulation(scale1, shift1, self.eps), self._gate(gate1))
        return self.ffn(x_BLD, Modulation(scale2, shift2, self.eps), self._gate(gate2))

    def step(self, x_BLD: Tensor, modulation: tuple[Tensor, ...], cache_2BHLC: Tensor, start: int) -> Tensor:
        """One scale, for sampling: `modulation` is the same at every scale, and so is computed once."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x_BLD = self.attn.step(x_BLD, Modulation(scale1, shift1, self.eps), gate1, cache_2BHLC, start)
        return self.ffn(x_BLD, Modulation(scale2, shift2, self.eps), gate2)


class HeadNorm(nn.Module):
    """The layer norm before the head, modulated by the class."""

    def __init__(self, width: int, eps: float, std: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width, bias=True, std=0.5 * std))

    def forward(self, x_BLD: Tensor, class_BD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        scale_BD, shift_BD = self.ada_lin(class_BD).unflatten(-1, (2, self.width)).unbind(1)
        return modulated_norm(x_BLD, scale_BD, shift_BD, self.eps)


class Head(LikelihoodHead):
    """The output layer, which starts with every code about equally likely."""

    def __init__(self, width: int, vocab_size: int, std: float) -> None:
        self.std = 0.02 * std
        super().__init__(width, vocab_size)

    def reset_parameters(self) -> None:
        """Draw the weight; no bias."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class SharedModulation(Linear):
    """One map from the class embedding to [B, 6, D] for all blocks, which add their own offsets."""

    def forward(self, class_BD: Tensor) -> Tensor:
        """[B, D] -> [B, 6, D]."""
        return super().forward(class_BD).unflatten(-1, (6, -1))
