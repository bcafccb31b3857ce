"""An exponential moving average of the policy's float32 weights, sharded over the ranks as ZeRO-3 shards them.

After every step: average = decay * average + (1 - decay) * weights. Rank r of W holds elements r * ceil(n / W) up to
the next rank's of each flattened parameter of n elements, whatever the ZeRO stage.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from torch import Tensor, nn

from cca_ds.checkpoints.run_weights import join_shards
from cca_ds.cluster.zero import full_shape, own_shard


class EMA:
    """The moving average of a module's trained parameters; starts at their values.

    Args:
        module: as `deepspeed.initialize` left it.
        decay: share of the average kept at a step.
        stage: of ZeRO.
    """

    def __init__(self, module: nn.Module, decay: float, stage: int):
        self.decay, self.stage = decay, stage
        self.rank, self.ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shards = {name: self._own_part(p).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step just done; below stage 3 collective."""
        for name, parameter in self.parameters.items():
            self.shards[name].lerp_(self._own_part(parameter), 1.0 - self.decay)

    def restore(self, shards: list[dict[str, Tensor]]) -> None:
        """Continue from the shards of all ranks of the run that saved them, on any number of ranks."""
        whole = join_shards(shards)
        for name, own in self.shards.items():
            own.copy_(own_shard(whole[name], self._shard_size(whole[name].numel()), self.rank))

    def _shard_size(self, elements: int) -> int:
        return -(-elements // self.ranks)

    def _own_part(self, parameter: nn.Parameter) -> Tensor:
        """This rank's elements, float32 [at most ceil(n / W)]; the last rank's may be fewer."""
        elements = full_shape(parameter).numel()
        size = self._shard_size(elements)
        if self.stage == 3:  # already cut so, and padded at the end
            own = safe_get_local_fp32_param(parameter).detach().flatten()
            return own[: max(0, min(size, elements - self.rank * size))]
        full = safe_get_full_fp32_param(parameter) if self.stage > 0 else None
        return own_shard((parameter if full is None else full).detach().float().flatten(), size, self.rank)
