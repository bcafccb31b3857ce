"""Transformer blocks compiled by torch.compile, which fuses their element-wise work on a GPU.

Only a block's forward is compiled. ZeRO-3's hooks, which gather and release the block's weights, are around it, and so
is activation checkpointing.
"""

from functools import lru_cache

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


def resolve_compile(setting: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Whether blocks are compiled on a device, and why not where `auto` would.

    Args:
        setting: `model.compile`: true, false, or "auto", which compiles on a GPU where that works.

    Raises:
        ValueError: true, and the compiler does not work.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False, None
    problem = compiler_problem(device)
    if problem and setting is True:
        raise ValueError(f"model.compile=true: torch.compile does not work here ({problem}); set it to false")
    return problem is None, problem


@lru_cache(maxsize=4)
def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work on a device, in one line; None where it does. Takes seconds.

    It needs a C++ compiler, and on a GPU Triton and Python's headers.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler's tools raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
    return None
