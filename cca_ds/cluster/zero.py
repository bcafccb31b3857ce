"""How ZeRO shards a parameter over the ranks, and full weights that only rank 0 holds.

Letters: W ranks, n elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.nn.functional import pad

from cca_ds.models.base import list_of_blocks


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape, also where ZeRO-3 keeps a shard of it only."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_shard(flat: Tensor, size: int, rank: int) -> Tensor:
    """Elements rank * size to (rank + 1) * size - 1 of a flat tensor; fewer where it ends earlier."""
    return flat[rank * size : (rank + 1) * size]


def padded_shard(whole: Tensor, like: Tensor, rank: int) -> Tensor:
    """What ZeRO-3 keeps of a whole tensor on a rank: an equal share of it, filled up with zeros.

    Args:
        like: the rank's present shard, whose size, shape and device the result takes.
    """
    part = own_shard(whole.flatten(), like.numel(), rank)
    return pad(part, (0, like.numel() - part.numel())).view_as(like).to(like.device)


def broadcast_weight(
    weights: Mapping[str, Tensor] | None, name: str, shape: torch.Size, device: torch.device
) -> Tensor:
    """A full float32 weight on every rank, from rank 0's state dict; collective.

    Args:
        weights: full state dict on rank 0; ignored on other ranks, None there.
    """
    if deepspeed.comm.get_rank() == 0:
        assert weights is not None
        full = weights[name].to(device, torch.float32)
    else:
        full = torch.empty(shape, dtype=torch.float32, device=device)
    if deepspeed.comm.get_world_size() > 1:
        deepspeed.comm.broadcast(full, 0)
    return full


def gather_whole_blocks(module: nn.Module) -> None:
    """Let ZeRO-3 gather a transformer block's weights in one exchange and release them together.

    Otherwise it does both for every layer, by Python hooks that take a GPU's time for a small layer.
    """
    _, blocks = list_of_blocks(module)
    set_z3_leaf_modules(module, list({type(block) for block in blocks}))


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Mapping[str, Tensor] | None, device: torch.device) -> None:
    """Fill the parameters of a whole or sharded module from rank 0's state dict, one at a time; collective."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_shape"):  # gathered, changed on rank 0, and scattered again
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if deepspeed.comm.get_rank() == 0:
                    assert weights is not None
                    parameter.copy_(weights[name])
        else:
            parameter.copy_(broadcast_weight(weights, name, parameter.shape, device))
