"""The blocks of VAR's transformer: adaLN, attention by cosine over the scales, feed-forward.

Legend: B images, L codes per image, D width, H heads, C channels of a head, F hidden width of the feed-forward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_ds.likelihood import LikelihoodHead
from cca_ds.models.layers import DropPath, Linear
from cca_ds.ops.adaln import adaln, adaln_linear, gated_residual_linear
from cca_ds.ops.attention import scale_attention
from cca_ds.ops.qk_norm import qk_norm

_MAX_LOG_SCALE = math.log(100.0)


class AdaLNLinear(Linear):
    """adaLN and the linear layer after it, in one module so that ZeRO-3 gathers the weight in its forward."""

    transient = False  # whether only the next op reads the result; see `adaln_linear`

    def __init__(self, in_features: int, out_features: int, bias: bool, std: float, eps: float) -> None:
        super().__init__(in_features, out_features, bias, std)
        self.eps = eps

    def forward(self, x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, F]; `bias_F` for a layer that has no bias of its own."""
        bias_F = self.bias if bias_F is None else bias_F
        return adaln_linear(x_BLD, scale_BD, shift_BD, self.eps, self.weight, bias_F, self.transient)


class QKVLinear(AdaLNLinear):
    """The projections to queries, keys and values, which attention copies into heads."""

    transient = True


class GatedResidualLinear(Linear):
    """The last linear layer of a branch, scaled by an image's gate and added to the stream."""

    gelu = False  # of the input

    def forward(self, x_BLF: Tensor, stream_BLD: Tensor, gate_BD: Tensor) -> Tensor:
        """[B, L, F], [B, L, D], [B, D] -> [B, L, D]."""
        return gated_residual_linear(x_BLF, stream_BLD, gate_BD, self.weight, self.bias, self.gelu)


class GeluGatedResidualLinear(GatedResidualLinear):
    """The same with a GELU in front."""

    gelu = True


class Attention(nn.Module):
    """Self-attention by cosine, with a learned scale per head of at most 100."""

    def __init__(self, config, std: float, out_std: float) -> None:
        super().__init__()
        width, heads, self.scales = config.dim, config.n_head, config.scales
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.register_buffer("zero_k_bias", torch.empty(width))  # the published files hold it
        self.mat_qkv = QKVLinear(width, 3 * width, bias=False, std=std, eps=config.norm_eps)
        self.proj = GatedResidualLinear(width, width, bias=True, std=out_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A scale of 4, and biases of 0."""
        nn.init.constant_(self.scale_mul_1H11, math.log(4.0))
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)
        nn.init.zeros_(self.zero_k_bias)

    def _qkv(self, x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Projections [B, L, 3 D], and the scale of each head [H], float32."""
        bias = torch.cat([self.q_bias, self.zero_k_bias.to(self.q_bias.dtype), self.v_bias])
        scale_1H11 = self.scale_mul_1H11.to(torch.promote_types(self.scale_mul_1H11.dtype, torch.float32))
        scale_H = scale_1H11.clamp_max(_MAX_LOG_SCALE).exp().flatten()
        return self.mat_qkv(x_BLD, scale_BD, shift_BD, bias), scale_H

    def forward(self, x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, gate_BD: Tensor) -> Tensor:
        """All scales at once, added to the stream: [B, L, D] -> [B, L, D]."""
        mixed_BLD = scale_attention(*self._qkv(x_BLD, scale_BD, shift_BD), self.scales)
        return self.proj(mixed_BLD, x_BLD, gate_BD)

    def step(
        self, x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, gate_BD: Tensor, cache_2BHLC: Tensor, start: int
    ) -> Tensor:
        """One scale, whose codes begin at `start`, attends to itself and to the coarser scales in the cache."""
        end = start + x_BLD.shape[1]
        q_BHLC, k_BHLC, v_BHLC = qk_norm(*self._qkv(x_BLD, scale_BD, shift_BD))
        cache_2BHLC[0, :, :, start:end] = k_BHLC
        cache_2BHLC[1, :, :, start:end] = v_BHLC
        k_BHLC, v_BHLC = cache_2BHLC[:, :, :, :end].unbind(0)
        mixed_BHLC = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, scale=1.0)
        return self.proj(mixed_BHLC.transpose(1, 2).flatten(2), x_BLD, gate_BD)


class FeedForward(nn.Module):
    """Two layers with a GELU (its tanh form) between."""

    def __init__(self, config, std: float, out_std: float) -> None:
        super().__init__()
        hidden = round(config.dim * config.mlp_ratio)
        self.fc1 = AdaLNLinear(config.dim, hidden, bias=True, std=std, eps=config.norm_eps)
        self.fc2 = GeluGatedResidualLinear(hidden, config.dim, bias=True, std=out_std)

    def forward(self, x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, gate_BD: Tensor) -> Tensor:
        """Added to the stream: [B, L, D] -> [B, L, D]."""
        return self.fc2(self.fc1(x_BLD, scale_BD, shift_BD), x_BLD, gate_BD)


class BlockAdaLN(Linear):
    """The class embedding's linear map to the gates, scales and shifts of a block; the gates start near 0."""

    def reset_parameters(self) -> None:
        """Rows of the two gates 1e-5 of `std`, the others half of it, as in the original's `init_weights`."""
        super().reset_parameters()
        with torch.no_grad():
            gates = 2 * self.out_features // 6
            self.weight[:gates] *= 1e-5
            self.weight[gates:] *= 0.5


class Block(nn.Module):
    """Attention and feed-forward, each with adaLN and a gate computed from the class."""

    def __init__(self, config, drop_path: float) -> None:
        super().__init__()
        self.width = config.dim
        std, out_std = config.initializer_range, config.initializer_range / math.sqrt(2 * config.depth)
        self.attn = Attention(config, std, out_std)
        self.ffn = FeedForward(config, std, out_std)
        self.drop_path = DropPath(drop_path)  # of the gates: a branch of an image with gate 0 adds nothing
        self.shared_aln = config.shared_aln
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, config.dim))
            self.reset_parameters()
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), BlockAdaLN(config.dim, 6 * config.dim, bias=True, std=std))

    def reset_parameters(self) -> None:
        """The block's own offsets to the shared gates, scales and shifts; those of the gates near 0."""
        if self.shared_aln:
            nn.init.normal_(self.ada_gss[:, :, :2], std=1e-5 * self.width**-0.5)
            nn.init.normal_(self.ada_gss[:, :, 2:], std=0.5 * self.width**-0.5)

    def adaln(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Two gates, two scales, two shifts, each [B, D].

        `condition` is the class embedding [B, D], or [B, 6, D] from `SharedAdaLN`.
        """
        if self.shared_aln:
            return (self.ada_gss[:, 0] + condition).unbind(1)
        return self.ada_lin(condition).unflatten(-1, (6, self.width)).unbind(1)

    def forward(self, x_BLD: Tensor, condition: Tensor) -> Tensor:
        """All scales at once: [B, L, D] -> [B, L, D]; `condition` as in `adaln`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.adaln(condition)
        x_BLD = self.attn(x_BLD, scale1, shift1, self.drop_path(gate1))
        return self.ffn(x_BLD, scale2, shift2, self.drop_path(gate2))

    def step(self, x_BLD: Tensor, adaln: tuple[Tensor, ...], cache_2BHLC: Tensor, start: int) -> Tensor:
        """One scale, for sampling; `adaln` is the result of the method, the same at every scale."""
        gate1, gate2, scale1, scale2, shift1, shift2 = adaln
        x_BLD = self.attn.step(x_BLD, scale1, shift1, gate1, cache_2BHLC, start)
        return self.ffn(x_BLD, scale2, shift2, gate2)


class HeadNorm(nn.Module):
    """The adaLN before the head."""

    def __init__(self, width: int, eps: float, std: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width, bias=True, std=0.5 * std))

    def forward(self, x_BLD: Tensor, class_BD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        scale_BD, shift_BD = self.ada_lin(class_BD).unflatten(-1, (2, self.width)).unbind(1)
        return adaln(x_BLD, scale_BD, shift_BD, self.eps)


class Head(LikelihoodHead):
    """The output layer, which starts with every code about equally likely."""

    def __init__(self, width: int, vocab_size: int, std: float) -> None:
        self.std = 0.02 * std
        super().__init__(width, vocab_size)

    def reset_parameters(self) -> None:
        """Draw the weight; no bias."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class SharedAdaLN(Linear):
    """One map from the class embedding to the gates, scales and shifts of all blocks, which add their own offsets."""

    def forward(self, class_BD: Tensor) -> Tensor:
        """[B, D] -> [B, 6, D]."""
        return super().forward(class_BD).unflatten(-1, (6, -1))
