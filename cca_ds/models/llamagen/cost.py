"""What LlamaGen's modules do not show of its cost: the activations that a block keeps for its backward."""

from cca_ds.models.llamagen.model import LlamaGenConfig

# name parts of parameters that each image uses once, not each code
PER_IMAGE_MODULES = ("lambda_embedding", "t_embedder")


def activation_elements(config: LlamaGenConfig) -> int:
    """Elements for each code that one block keeps for its backward, dropout masks apart.

    D is the width and F the feed-forward's hidden width: the input of each half 2 D, the norms' outputs 2 D, queries,
    keys and values 3 D, queries and keys after rope 2 D, attention's output D; gate, value and their product 3 F.
    """
    return 10 * config.dim + 3 * config.hidden_dim


def dropout_bytes(config: LlamaGenConfig) -> int:
    """Bytes for each code of the dropout masks that one block keeps: one byte an element, after attention and after
    the feed-forward.
    """
    return config.dim * ((config.resid_dropout > 0) + (config.ffn_dropout > 0))


def element_wise_bytes(config: LlamaGenConfig, compiled: bool) -> tuple[float, float]:
    """Bytes for each code that one block's element-wise operations move in 16 bits, (forward, backward).

    D is the width and F the feed-forward's hidden width; with dropout, whose masks are bytes. `tests/models/
    test_traffic.py` counts them on the module. Op by op, rope alone moves 96 D forward and 108 D backward, since it
    computes in float32. Compiled, the forward is: a norm 4 D; rope with the split of q, k and v 14 D; dropout, residual
    and norm 11 D; SwiGLU 6 F; dropout and residual 11 D.
    """
    width, hidden = config.dim, config.hidden_dim
    if compiled:
        return 40 * width + 6 * hidden, 62 * width + 10 * hidden
    return 144 * width + 10 * hidden, 190 * width + 18 * hidden
