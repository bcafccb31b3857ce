"""Transformer blocks compiled by torch.compile, which fuses their element-wise work on a GPU.

Only a block's forward is compiled. ZeRO-3's hooks, which gather and release the block's weights, are around it, and so
is activation checkpointing.
"""

import torch
from torch import nn

from cca_ds.models.base import list_of_blocks

# graphs of one block: its blocks share them, but policy, reference and measurement differ in mode and shapes
_GRAPHS = 64


def compile_blocks(module: nn.Module) -> None:
    """Compile the forward of every transformer block; one that does not compile whole is an error at its first call.

    The blocks of a model share their graphs: one, and one more where the first block has no stochastic depth.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for block in list_of_blocks(module)[1]:
        block.forward = torch.compile(block.forward, fullgraph=True)
