"""Parameters and floating-point operations of the published models, from their shapes alone.

Letters: L codes an image, V vocabulary, D width, F hidden width of the feed-forward, H heads.
"""

import difflib
from dataclasses import dataclass
from typing import Any

LLAMAGEN_SHAPES = {
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
VAR_SHAPES = {f"var-d{depth}": {"depth": depth} for depth in (16, 20, 24, 30)}
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LAMBDA_FREQUENCIES = 128


@dataclass(frozen=True)
class Architecture:
    """What planning needs to know of a model.

    `token_weights` are the matrix elements that every code passes through, `image_weights` those that an
    image passes through once (VAR's adaptive norms); `block_token_elements` are the activations that one
    block keeps for its backward, in elements a code, `block_dropout_bytes` the bytes of dropout masks a code.
    """

    name: str
    layers: int
    width: int
    vocabulary: int
    codes: int
    parameters: int
    token_weights: int
    image_weights: int
    block_token_elements: int
    block_dropout_bytes: int

    def forward_flops(self) -> float:
        """Operations of one image's forward: 2 a weight, and attention over all L^2 pairs (as PaLM
        counts)."""
        matrices = 2 * (self.token_weights * self.codes + self.image_weights)
        attention = 4 * self.codes**2 * self.width * self.layers
        return float(matrices + attention)


def architecture_of(
    preset: str, overrides: dict[str, Any] | None = None, dropout: bool = True
) -> Architecture:
    """The architecture of a preset with some of its config's fields replaced, as a recipe names them.

    Without `dropout` none is kept for the backward.

    Raises:
        ValueError: for an unknown preset, with the nearest one.
    """
    overrides = (overrides or {}) | ({} if dropout else {"resid_dropout": 0.0, "ffn_dropout": 0.0})
    if preset in LLAMAGEN_SHAPES:
        return _llamagen(preset, **(LLAMAGEN_SHAPES[preset] | overrides))
    if preset in VAR_SHAPES:
        return _var(preset, **(VAR_SHAPES[preset] | overrides))
    known = [*LLAMAGEN_SHAPES, *VAR_SHAPES]
    near = difflib.get_close_matches(preset, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"model.preset={preset}: no such model; did you mean {near}?")


def _llamagen(
    name: str,
    n_layer: int,
    n_head: int,
    dim: int,
    vocab_size: int = 16384,
    sequence_length: int = 576,
    num_classes: int = 1000,
    multiple_of: int = 256,
    lambda_conditioning: bool = False,
    resid_dropout: float = 0.1,
    ffn_dropout: float = 0.1,
    **_: Any,
) -> Architecture:
    """Untied embeddings and head, RMS norms, four D x D matrices and three D x F a block, no biases."""
    hidden = -(-int(8 * dim / 3) // multiple_of) * multiple_of
    block = 4 * dim**2 + 3 * dim * hidden
    embeddings = (num_classes + 1 + vocab_size) * dim
    conditioning = (2 * LAMBDA_FREQUENCIES + 1) * dim + (dim + 1) * dim if lambda_conditioning else 0
    return Architecture(
        name=name,
        layers=n_layer,
        width=dim,
        vocabulary=vocab_size,
        codes=sequence_length,
        parameters=embeddings + conditioning + n_layer * (block + 2 * dim) + dim + vocab_size * dim,
        token_weights=n_layer * block + vocab_size * dim,
        image_weights=0,
        # Stream before each half 2 D, norms 2 D, queries-keys-values 3 D, turned queries and keys 2 D,
        # attention's result D, gate, value and their product 3 F.
        block_token_elements=10 * dim + 3 * hidden,
        block_dropout_bytes=dim * ((resid_dropout > 0) + (ffn_dropout > 0)),
    )


def _var(
    name: str,
    depth: int,
    num_classes: int = 1000,
    vocab_size: int = 4096,
    scales: tuple[int, ...] = SCALES_256,
    shared_aln: bool = False,
    width: int | None = None,
    heads: int | None = None,
    code_channels: int = 32,
    mlp_ratio: float = 4.0,
    lambda_conditioning: bool = False,
    **_: Any,
) -> Architecture:
    """Width 64 and one head a unit of depth, a feed-forward of 4 D, six D x D of adaptive norm a block."""
    width = width or 64 * depth
    hidden, codes = round(mlp_ratio * width), sum(side**2 for side in scales)
    matrices = depth * (4 * width**2 + 2 * width * hidden)
    # Queries', values' and projection's biases, those of the feed-forward, one learned scale a head.
    biases = 4 * width + hidden + (heads or max(1, width // 64))
    norms_block = 6 * width if shared_aln else 6 * width**2 + 6 * width
    norms = depth * norms_block + (6 * width**2 + 6 * width if shared_aln else 0) + 2 * width**2 + 2 * width
    rows = scales[0] ** 2 + codes + num_classes + 1 + len(scales) + code_channels + 1
    conditioning = (2 * LAMBDA_FREQUENCIES + 1) * width + (width + 1) * width if lambda_conditioning else 0
    head = (width + 1) * vocab_size
    return Architecture(
        name=name,
        layers=depth,
        width=width,
        vocabulary=vocab_size,
        codes=codes,
        parameters=rows * width + conditioning + matrices + depth * biases + norms + head,
        token_weights=matrices + vocab_size * width + code_channels * width,
        image_weights=norms,
        # Stream 2 D, norms and modulated norms 4 D, branches before their gate 2 D, queries-keys-values and
        # their normalised twins 6 D, attention's result D, feed-forward before and after GELU.
        block_token_elements=15 * width + 2 * hidden,
        block_dropout_bytes=0,
    )
