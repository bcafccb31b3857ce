"""The frozen reference, in one interface and four placements: `reference(batch, inputs) -> log p`.

Letters: B rows of a forward ([chosen, rejected] stacked), L codes per image.

    inference   a replica on every rank (or split over some) in a DeepSpeed inference engine
    zero3       sharded over all ranks by DeepSpeed at stage 3 without an optimizer, offloaded if wanted
    cached      no model at all: log-likelihoods computed ahead (`reference_cache.py`)
    streamed    no model here: other nodes compute them while training runs (`reference_cache.py`)
"""

from __future__ import annotations

from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import MicroBatch
from cca_ds.models import DTYPES
from cca_ds.models.from_recipe import build_module
from cca_ds.reference.tensor_parallel import Group, log_likelihoods, split_module
from cca_ds.training.policy import copy_weights


class Reference(Protocol):
    """log p_reference of a forward's rows."""

    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """[B] float32 without gradient; `inputs` are the policy's: codes [B, L] and labels [B]."""
        ...


def reference_recipe(run: RunConfig) -> RunConfig:
    """The recipe as the reference sees it: no embedding of lambda, no recomputation, dropout only if asked for."""
    model = run.model.model_copy(
        update={
            "lambda_conditioning": False,
            "activation_checkpointing": False,
            "dropout": run.reference.dropout and run.model.dropout,
        }
    )
    return run.model_copy(update={"model": model})


class InferenceReference:
    """A replica in `deepspeed.init_inference`.

    The engine leaves a module trainable and in training mode and casts it to fp16 unless told otherwise: it is
    told the dtype, and frozen here. With `tensor_parallel` above 1, that many neighbouring ranks share a replica.
    """

    def __init__(
        self,
        run: RunConfig,
        weights: dict[str, Tensor],
        precision: str,
        tokenizer: nn.Module | None = None,
        tensor_parallel: int = 1,
    ):
        module = build_module(reference_recipe(run), tokenizer)
        copy_weights(module, weights)
        self.group = Group(tensor_parallel) if tensor_parallel > 1 else None
        if self.group is not None:
            split_module(module, self.group)
        freeze(module, run.reference.dropout)
        self.engine = deepspeed.init_inference(
            module, dtype=DTYPES[precision], replace_with_kernel_inject=False
        )
        freeze(self.engine.module, run.reference.dropout)

    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """See `Reference`."""
        return self.log_likelihoods(*inputs[:2])

    @torch.no_grad()
    def log_likelihoods(self, codes_BL: Tensor, labels_B: Tensor) -> Tensor:
        """log p [B] float32 of codes [B, L] under labels [B]."""
        if self.group is not None:
            return log_likelihoods(self.engine, self.group, codes_BL, labels_B)
        return self.engine(codes_BL, labels_B)


class ZeroReference:
    """Sharded over all ranks at ZeRO stage 3 with no optimizer; parameters wait on the CPU if `offload`.

    Its forwards are collective, like the policy's.
    """

    def __init__(
        self,
        run: RunConfig,
        weights: dict[str, Tensor] | None,
        precision: str,
        tokenizer: nn.Module | None = None,
    ):
        config = self._config(run, precision)
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = build_module(reference_recipe(run), tokenizer)
        copy_weights(module, weights)
        freeze(module, run.reference.dropout)
        self.engine, *_ = deepspeed.initialize(model=module, config=config)
        freeze(self.engine.module, run.reference.dropout)

    @staticmethod
    def _config(run: RunConfig, precision: str) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
        if run.reference.offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        }

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """See `Reference`."""
        return self.engine(*inputs[:2])


def freeze(module: nn.Module, dropout: bool) -> None:
    """No gradient; in evaluation mode, or in training mode for the public program's dropout."""
    module.requires_grad_(False)
    module.train(dropout)
