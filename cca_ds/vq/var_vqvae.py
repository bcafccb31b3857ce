"""VAR's tokenizer (arXiv 2404.02905; `models/vqvae.py` and `models/basic_vae.py` of its program), names as published.

A convolutional encoder and decoder around the multi-scale residual quantizer of `var_pyramid.py`.

Legend: B images, I image channels, H height, W width, L codes over all scales, Z channels of a code,
h height and width of the finest scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_ds.models.var.model import SCALES_256
from cca_ds.models.weight_files import KINDS, WeightsKind
from cca_ds.ops.exact_convolutions import exact_convolutions
from cca_ds.vq.conv_blocks import Downsample, ResidualBlock, Upsample, attend, convolution, group_norm
from cca_ds.vq.tokenizer import TOKENIZERS, LearnedTokenizer, TokenizerSpec, checked_codes
from cca_ds.vq.var_pyramid import FrozenPyramid, ResidualPyramid

_RESIDUAL_BLOCKS = 2  # of a level of the encoder; the decoder has one more


class AttentionBlock(nn.Module):
    """Self-attention of one head over the cells of a map, added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv, self.proj_out = convolution(channels, 3 * channels, 1), convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same."""
        return x + self.proj_out(attend(*self.qkv(self.norm(x)).chunk(3, dim=1)))


class Level(nn.Module):
    """The blocks of one size, with attention after each where asked, and the step to the next size, if any."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResidualBlock(widths[i], out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out_channels, H, W], then resized."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for resize in ("downsample", "upsample"):
            x = getattr(self, resize)(x) if hasattr(self, resize) else x
        return x


class Middle(nn.Module):
    """The blocks at the smallest size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResidualBlock(channels, channels), AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, h] -> the same."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to features of the code's width."""

    def __init__(self, image_channels: int, widths: list[int], code_channels: int) -> None:
        super().__init__()
        self.conv_in = convolution(image_channels, widths[0])
        self.down = nn.ModuleList()
        for index, (channels, out_channels) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            last = index == len(widths) - 1
            level = Level(channels, out_channels, _RESIDUAL_BLOCKS, attention=last)
            if not last:
                level.downsample = Downsample(out_channels)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), convolution(widths[-1], code_channels)

    def forward(self, images_BIHW: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, Z, h, h]."""
        x = self.conv_in(images_BIHW)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    """Features to images; the levels are named by their place in the encoder, and run from the last to the first."""

    def __init__(self, image_channels: int, widths: list[int], code_channels: int) -> None:
        super().__init__()
        self.conv_in, self.mid = convolution(code_channels, widths[-1]), Middle(widths[-1])
        self.up = nn.ModuleList()
        for index, out_channels in enumerate(widths):
            last = index == len(widths) - 1
            channels = widths[-1] if last else widths[index + 1]
            level = Level(channels, out_channels, _RESIDUAL_BLOCKS + 1, attention=last)
            if index > 0:
                level.upsample = Upsample(out_channels)
            self.up.append(level)
        self.norm_out, self.conv_out = group_norm(widths[0]), convolution(widths[0], image_channels)

    def forward(self, features_BZhh: Tensor) -> Tensor:
        """[B, Z, h, h] -> [B, I, H, W]."""
        x = self.mid(self.conv_in(features_BZhh))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class VARTokenizer(LearnedTokenizer):
    """The multi-scale residual VQVAE; the defaults are the published one's: 256 px, 680 codes of ten scales."""

    def __init__(
        self,
        channels: int = 160,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        z_channels: int = 32,
        codebook_size: int = 4096,
        scales: tuple[int, ...] = SCALES_256,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        self.image_channels = image_channels
        self.image_size = scales[-1] * 2 ** (len(widths) - 1)
        self.encoder = Encoder(image_channels, widths, z_channels)
        self.decoder = Decoder(image_channels, widths, z_channels)
        self.quantize = ResidualPyramid(codebook_size, z_channels, scales)
        self.quant_conv, self.post_quant_conv = (
            convolution(z_channels, z_channels),
            convolution(z_channels, z_channels),
        )

    @property
    def vocab_size(self) -> int:
        """Number of codes, V."""
        return self.quantize.vocab_size

    @property
    def scales(self) -> tuple[int, ...]:
        """Height and width of each scale, coarse to fine."""
        return self.quantize.scales

    def sequence_length(self, image_size: int | None = None) -> int:
        """Codes per image over all scales, L; ValueError for an image size that the scales are not made for."""
        if image_size not in (None, self.image_size):
            raise ValueError(f"scales {self.scales} are for {self.image_size} px images, not {image_size} px")
        return self.quantize.sequence_length

    @exact_convolutions()
    def features(self, images_BIHW: Tensor) -> Tensor:
        """The quantizer's input, [B, Z, h, h], of images [B, I, H, W] in [-1, 1]."""
        expected = [self.image_channels, self.image_size, self.image_size]
        if list(images_BIHW.shape[1:]) != expected:
            raise ValueError(f"the tokenizer takes images [B, {expected}], not {list(images_BIHW.shape)}")
        return self.quant_conv(self.encoder(images_BIHW.to(self.quant_conv.weight.dtype)))

    @torch.no_grad()
    def encode(self, images_BIHW: Tensor) -> Tensor:
        """Codes [B, L] int64, all scales concatenated, of images [B, I, H, W] in [-1, 1]."""
        return self.quantize.encode(self.features(images_BIHW))

    @torch.no_grad()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Images [B, I, H, W] in [-1, 1], in the weights' dtype, of codes [B, L] of any integer dtype."""
        codes_BL = checked_codes(codes_BL, self.vocab_size)
        return self.decode_features(self.quantize.feature_sum(codes_BL)).clamp_(-1.0, 1.0)

    @exact_convolutions()
    def decode_features(self, sum_BZhh: Tensor) -> Tensor:
        """Images [B, I, H, W], not clamped, of the sum over the scales."""
        return self.decoder(self.post_quant_conv(sum_BZhh.to(self.post_quant_conv.weight.dtype)))

    def teacher_input(self, codes_BL: Tensor) -> Tensor:
        """What a VAR sees at every scale but the first, [B, L - first l, Z] float32."""
        return self.quantize.teacher_input(codes_BL)

    def frozen_pyramid(self) -> FrozenPyramid:
        """A frozen copy of the codebook and residual convolutions, as a VAR holds it."""
        return FrozenPyramid(self.quantize)

    def training_loss(self, images_BIHW: Tensor, commitment: float = 0.25) -> tuple[Tensor, Tensor]:
        """Squared error of the reconstruction plus the quantizer's loss, a scalar, and the reconstruction [B, I, H, W].

        For small tokenizers of one's own: the published one had a perceptual and an adversarial loss besides.
        """
        sum_BZhh, quantizer_loss = self.quantize.straight_through(self.features(images_BIHW), commitment)
        reconstruction_BIHW = self.decode_features(sum_BZhh)
        return F.mse_loss(reconstruction_BIHW, images_BIHW) + quantizer_loss, reconstruction_BIHW


TOKENIZERS.register(
    TokenizerSpec(
        name="var-vqvae",
        build=VARTokenizer,
        needs_weights=True,
        family="var",
        weights=KINDS.register(
            WeightsKind(
                name="VAR's tokenizer",
                marker="quantize.quant_resi.qresi_ls.0.weight",
                counted=frozenset({"quantize.ema_vocab_hit_SV"}),
                sizes={"quantize.embedding.weight": (0, "codes in the codebook")},
            )
        ),
    )
)
