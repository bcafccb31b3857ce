"""VAR's class-conditional transformer (arXiv 2404.02905; `models/var.py` of its program): next-scale
prediction.

The codes of an image are those of its scales, coarse to fine, one after another. All codes of a scale are
predicted at once from the coarser ones, through the residual pyramid of the tokenizer: the image so far, at
the next scale's size, is the input. The codebook and convolutions for that are the tokenizer's, frozen in float32
in the model and no part of its `state_dict`. Parameter names and shapes are the published
ones.

Legend: B images, L codes per image, S scales, V vocabulary, D width, H heads, Z channels of a code.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from cca_ds.models.base import CodeModel
from cca_ds.models.layers import Embedding, Linear
from cca_ds.models.var.blocks import Block, Head, HeadNorm, SharedAdaLN
from cca_ds.ops.library import autocast_dtype

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of 256 px images, coarse to fine
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class VARConfig:
    """Shape of a VAR; the defaults are the published models' at 256 px. Width and heads follow from the depth."""

    depth: int
    num_classes: int = 1000
    vocab_size: int = 4096
    scales: tuple[int, ...] = SCALES_256
    width: int | None = None  # 64 * depth
    heads: int | None = None  # one per 64 channels
    code_channels: int = 32  # of the tokenizer's codebook, Z
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    drop_path: float | None = None  # stochastic depth of the last block, growing from 0; 0.1 * depth / 24
    lambda_conditioning: bool = False
    gft_conditioning: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(int(scale) for scale in self.scales))
        for name in ("depth", "num_classes", "vocab_size", "code_channels", "dim", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"VAR: {name}={getattr(self, name)} must be at least 1")
        if not self.scales or list(self.scales) != sorted(set(self.scales)) or self.scales[0] < 1:
            raise ValueError(f"VAR: scales={self.scales} must be growing sizes of at least 1, such as (1, 2, 3, 4)")
        if self.dim % self.n_head:
            raise ValueError(f"VAR: width={self.dim} must be a multiple of heads={self.n_head}")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"VAR: drop_path={self.drop_path_rate} must be in [0, 1)")

    @property
    def dim(self) -> int:
        """Width, D."""
        return 64 * self.depth if self.width is None else self.width

    @property
    def n_head(self) -> int:
        """Heads, H."""
        return max(1, self.dim // 64) if self.heads is None else self.heads

    @property
    def n_layer(self) -> int:
        """Number of blocks."""
        return self.depth

    @property
    def drop_path_rate(self) -> float:
        """Stochastic depth of the last block."""
        return 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path

    @property
    def sequence_length(self) -> int:
        """Codes per image over all scales, L."""
        return sum(scale**2 for scale in self.scales)

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the first weights."""
        return (1.0 / self.dim / 3.0) ** 0.5


class VAR(CodeModel):
    """Codes of one scale after another, coarse to fine; see `CodeModel`.

    Without a tokenizer the model can be built (on the meta device too), loaded and saved, but not called.
    """

    family = "var"

    def __init__(self, config: VARConfig, tokenizer: nn.Module | None = None) -> None:
        super().__init__(config)
        std, scales = config.initializer_range, config.scales
        self.pos_start = nn.Parameter(torch.empty(1, scales[0] ** 2, config.dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, config.sequence_length, config.dim))
        self.word_embed = Linear(config.code_channels, config.dim, bias=True, std=std)
        self.class_emb = Embedding(config.num_classes + 1, config.dim, std)
        self.lvl_embed = Embedding(len(scales), config.dim, std)
        self.add_conditioning()
        self.shared_ada_lin = nn.Identity()
        if config.shared_aln:
            shared = SharedAdaLN(config.dim, 6 * config.dim, bias=True, std=std)
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), shared)
        rates = [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_nm = HeadNorm(config.dim, config.norm_eps, std)
        self.head = Head(config.dim, config.vocab_size, std)
        self.reset_parameters()
        self.pyramid: nn.Module | None = None
        if tokenizer is not None:
            self.attach_tokenizer(tokenizer)

    def reset_parameters(self) -> None:
        """Draw the position embeddings."""
        nn.init.normal_(self.pos_start, std=self.config.initializer_range)
        nn.init.normal_(self.pos_1LC, std=self.config.initializer_range)

    def embed_class(self, labels_B: Tensor) -> Tensor:
        """The class embedding, [B] -> [B, D]."""
        return self.class_emb(labels_B)

    def read_out(self, hidden_BLD: Tensor, codes_BL: Tensor | None = None, *mixed: Tensor) -> Tensor:
        """Logits [B, L, V], or with codes their log-likelihoods [B]."""
        return self.head(hidden_BLD, codes_BL, *mixed)

    def attach_tokenizer(self, tokenizer: nn.Module) -> None:
        """Copy the frozen codebook and residual convolutions of `tokenizer`; ValueError where shapes differ."""
        pyramid = tokenizer.frozen_pyramid()
        for name in ("scales", "vocab_size", "code_channels"):
            own, its = getattr(self.config, name), getattr(pyramid, name)
            if own != its:
                raise ValueError(
                    f"VAR: {name}={own} but the tokenizer's is {its}: give the tokenizer that the model was made for"
                )
        self.pyramid = pyramid if self.pos_1LC.is_meta else pyramid.to(self.pos_1LC.device)

    def require_pyramid(self) -> nn.Module:
        """The tokenizer's frozen part; ValueError when the model was made without a tokenizer."""
        if self.pyramid is None:
            raise ValueError("this VAR has no tokenizer: give create_model(..., tokenizer=) or call attach_tokenizer")
        return self.pyramid

    def positions(self) -> Tensor:
        """Position plus scale, [1, L, D]."""
        lengths = [scale**2 for scale in self.config.scales]
        level_SD = self.lvl_embed(torch.arange(len(lengths), device=self.pos_1LC.device))
        return self.pos_1LC + torch.cat([row.expand(n, -1) for row, n in zip(level_SD, lengths, strict=True)])

    def first_input(self, class_BD: Tensor, positions_1LD: Tensor) -> Tensor:
        """The coarsest scale's input: the class embedding, [B, l, D]."""
        start_1LD = self.pos_start + positions_1LD[:, : self.pos_start.shape[1]]
        return class_BD[:, None] + start_1LD

    def scale_slices(self) -> list[tuple[int, int]]:
        """Where each scale's codes begin and end in the sequence."""
        ends = list(accumulate(scale**2 for scale in self.config.scales))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def hidden(self, codes_BL: Tensor, labels_B: Tensor, conditioning_B: Tensor | None = None) -> Tensor:
        """The output layer's input, [B, L, D]: a code's position has seen the label and the coarser scales."""
        pyramid = self.require_pyramid()
        if codes_BL.shape[1] != self.sequence_length:
            raise ValueError(f"VAR takes {self.sequence_length} codes an image, not {codes_BL.shape[1]}")
        class_BD = self.condition(labels_B, conditioning_B)
        positions_1LD = self.positions()
        x_BLD = self.first_input(class_BD, positions_1LD)
        if len(self.config.scales) > 1:
            seen_BLZ = pyramid.teacher_input(codes_BL).to(self.word_embed.weight.dtype)
            finer_BLD = self.word_embed(seen_BLZ) + positions_1LD[:, x_BLD.shape[1] :]
            x_BLD = torch.cat([x_BLD, finer_BLD.to(x_BLD.dtype)], dim=1)
        x_BLD = x_BLD.to(autocast_dtype(x_BLD))
        x_BLD = self.run_blocks(self.blocks, x_BLD, self.shared_ada_lin(class_BD))
        return self.head_nm(x_BLD, class_BD)
