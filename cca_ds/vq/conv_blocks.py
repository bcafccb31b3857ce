"""What the convolutional tokenizers of both families are built of, names as both publish them.

Legend: B images, C channels, H height, W width.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many of them as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def convolution(channels: int, out_channels: int, size: int = 3) -> nn.Conv2d:
    """One that keeps height and width."""
    return nn.Conv2d(channels, out_channels, size, padding=size // 2)


class ResidualBlock(nn.Module):
    """Two convolutions behind norms, added to the input."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), convolution(channels, out_channels)
        self.norm2, self.conv2 = group_norm(out_channels), convolution(out_channels, out_channels)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else convolution(channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out_channels, H, W]."""
        branch_BCHW = self.conv1(F.silu(self.norm1(x_BCHW), inplace=True))
        branch_BCHW = self.conv2(F.silu(self.norm2(branch_BCHW), inplace=True))
        return self.nin_shortcut(x_BCHW) + branch_BCHW


def attend(q_BCHW: Tensor, k_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Attention of every cell of a map to every other, one head: [B, C, H, W] each -> the same."""
    q_B1LC, k_B1LC, v_B1LC = (x.flatten(2).transpose(1, 2)[:, None] for x in (q_BCHW, k_BCHW, v_BCHW))
    mixed_B1LC = F.scaled_dot_product_attention(q_B1LC, k_B1LC, v_B1LC)
    return mixed_B1LC[:, 0].transpose(1, 2).reshape(q_BCHW.shape)


class Downsample(nn.Module):
    """Halves height and width; the padding is at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
