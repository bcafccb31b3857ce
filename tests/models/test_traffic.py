"""The element-wise bytes of a block: what the families' cost states, counted on the real modules.

A change that adds traffic to a block fails here. Counted per code, in units of the width, so that small blocks do.
"""

import pytest
import torch

from cca_ds.models import create_model
from cca_ds.models.base import list_of_blocks
from cca_ds.models.llamagen import cost as llamagen_cost
from cca_ds.models.llamagen.model import LlamaGenConfig
from cca_ds.models.var import cost as var_cost
from cca_ds.models.var.model import VARConfig
from tests.support.traffic import compiled_bytes, eager_bytes

IMAGES = 4
SHAPES = {
    "llamagen": LlamaGenConfig(n_layer=2, n_head=2, dim=128, multiple_of=512, sequence_length=64),
    "llamagen, wider feed-forward": LlamaGenConfig(n_layer=2, n_head=4, dim=256, multiple_of=1024, sequence_length=64),
    "var": VARConfig(depth=2, width=128, heads=2),
    "var, narrower feed-forward": VARConfig(depth=2, width=256, heads=4, mlp_ratio=2.0),
}


def counted(config, count, device):
    """(forward, backward) bytes a code of the second block in bf16, as `count` has them."""
    with torch.device(device):
        model = create_model(config).to(torch.bfloat16).train()
        shape, bf16 = (IMAGES, config.sequence_length, config.dim), torch.bfloat16
        x = torch.zeros(shape, dtype=bf16, requires_grad=True)
        if model.family == "llamagen":
            shared = torch.zeros(config.sequence_length, config.head_dim // 2, 2)
        else:
            shared = torch.zeros(IMAGES, config.dim, dtype=bf16, requires_grad=True)
    block = list_of_blocks(model)[1][1]
    return [total / (IMAGES * config.sequence_length) for total in count(block, x, shared)]


def stated(config, compiled):
    cost = llamagen_cost if isinstance(config, LlamaGenConfig) else var_cost
    return cost.element_wise_bytes(config, compiled)


@pytest.mark.parametrize("shape", SHAPES)
def test_of_every_op_by_itself(shape):
    """The rotary table and what is computed once an image are not stated: 1%."""
    assert counted(SHAPES[shape], eager_bytes, "meta") == pytest.approx(stated(SHAPES[shape], False), rel=0.01)


@pytest.mark.parametrize("shape", [pytest.param(s, marks=pytest.mark.slow) if ", " in s else s for s in SHAPES])
def test_of_compiled_blocks(shape):
    """By the compiler's own account: 2%."""
    found = counted(SHAPES[shape], lambda block, *inputs: compiled_bytes(block.forward, *inputs), "cpu")
    assert found == pytest.approx(stated(SHAPES[shape], True), rel=0.02)


def test_compiling_saves_most_of_llamagens_traffic():
    config = SHAPES["llamagen"]
    assert sum(stated(config, True)) < 0.45 * sum(stated(config, False))


def test_traffic_that_is_added_shows():
    """One more pass over the stream, which the counter must see."""
    config = SHAPES["llamagen"]

    def more(block, x, shared):
        return eager_bytes(lambda x, shared: block(x, shared) * 2.0, x, shared)

    forward, backward = counted(config, eager_bytes, "meta")
    assert counted(config, more, "meta") == [forward + 4 * config.dim, backward + 4 * config.dim]
