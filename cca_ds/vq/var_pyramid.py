"""VAR's multi-scale residual quantizer (arXiv 2404.02905, algorithms 1 and 2; `models/quant.py` of its program).

A feature map f is coded coarse to fine: at each scale what is left of f is shrunk to the scale's size, every cell takes
its nearest code, the codes are enlarged again, passed through a residual convolution phi and taken from what is left.
The sum of all scales' phi is what the decoder sees; it is always float32 here, whatever the network around runs in.

Legend: B images, S scales, L codes over all scales, l codes of one scale, Z channels of a code, V codes,
h height and width of the finest scale.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_ds.ops.exact_convolutions import exact_convolutions


class Phi(nn.Conv2d):
    """phi(x) = x / 2 + conv(x) / 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x_BZhh: Tensor) -> Tensor:
        """[B, Z, h, h] -> [B, Z, h, h], float32."""
        weight, bias = self.weight.to(x_BZhh.dtype), self.bias.to(x_BZhh.dtype)
        with torch.autocast(x_BZhh.device.type, enabled=False), exact_convolutions():
            return torch.lerp(x_BZhh, F.conv2d(x_BZhh, weight, bias, padding=1), 0.5)


class _SharedPhis(nn.Module):
    """The published names of the residual convolutions, `qresi_ls.N`."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(count))


class ResidualPyramid(nn.Module):
    """Codebook and residual convolutions, and what is done with them."""

    phi_count = 4

    def __init__(self, vocab_size: int, code_channels: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.vocab_size, self.code_channels, self.scales = vocab_size, code_channels, tuple(scales)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), vocab_size))
        self.quant_resi = _SharedPhis(code_channels, self.phi_count)
        self.embedding = nn.Embedding(vocab_size, code_channels)

    @property
    def sequence_length(self) -> int:
        """Codes of all scales, L."""
        return sum(scale**2 for scale in self.scales)

    def phi(self, scale: int) -> Phi:
        """The convolution of scale number `scale`: of the four, spread over the scales, the nearest."""
        count = self.phi_count
        ticks = np.linspace(1 / 3 / count, 1 - 1 / 3 / count, count)
        return self.quant_resi.qresi_ls[int(np.abs(ticks - scale / max(len(self.scales) - 1, 1)).argmin())]

    def contribution(self, codes_Bl: Tensor, scale: int) -> Tensor:
        """What one scale's codes [B, l] add to the sum, [B, Z, h, h] float32."""
        size, finest = self.scales[scale], self.scales[-1]
        x_BZhh = self.embedding(codes_Bl).float().transpose(1, 2).unflatten(2, (size, size))
        if size != finest:
            x_BZhh = F.interpolate(x_BZhh, size=(finest, finest), mode="bicubic")
        return self.phi(scale)(x_BZhh)

    def empty(self, batch: int) -> Tensor:
        """The sum before the first scale, [B, Z, h, h] zeros."""
        shape = (batch, self.code_channels, self.scales[-1], self.scales[-1])
        return torch.zeros(shape, dtype=torch.float32, device=self.embedding.weight.device)

    def next_input(self, sum_BZhh: Tensor, scale: int) -> Tensor:
        """The sum shrunk to the size of scale number `scale`, a row per cell: [B, l, Z]."""
        size = self.scales[scale]
        return F.interpolate(sum_BZhh, size=(size, size), mode="area").flatten(2).transpose(1, 2)

    def split(self, codes_BL: Tensor) -> tuple[Tensor, ...]:
        """The codes of each scale, [B, l] int64; ValueError for another length or a code outside the codebook."""
        if codes_BL.ndim != 2 or codes_BL.shape[1] != self.sequence_length:
            shape = list(codes_BL.shape)
            raise ValueError(f"codes of shape {shape}: the scales {self.scales} take [B, {self.sequence_length}]")
        return codes_BL.long().split([scale**2 for scale in self.scales], dim=1)

    def feature_sum(self, codes_BL: Tensor) -> Tensor:
        """The decoder's input, [B, Z, h, h] float32, of the codes of all scales."""
        sum_BZhh = self.empty(len(codes_BL))
        for scale, codes_Bl in enumerate(self.split(codes_BL)):
            sum_BZhh = sum_BZhh + self.contribution(codes_Bl, scale)
        return sum_BZhh

    @torch.no_grad()
    def teacher_input(self, codes_BL: Tensor) -> Tensor:
        """The transformer's input for every scale but the first, [B, L - first l, Z] float32."""
        with torch.autocast(codes_BL.device.type, enabled=False):
            sum_BZhh, inputs = self.empty(len(codes_BL)), []
            for scale, codes_Bl in enumerate(self.split(codes_BL)[:-1]):
                sum_BZhh += self.contribution(codes_Bl, scale)
                inputs.append(self.next_input(sum_BZhh, scale + 1))
            return torch.cat(inputs, dim=1)

    def nearest(self, x_NZ: Tensor) -> Tensor:
        """Nearest code of each row, [N] int64."""
        codebook_VZ = self.embedding.weight.detach().to(x_NZ.dtype)
        distance_NV = torch.addmm(codebook_VZ.square().sum(1), x_NZ, codebook_VZ.t(), alpha=-2.0)
        return distance_NV.argmin(1)

    def shrunk(self, rest_BZhh: Tensor, scale: int) -> Tensor:
        """What is left, at the size of scale number `scale`: a row per cell, [B * l, Z]."""
        return self.next_input(rest_BZhh, scale).flatten(0, 1)

    @torch.no_grad()
    def encode(self, features_BZhh: Tensor) -> Tensor:
        """Codes of all scales, [B, L] int64, of the encoder's output [B, Z, h, h]."""
        with torch.autocast(features_BZhh.device.type, enabled=False):
            rest_BZhh, codes = features_BZhh.float().clone(), []
            for scale in range(len(self.scales)):
                codes_Bl = self.nearest(self.shrunk(rest_BZhh, scale)).view(len(rest_BZhh), -1)
                rest_BZhh -= self.contribution(codes_Bl, scale)
                codes.append(codes_Bl)
            return torch.cat(codes, dim=1)

    def straight_through(self, features_BZhh: Tensor, commitment: float) -> tuple[Tensor, Tensor]:
        """For training: the sum over the scales, whose gradient passes on to the features, and the loss.

        The loss is the mean over the scales of |sum - f|^2, which moves the codes, plus `commitment` times the same,
        which moves the features: VAR's `VectorQuantizer2.forward`.
        """
        target_BZhh = features_BZhh.detach().float()
        sum_BZhh, loss = self.empty(len(features_BZhh)), features_BZhh.new_zeros((), dtype=torch.float32)
        for scale in range(len(self.scales)):
            with torch.no_grad():
                codes_N = self.nearest(self.shrunk(target_BZhh - sum_BZhh, scale))
            sum_BZhh = sum_BZhh + self.contribution(codes_N.view(len(target_BZhh), -1), scale)
            loss = loss + F.mse_loss(sum_BZhh, target_BZhh)
            loss = loss + commitment * F.mse_loss(features_BZhh.float(), sum_BZhh.detach())
        passed_BZhh = features_BZhh + (sum_BZhh - features_BZhh).detach()
        return passed_BZhh, loss / len(self.scales)


class FrozenPyramid(ResidualPyramid):
    """A copy with neither parameters nor state: float32 (or float64) on any device, through any cast of its owner."""

    def __init__(self, source: ResidualPyramid) -> None:
        super().__init__(source.vocab_size, source.code_channels, source.scales)
        theirs = dict(source.named_parameters())
        for module_name, module in self.named_modules():
            for name in [*module._parameters, *module._buffers]:
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)
                path = f"{module_name}.{name}".lstrip(".")
                if path in theirs:
                    module.register_buffer(name, theirs[path].detach().float().clone(), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "FrozenPyramid":
        """Follow a move to another device and nothing else: no cast, and neither `to_empty` nor the meta device."""
        device = fn(torch.empty(0, device=self.embedding.weight.device)).device
        return self if device.type == "meta" else super()._apply(lambda tensor: tensor.to(device), recurse)
