"""LlamaGen's VQ-16 tokenizer (arXiv 2406.06525; `tokenizer/tokenizer_image/vq_model.py` of its program).

A convolutional encoder shrinks the image 16-fold; each of its positions becomes the nearest of 16,384
directions of 8 dimensions. Parameter names and shapes are the published ones.

Legend: B images, C channels, H height, W width, L codes per image, N positions (B * L), V codes, E dimensions
of a code.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_ds.models.weight_files import KINDS, WeightsKind
from cca_ds.ops.exact_convolutions import exact_convolutions
from cca_ds.vq.conv_blocks import Downsample, ResidualBlock, Upsample, attend, convolution, group_norm
from cca_ds.vq.tokenizer import TOKENIZERS, LearnedTokenizer, TokenizerSpec, checked_codes

CODE_DIM = 8
BLOCKS_PER_LEVEL = 2
_ROWS_AT_ONCE = 4096  # of distances to all codes: 256 MiB in float32


class AttentionBlock(nn.Module):
    """Attention of every position to every other, one head, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = convolution(channels, channels, 1)
        self.k = convolution(channels, channels, 1)
        self.v = convolution(channels, channels, 1)
        self.proj_out = convolution(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        normed_BCHW = self.norm(x_BCHW)
        mixed_BCHW = attend(self.q(normed_BCHW), self.k(normed_BCHW), self.v(normed_BCHW))
        return x_BCHW + self.proj_out(mixed_BCHW)


class _Level(nn.Module):
    """The residual blocks of one resolution, with attention at the lowest, then the change to the next
    resolution.
    """

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool, change: str | None) -> None:
        super().__init__()
        widths = [channels_in, *[channels_out] * blocks]
        self.res = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(channels_out) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(channels_out) if change == "down" else None
        self.upsample = Upsample(channels_out) if change == "up" else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[index](x_BCHW)
        change = self.downsample or self.upsample
        return x_BCHW if change is None else change(x_BCHW)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """Images -> features, 2^(levels - 1) times smaller."""

    def __init__(self, channels: int, multipliers: Sequence[int], z_channels: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        last = len(widths) - 1
        self.conv_in = convolution(3, channels)
        self.conv_blocks = nn.ModuleList(
            _Level([channels, *widths][i], widths[i], BLOCKS_PER_LEVEL, i == last, "down" if i < last else None)
            for i in range(len(widths))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = convolution(widths[-1], z_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, Z, h, w]."""
        x_BCHW = self.conv_in(x_BCHW)
        for part in (*self.conv_blocks, *self.mid):
            x_BCHW = part(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class Decoder(nn.Module):
    """Features -> images, 2^(levels - 1) times larger."""

    def __init__(self, channels: int, multipliers: Sequence[int], z_channels: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in reversed(multipliers)]
        last = len(widths) - 1
        self.conv_in = convolution(z_channels, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            _Level([widths[0], *widths][i], widths[i], BLOCKS_PER_LEVEL + 1, i == 0, "up" if i < last else None)
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = convolution(widths[-1], 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, Z, h, w] -> [B, 3, H, W]."""
        x_BCHW = self.conv_in(x_BCHW)
        for part in (*self.mid, *self.conv_blocks):
            x_BCHW = part(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class _Codebook(nn.Module):
    """The codes' directions; `codebook_used` counted their use in the original's training and is only carried
    along.
    """

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, CODE_DIM)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def directions(self) -> Tensor:
        """Unit vectors of the codes, [V, E] float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, z_NE: Tensor) -> Tensor:
        """The code of the smallest angle to each vector, [N] int64, computed in float32."""
        codes_VE = self.directions()
        half_norm_V = codes_VE.square().sum(-1) / 2  # 1/2 but for rounding, which the original's distances see too
        z_NE = F.normalize(z_NE.float(), dim=-1)
        parts = [(rows @ codes_VE.T).sub_(half_norm_V).argmax(-1) for rows in z_NE.split(_ROWS_AT_ONCE)]
        return torch.cat(parts)


class LlamaGenVQ(LearnedTokenizer):
    """VQ-16: 384 px images <-> 576 codes. The defaults are the published tokenizer's shape."""

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        z_channels: int = 256,
        codebook_size: int = 16384,
    ) -> None:
        super().__init__()
        if channels % 32:
            raise ValueError(f"channels={channels} must be a multiple of 32, the groups of the norms")
        self.vocab_size = codebook_size
        self.reduction = 2 ** (len(channel_multipliers) - 1)
        self.encoder = Encoder(channels, channel_multipliers, z_channels)
        self.decoder = Decoder(channels, channel_multipliers, z_channels)
        self.quantize = _Codebook(codebook_size)
        self.quant_conv = convolution(z_channels, CODE_DIM, 1)
        self.post_quant_conv = convolution(CODE_DIM, z_channels, 1)

    def sequence_length(self, image_size: int) -> int:
        """Codes per square image of `image_size` pixels a side."""
        if image_size < self.reduction or image_size % self.reduction:
            raise ValueError(f"image_size={image_size} must be a multiple of {self.reduction}")
        return (image_size // self.reduction) ** 2

    @torch.no_grad()
    @exact_convolutions()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes [B, L] int64, in raster order, of square images [B, 3, H, W] in [-1, 1], whatever their
        dtype.
        """
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or images_BCHW.shape[2] != images_BCHW.shape[3]:
            raise ValueError(f"images must be square RGB, [B, 3, H, H], not {list(images_BCHW.shape)}")
        self.sequence_length(images_BCHW.shape[2])
        images_BCHW = images_BCHW.to(self.quant_conv.weight.dtype)
        z_BEHW = self.quant_conv(self.encoder(images_BCHW))
        codes_N = self.quantize.nearest(z_BEHW.permute(0, 2, 3, 1).reshape(-1, CODE_DIM))
        return codes_N.view(len(images_BCHW), -1)

    @torch.no_grad()
    @exact_convolutions()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Images [B, 3, H, H] in the weights' dtype, about [-1, 1], of codes [B, L] with L a square number."""
        side = round(codes_BL.shape[1] ** 0.5)
        if side * side != codes_BL.shape[1]:
            raise ValueError(f"{codes_BL.shape[1]} codes an image are no square: they come from another tokenizer")
        codes_BL = checked_codes(codes_BL, self.vocab_size)
        chosen_BHWE = F.embedding(codes_BL, self.quantize.directions()).unflatten(1, (side, side))
        z_BEHW = chosen_BHWE.permute(0, 3, 1, 2).contiguous().to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z_BEHW))


TOKENIZERS.register(
    TokenizerSpec(
        name="llamagen-vq16",
        build=LlamaGenVQ,
        needs_weights=True,
        family="llamagen",
        imports_npy=True,
        weights=KINDS.register(
            WeightsKind(
                name="LlamaGen's tokenizer",
                marker="encoder.conv_blocks.0.res.0.conv1.weight",
                counted=frozenset({"quantize.codebook_used"}),
                sizes={"quantize.embedding.weight": (0, "codes in the codebook")},
            )
        ),
    )
)
