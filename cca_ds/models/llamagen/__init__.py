"""LlamaGen (arXiv 2406.06525): the family's record."""

from typing import Any

from torch import Tensor, nn

from cca_ds.models.base import Family
from cca_ds.models.llamagen import cost
from cca_ds.models.llamagen.decode import sample_raster
from cca_ds.models.llamagen.model import LlamaGen, LlamaGenConfig
from cca_ds.models.registry import FAMILIES
from cca_ds.models.weight_files import KINDS, WeightsKind

PRESETS = {
    "llamagen-b": {"n_layer": 12, "n_head": 12, "dim": 768},
    "llamagen-l": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "llamagen-xl": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "llamagen-xxl": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "llamagen-3b": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "digits": {
        "n_layer": 4,
        "n_head": 4,
        "dim": 128,
        "vocab_size": 17,
        "sequence_length": 64,
        "num_classes": 10,
        "multiple_of": 32,
    },
}
_PUBLISHED_FLAT = [PRESETS["llamagen-xxl"], PRESETS["llamagen-3b"]]
_CLASSES = "cls_embedding.embedding_table.weight"


def _build(config: LlamaGenConfig, tokenizer: nn.Module | None) -> LlamaGen:
    """A LlamaGen with random weights; it needs no tokenizer."""
    return LlamaGen(config)


def _published(config: LlamaGenConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The content of LlamaGen's `.pt`: the tensors under "model", but flat for XXL and 3B, as its program has them."""
    flat = any((config.n_layer, config.dim) == (shape["n_layer"], shape["dim"]) for shape in _PUBLISHED_FLAT)
    return tensors if flat else {"model": tensors}


def _sequence_length(state: dict[str, Tensor]) -> int | None:
    """Codes an image of a file's tensors: the rotary table, where present, has a row for each and the class token."""
    return len(state["freqs_cis"]) - 1 if "freqs_cis" in state else None


FAMILY = FAMILIES.register(
    Family(
        name=LlamaGen.family,
        title="LlamaGen",
        program="https://github.com/FoundationVision/LlamaGen",
        paper="2406.06525",
        config=LlamaGenConfig,
        presets=PRESETS,
        build=_build,
        generate=sample_raster,
        guidance_steps=lambda config: config.sequence_length,
        blocks="layers",
        shortened=lambda config, blocks: {"n_layer": blocks},
        guidance_offset=1.0,  # logits = u + g (c - u) with g = s + 1
        guidance_name="LlamaGen's cfg-scale",
        class_embedding=_CLASSES,
        activation_elements=cost.activation_elements,
        dropout_bytes=cost.dropout_bytes,
        element_wise_bytes=cost.element_wise_bytes,
        per_image_modules=cost.PER_IMAGE_MODULES,
        layouts={LlamaGen.family: _published},
        weights=KINDS.register(
            WeightsKind(
                name="a LlamaGen transformer",
                marker="tok_embeddings.weight",
                computed=frozenset({"freqs_cis"}),
                sizes={
                    "tok_embeddings.weight": (0, "codes in the vocabulary"),
                    _CLASSES: (0, "classes, the null class among them"),
                },
                sequence_length=_sequence_length,
            )
        ),
        tokenizer_hint="vq_ds16_c2i.pt",
        hub="FoundationVision/LlamaGen",
        hub_files=r"c2i_(B|L|XL|XXL|3B)_(256|384)\.pt",
        pixel_shift=128.0,  # rounded: 127.5 x + 128, cut off
    )
)
