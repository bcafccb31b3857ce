"""A LlamaGen split over P ranks for inference: each holds some heads and some of the feed-forward's hidden units.

DeepSpeed's own injection (`init_inference(tensor_parallel=...)`) replaces plain linear layers of one group of ranks;
LlamaGen's fused queries, keys and values and its gated feed-forward are not such, and a cluster has many groups.

Letters: P ranks of a group, B rows of a forward, L codes per image, D width, H heads, C channels of a head.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cca_ds.models.llamagen.model import Attention, FeedForward


class Group:
    """This rank's P neighbours, who hold the parts of one model. Collective over all ranks.

    Raises:
        ValueError: P does not divide the world's size.
    """

    def __init__(self, size: int):
        world = dist.get_world_size()
        if world % size:
            raise ValueError(
                f"reference.tensor_parallel={size} does not divide the {world} ranks of this run"
            )
        self.size, self.rank = size, dist.get_rank() % size
        for first in range(0, world, size):  # every rank has to make every group
            group = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                self.group = group

    def sum(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: the sum of all ranks' partial outputs."""
        output = output.contiguous()
        dist.all_reduce(output, group=self.group)
        return output

    def gather(self, rows: Tensor, most: int) -> Tensor:
        """[P * most, ...]: every rank's rows, in rank order, filled up with zeros to `most` each."""
        filled = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        filled[: len(rows)] = rows
        parts = [torch.empty_like(filled) for _ in range(self.size)]
        dist.all_gather(parts, filled, group=self.group)
        return torch.cat(parts)

    def most(self, count: int, device: torch.device) -> int:
        """The largest `count` of any rank."""
        largest = torch.tensor(count, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)


def split_module(module: nn.Module, group: Group) -> None:
    """Keep this rank's part of every block of a LlamaGen; embeddings, norms and head stay whole.

    Raises:
        ValueError: another family, or heads or hidden units that P does not divide.
    """
    if getattr(module, "family", None) != "llamagen":
        raise ValueError(f"reference.tensor_parallel={group.size} splits LlamaGen only, not {module.family}")
    heads, hidden = module.config.n_head, module.config.hidden_dim
    if heads % group.size or hidden % group.size:
        raise ValueError(
            f"reference.tensor_parallel={group.size} does not divide the model's {heads} heads and {hidden} hidden "
            "units; take a divisor of both"
        )
    for part in list(module.modules()):
        if isinstance(part, Attention):
            _split_attention(part, group)
        elif isinstance(part, FeedForward):
            for linear in (part.w1, part.w3):
                _keep(linear, linear.weight.chunk(group.size)[group.rank])
            _keep(part.w2, part.w2.weight.chunk(group.size, dim=1)[group.rank])
            part.w2.register_forward_hook(group.sum)


def log_likelihoods(engine: nn.Module, group: Group, codes_BL: Tensor, labels_B: Tensor) -> Tensor:
    """log p [B] float32 of this rank's rows; all ranks of the group forward the rows of all."""
    rows = len(codes_BL)
    most = group.most(rows, codes_BL.device)
    everyone = engine(group.gather(codes_BL, most), group.gather(labels_B, most))
    return everyone[group.rank * most :][:rows]


def _split_attention(attention: Attention, group: Group) -> None:
    channels = attention.head_dim
    wqkv_3HCD = attention.wqkv.weight.unflatten(0, (3, attention.n_head, channels))
    _keep(attention.wqkv, wqkv_3HCD.chunk(group.size, dim=1)[group.rank].flatten(0, 2))
    _keep(attention.wo, attention.wo.weight.chunk(group.size, dim=1)[group.rank])
    attention.wo.register_forward_hook(group.sum)
    attention.n_head //= group.size


def _keep(linear: nn.Linear, weight: Tensor) -> None:
    assert linear.bias is None  # a bias would be added by every rank
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
