"""LlamaGen's class-conditional transformer (arXiv 2406.06525; `autoregressive/models/gpt.py` of its program).

A class token is followed by the codes of a square image in raster order; the output at position n gives the
distribution of code n. Parameter names and shapes are the published ones.

Legend: B images, L codes per image, V vocabulary, D width, H heads, C channels of a head, P = C / 2 pairs of channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cca_ds.likelihood import LikelihoodHead
from cca_ds.models.base import CodeModel
from cca_ds.models.layers import DropPath, Embedding, Linear, RMSNorm, SwiGLULinear
from cca_ds.ops.attention import causal_attention, rope_qkv
from cca_ds.ops.rope import rotary_table


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shape and dropouts of a LlamaGen; the defaults are the published models' at 384 px (576 codes)."""

    n_layer: int
    n_head: int
    dim: int
    vocab_size: int = 16384
    sequence_length: int = 576
    num_classes: int = 1000
    multiple_of: int = 256  # the feed-forward's hidden width, 8/3 of `dim`, is rounded up to a multiple of it
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    token_dropout: float = 0.1
    attention_dropout: float = 0.0
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1
    drop_path: float = 0.0  # of the last layer, growing linearly from 0 at the first
    lambda_conditioning: bool = False
    gft_conditioning: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "dim", "vocab_size", "sequence_length", "num_classes", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"LlamaGen: {name}={getattr(self, name)} must be at least 1")
        if self.dim % (4 * self.n_head):
            raise ValueError(f"LlamaGen: dim={self.dim} must be a multiple of 4 * n_head = {4 * self.n_head}")
        if self.grid_size**2 != self.sequence_length:
            raise ValueError(
                f"LlamaGen: sequence_length={self.sequence_length} must be a square number (576 = 24 x 24)"
            )
        for name in ("token_dropout", "attention_dropout", "resid_dropout", "ffn_dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"LlamaGen: {name}={getattr(self, name)} must be in [0, 1)")

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return round(self.sequence_length**0.5)

    @property
    def head_dim(self) -> int:
        """Channels of a head, C."""
        return self.dim // self.n_head

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward: 8/3 of `dim`, rounded up."""
        return -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of


class _ClassEmbedding(nn.Module):
    """One row per class and one for the null class, which exists whatever the dropout of labels."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = Embedding(config.num_classes + 1, config.dim, config.initializer_range)

    def forward(self, labels_B: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return self.embedding_table(labels_B)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = Linear(config.dim, 3 * config.dim, std=config.initializer_range)
        self.wo = Linear(config.dim, config.dim, std=config.initializer_range)
        self.dropout = config.attention_dropout
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def qkv(self, x_BLD: Tensor, table_LP2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, H, L, C]: what a decoding step attends with and caches."""
        return rope_qkv(self.wqkv(x_BLD), table_LP2, self.n_head)

    def forward(self, x_BLD: Tensor, table_LP2: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        dropout = self.dropout if self.training else 0.0
        mixed_BLD = causal_attention(self.wqkv(x_BLD), table_LP2, self.n_head, dropout)
        return self.resid_dropout(self.wo(mixed_BLD))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.w1 = Linear(config.dim, config.hidden_dim, std=std)
        self.w3 = Linear(config.dim, config.hidden_dim, std=std)
        self.w2 = SwiGLULinear(config.hidden_dim, config.dim, std=std)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.ffn_dropout(self.w2(self.w1(x_BLD), self.w3(x_BLD)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: LlamaGenConfig, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BLD: Tensor, table_LP2: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x_BLD = x_BLD + self.drop_path(self.attention(self.attention_norm(x_BLD), table_LP2))
        return x_BLD + self.drop_path(self.feed_forward(self.ffn_norm(x_BLD)))


class ZeroHead(LikelihoodHead):
    """The output layer, which starts at 0: every code equally likely."""

    def reset_parameters(self) -> None:
        """Start at 0."""
        nn.init.zeros_(self.weight)


class LlamaGen(CodeModel):
    """Codes in raster order behind a class token; see `CodeModel`."""

    family = "llamagen"

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        std = config.initializer_range
        self.cls_embedding = _ClassEmbedding(config)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, std)
        self.add_conditioning()
        self.tok_dropout = nn.Dropout(config.token_dropout)
        rates = [config.drop_path * layer / max(config.n_layer - 1, 1) for layer in range(config.n_layer)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = ZeroHead(config.dim, config.vocab_size, bias=False)
        self.register_buffer("freqs_cis", self._table(), persistent=False)

    def embed_class(self, labels_B: Tensor) -> Tensor:
        """The class token, [B] -> [B, D]."""
        return self.cls_embedding(labels_B)

    def read_out(self, hidden_BLD: Tensor, codes_BL: Tensor | None = None, *mixed: Tensor) -> Tensor:
        """Logits [B, L, V], or with codes their log-likelihoods [B]."""
        return self.output(hidden_BLD, codes_BL, *mixed)

    def _table(self) -> Tensor:
        return rotary_table(self.config.grid_size, self.config.head_dim, self.config.rope_base)

    def rotary(self, device: torch.device) -> Tensor:
        """The rotary table on `device` in float32; computed again where the buffer was cast or moved."""
        if self.freqs_cis.dtype != torch.float32 or self.freqs_cis.device != device:
            with torch.inference_mode(False):
                self.freqs_cis = self._table().to(device)
        return self.freqs_cis

    def _apply(self, fn, recurse: bool = True) -> "LlamaGen":
        super()._apply(fn, recurse)
        self.freqs_cis = self._table().to(self.freqs_cis.device)  # the cast or `to_empty` changed it
        return self

    def hidden(self, codes_BL: Tensor, labels_B: Tensor, conditioning_B: Tensor | None = None) -> Tensor:
        """The output layer's input, [B, L, D]: position n has seen the label and the codes before n."""
        class_B1D = self.condition(labels_B, conditioning_B).unsqueeze(1)
        x_BLD = torch.cat([class_B1D, self.tok_embeddings(codes_BL[:, :-1].long())], dim=1)
        x_BLD = self.tok_dropout(x_BLD)
        table_LP2 = self.rotary(x_BLD.device)[: x_BLD.shape[1]]
        return self.norm(self.run_blocks(self.layers, x_BLD, table_LP2))
