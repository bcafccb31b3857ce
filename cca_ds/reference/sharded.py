"""The reference sharded over the ranks by ZeRO-3, without an optimizer."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from cca_ds.cluster.zero import copy_weights, gather_whole_blocks
from cca_ds.config import schema
from cca_ds.data.batches import MicroBatch
from cca_ds.models.from_recipe import build_module
from cca_ds.reference.interface import Reference
from cca_ds.reference.replica import freeze, reference_model


class ShardedReference(Reference):
    """log p_reference from a ZeRO-3 engine; shards stay in host memory with `reference.offload`.

    Its forwards are collective, like the policy's. Arguments as in `ReplicaReference`.
    """

    def __init__(self, model: schema.Model, reference: schema.Reference, weights: dict[str, Tensor] | None,
                 precision: str, device: torch.device, tokenizer: nn.Module | None = None):  # fmt: skip
        config = _ds_config(precision, reference.offload)
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = build_module(reference_model(model, reference.dropout), tokenizer)
        copy_weights(module, weights, device)
        freeze(module, reference.dropout)
        gather_whole_blocks(module)
        self.engine, *_ = deepspeed.initialize(model=module, config=config)
        freeze(self.engine.module, reference.dropout)

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """See `interface.Reference`."""
        return self.engine(*inputs[:2])


def _ds_config(precision: str, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
