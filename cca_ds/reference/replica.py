"""A replica of the reference on every rank, in a DeepSpeed inference engine."""

from __future__ import annotations

import deepspeed
import torch
from torch import Tensor, nn

from cca_ds.cluster.zero import broadcast_weight
from cca_ds.config import schema
from cca_ds.data.batches import MicroBatch
from cca_ds.models import DTYPES
from cca_ds.models.conditioning import CONDITIONINGS
from cca_ds.models.from_recipe import build_module
from cca_ds.reference.interface import DrawingReference
from cca_ds.sampling import generate

MOST_PAIRS_A_STEP = 2**24  # batch.global_size is below: images of two steps never share a stream of random numbers


def reference_model(model: schema.Model, dropout: bool) -> schema.Model:
    """The `model` section as the reference uses it: not conditioned, no recomputation, dropout only if asked."""
    changed = {"activation_checkpointing": False, "dropout": dropout and model.dropout}
    return model.model_copy(update=changed | {kind.switch: False for kind in CONDITIONINGS})


def freeze(module: nn.Module, dropout: bool) -> None:
    """Switch gradients off; evaluation mode, or training mode for the public program's dropout."""
    module.requires_grad_(False)
    module.train(dropout)


def draw_for(module: nn.Module, batch: MicroBatch, seed: int) -> Tensor:
    """Codes [B, L] int64 on the batch's device: for each pair an image of its label, without guidance, top-k or top-p.

    An image depends on (seed, step, position in the global batch) alone, so on no rank and no micro-batch. Masked
    pairs, and those of a forward without weight, keep their own codes: nothing is computed of them.
    """
    codes_BL = batch.codes_BL.clone()
    rows = (~batch.null_mask_B).nonzero().flatten().tolist() if batch.weight else []
    if rows:
        indices = [(batch.step + 1) * MOST_PAIRS_A_STEP + position for position in batch.positions_B[rows].tolist()]
        codes_BL[rows] = generate(
            module, batch.positive_labels_B[rows], seed=seed, image_indices_B=indices, cuda_graphs=True
        ).to(codes_BL)
    return codes_BL


class ReplicaReference(DrawingReference):
    """log p_reference from `deepspeed.init_inference`. Collective to build.

    The engine leaves a module trainable and in training mode and casts it to fp16 by default, so the dtype is given
    and the module is frozen here. Each rank allocates its replica in the run's precision on its own device, and rank 0
    broadcasts the weights one at a time: no other rank ever holds them in float32.

    Args:
        model, reference: sections of the recipe.
        weights: full float32 state dict on rank 0, None elsewhere.
        precision: "bf16", "fp16" or "fp32".
        device: this rank's.
        tokenizer: for models that hold its codebook (VAR).
        seed: of the images that it draws.
    """

    def __init__(self, model: schema.Model, reference: schema.Reference, weights: dict[str, Tensor] | None,
                 precision: str, device: torch.device, tokenizer: nn.Module | None = None, seed: int = 0):  # fmt: skip
        self.seed = seed
        with torch.device("meta"):
            module = build_module(reference_model(model, reference.dropout), tokenizer)
        module = module.to(DTYPES[precision]).to_empty(device=device)
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensor.copy_(broadcast_weight(weights, name, tensor.shape, device))
        freeze(module, reference.dropout)
        self.engine = deepspeed.init_inference(module, dtype=DTYPES[precision], replace_with_kernel_inject=False)
        freeze(self.engine.module, reference.dropout)

    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """See `interface.Reference`."""
        return self.log_likelihoods(*inputs[:2])

    def draw(self, batch: MicroBatch) -> Tensor:
        """See `interface.DrawingReference`."""
        return draw_for(self.engine.module, batch, self.seed)

    @torch.no_grad()
    def log_likelihoods(self, codes_BL: Tensor, labels_B: Tensor) -> Tensor:
        """log p [B] float32 of codes [B, L] under labels [B]."""
        return self.engine(codes_BL, labels_B)
