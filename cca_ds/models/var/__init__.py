"""VAR (arXiv 2404.02905): the family's record."""

from typing import Any

import torch
from torch import Tensor, nn

from cca_ds.models.base import Family
from cca_ds.models.registry import FAMILIES
from cca_ds.models.var import cost
from cca_ds.models.var.decode import sample_next_scale
from cca_ds.models.var.model import SCALES_512, VAR, VARConfig
from cca_ds.models.weight_files import KINDS, WeightsKind

PRESETS = {
    **{f"var-d{depth}": {"depth": depth} for depth in (16, 20, 24, 30)},
    "var-d36": {"depth": 36, "shared_aln": True, "scales": SCALES_512},
}
_CLASSES = "class_emb.weight"


def _build(config: VARConfig, tokenizer: nn.Module | None) -> VAR:
    """A VAR with random weights, which holds the tokenizer's codebook frozen where one is given."""
    return VAR(config, tokenizer=tokenizer)


def _shortened(config: VARConfig, blocks: int) -> dict[str, Any]:
    """Width, heads and stochastic depth follow the depth unless given, so they are given."""
    return {"depth": blocks, "width": config.dim, "heads": config.n_head, "drop_path": config.drop_path_rate}


def _published(config: VARConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The content of VAR's `.pth`: the tensors and the two masks that the program's strict loading requires."""
    return {**tensors, **masks(config.scales)}


def masks(scales: tuple[int, ...]) -> dict[str, Tensor]:
    """VAR's two computed tensors: the scale of each position, [1, L] int64, and the block-causal bias, [1, 1, L, L].

    The bias is 0 where a position may attend and -inf where the other one is of a finer scale.
    """
    level_L = torch.cat([torch.full((side * side,), level) for level, side in enumerate(scales)])
    hidden_LL = level_L[:, None] < level_L[None, :]
    bias_LL = torch.zeros(hidden_LL.shape).masked_fill(hidden_LL, -torch.inf)
    return {"lvl_1L": level_L[None], "attn_bias_for_masking": bias_LL[None, None]}


FAMILY = FAMILIES.register(
    Family(
        name=VAR.family,
        title="VAR",
        program="https://github.com/FoundationVision/VAR",
        paper="2404.02905",
        config=VARConfig,
        presets=PRESETS,
        build=_build,
        generate=sample_next_scale,
        guidance_steps=lambda config: len(config.scales),
        blocks="blocks",
        shortened=_shortened,
        guidance_offset=0.0,
        guidance_name="VAR's cfg",
        class_embedding=_CLASSES,
        activation_elements=cost.activation_elements,
        dropout_bytes=cost.dropout_bytes,
        element_wise_bytes=cost.element_wise_bytes,
        per_image_modules=cost.PER_IMAGE_MODULES,
        layouts={VAR.family: _published},
        weights=KINDS.register(
            WeightsKind(
                name="a VAR transformer",
                marker="word_embed.weight",
                computed=frozenset({"lvl_1L", "attn_bias_for_masking"}),
                sizes={
                    "pos_1LC": (1, "codes an image"),
                    "head.weight": (0, "codes in the vocabulary"),
                    _CLASSES: (0, "classes, the null class among them"),
                },
            )
        ),
        pixel_shift=127.5,  # cut off: 255 (x + 1) / 2
        needs_tokenizer=True,
        tokenizer_hint="vae_ch160v4096z32.pth",
        hub="FoundationVision/var",
        hub_files=r"var_d(16|20|24|30|36)\.pth",
    )
)
