"""What VAR's modules do not show of its cost: the activations that a block keeps for its backward."""

from cca_ds.models.var.model import VARConfig

# name parts of parameters that each image uses once, not each code: the adaptive layer norms'
PER_IMAGE_MODULES = ("ada_lin", "ada_gss", "lambda_embedding", "t_embedder")


def activation_elements(config: VARConfig) -> int:
    """Elements for each code that one block keeps for its backward.

    D is the width and F the feed-forward's hidden width: the input of each half 2 D, layer norms before and after
    their modulation 4 D, both branches before their gate 2 D, queries, keys and values before and after their
    normalisation 6 D, attention's output D; the feed-forward before and after its GELU 2 F.
    """
    return 15 * config.dim + 2 * round(config.dim * config.mlp_ratio)


def dropout_bytes(config: VARConfig) -> int:
    """Bytes for each code of dropout masks: none, as stochastic depth draws one number an image."""
    return 0


def element_wise_bytes(config: VARConfig, compiled: bool) -> tuple[float, float]:
    """Bytes for each code that one block's element-wise operations move in 16 bits, (forward, backward).

    D is the width and F the feed-forward's hidden width. `tests/models/test_traffic.py` counts them on the module at
    the published scales. Op by op, the backward of the normalised queries and keys moves most, in float32.
    """
    width, hidden = config.dim, round(config.dim * config.mlp_ratio)
    if compiled:
        return 58.5 * width + 4 * hidden, 106 * width + 8 * hidden
    return 61 * width + 4 * hidden, 324 * width + 8 * hidden
