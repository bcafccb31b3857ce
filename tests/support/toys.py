"""A family and a tokenizer that exist in tests only: what is added to register a variant, in full.

Legend: B images, L codes per image, V vocabulary, D width, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cca_ds.alignment.losses import LossSpec
from cca_ds.likelihood import sequence_logp
from cca_ds.models.base import CodeModel, DrawCodes, Family
from cca_ds.models.layers import LambdaEmbedding
from cca_ds.vq.tokenizer import LearnedTokenizer, TokenizerSpec, checked_codes


@dataclass(frozen=True)
class ToyConfig:
    """Shape of a `ToyModel`; the defaults fit the digits' 64 codes."""

    n_layer: int = 1
    dim: int = 16
    num_classes: int = 10
    vocab_size: int = 17
    sequence_length: int = 64
    lambda_conditioning: bool = False


class ToyBlock(nn.Module):
    """One layer added to the stream."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.dim, config.dim)

    def forward(self, x_BLD: Tensor, shared: None = None) -> Tensor:
        return x_BLD + self.layer(x_BLD).relu()


class ToyModel(CodeModel):
    """p(code n | label, code n - 1, n), by a multi-layer perceptron."""

    family = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.classes = nn.Embedding(config.num_classes + 1, config.dim)
        self.previous = nn.Embedding(config.vocab_size + 1, config.dim)  # the last row: before the first code
        self.places = nn.Embedding(config.sequence_length, config.dim)
        if config.lambda_conditioning:
            self.lambda_embedding = LambdaEmbedding(config.dim)
        self.mlp = nn.ModuleList(ToyBlock(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.dim, config.vocab_size)

    def embed_class(self, labels_B: Tensor) -> Tensor:
        return self.classes(labels_B)

    def hidden(self, codes_BL: Tensor, labels_B: Tensor, log_lambda_B: Tensor | None = None) -> Tensor:
        before_BL = torch.nn.functional.pad(codes_BL[:, :-1], (1, 0), value=self.vocab_size)
        x_BLD = self.condition(labels_B, log_lambda_B)[:, None] + self.previous(before_BL)
        x_BLD = x_BLD + self.places(torch.arange(codes_BL.shape[1], device=codes_BL.device))
        return self.run_blocks(self.mlp, x_BLD, None)

    def read_out(self, hidden_BLD: Tensor, codes_BL: Tensor | None = None) -> Tensor:
        logits_BLV = self.head(hidden_BLD)
        return logits_BLV if codes_BL is None else sequence_logp(logits_BLV, codes_BL)


def sample_toy(
    model: ToyModel,
    labels_B: Tensor,
    scales: Sequence[float],
    uniforms_BL: Tensor,
    draw: DrawCodes,
    log_lambda_B: Tensor | None = None,
    cuda_graphs: bool = False,
) -> Tensor:
    """Two codes a step, the second in ignorance of the first: a step's guidance holds for both."""
    codes_BL = torch.zeros(uniforms_BL.shape, dtype=torch.int64, device=labels_B.device)
    null_B = torch.full_like(labels_B, model.null_class)
    for step, scale in enumerate(scales):
        cond_BLV = model.logits(codes_BL, labels_B, log_lambda_B)
        uncond_BLV = model.logits(codes_BL, null_B, log_lambda_B) if scale else None
        for place in (2 * step, 2 * step + 1):
            uncond_BV = None if uncond_BLV is None else uncond_BLV[:, place]
            codes_BL[:, place] = draw(cond_BLV[:, place], uncond_BV, scale, uniforms_BL[:, place])
    return codes_BL


def _build(config: ToyConfig, tokenizer: nn.Module | None) -> ToyModel:
    return ToyModel(config)


def _packed(config: ToyConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"epoch": 0, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}


TOY_FAMILY = Family(
    name="toy",
    title="Toy",
    program="https://example.org/toy",
    paper="0000.00000",
    config=ToyConfig,
    presets={"toy-s": {}, "toy-l": {"n_layer": 3}},
    build=_build,
    generate=sample_toy,
    guidance_steps=lambda config: config.sequence_length // 2,
    blocks="mlp",
    shortened=lambda config, blocks: {"n_layer": blocks},
    guidance_offset=10.0,
    guidance_name="the toy's weight",
    class_embedding="classes.weight",
    layouts={"toybox": _packed},
    pixel_shift=127.5,
    licence="cc0-1.0",
)


class ToyTokenizer(LearnedTokenizer):
    """Grey images of `side` pixels; each pixel becomes the nearest of `levels` learned values."""

    def __init__(self, levels: int = 17, side: int = 8) -> None:
        super().__init__()
        self.side, self.vocab_size = side, levels
        self.values = nn.Parameter(torch.linspace(-1, 1, levels))

    def sequence_length(self, image_size: int | None = None) -> int:
        return self.side**2

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW.flatten(1)[..., None] - self.values).abs().argmin(-1)

    def decode(self, codes_BL: Tensor) -> Tensor:
        return self.values[checked_codes(codes_BL, self.vocab_size)].view(-1, 1, self.side, self.side)


TOY_TOKENIZER = TokenizerSpec(name="toy-levels", build=ToyTokenizer, needs_weights=True, family="toy", image_mode="L")


def margin_loss(
    policy_pos: Tensor, policy_neg: Tensor, reference_pos: Tensor, reference_neg: Tensor, positive_mask: Tensor,
    beta: float, lambda_: float | Tensor, margin: float, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """max(0, margin - (r(x,c) - r(x,c'))): `margin` is the loss's own hyperparameter."""
    difference = beta * ((policy_pos - reference_pos) - (policy_neg - reference_neg))
    terms = (margin - difference).relu()
    return terms.sum() if reduction == "sum" else terms.mean()


TOY_LOSS = LossSpec("margin", margin_loss, initial_loss=lambda contrasted, lambda_: 1.0, options={"margin": 1.0})
