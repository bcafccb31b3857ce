"""Bytes on one GPU, part by part: the one memory model, for planning a run and for limiting a rank's micro-batch.

Per parameter: 2 bytes of bf16 weights, 2 or 4 of gradients, 12 of float32 master weights and Adam's two
moments, each divided by the W ranks where the ZeRO stage shards it (optimizer from 1, gradients from 2,
weights at 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cca_ds.models.cost import ModelCost

RESERVED_BYTES = 1.5 * 2**30  # CUDA context, NCCL's buffers, library workspaces
USABLE_SHARE = 0.94  # the rest is left to fragmentation
LOGIT_CHUNK = 2**24  # logits alive at once in the fused head, whatever the vocabulary
LOGIT_BYTES = 4
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's own default, in elements


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; `activations_per_pair` grows with the micro-batch, the others do not."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    reference: float
    head: float
    reserved: float
    activations_per_pair: float

    @property
    def fixed(self) -> float:
        """All but the activations."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.activations_per_pair

    @property
    def allocated(self) -> float:
        """What the run itself allocates beside the activations: `fixed` without `reserved`."""
        return self.fixed - self.reserved


@dataclass(frozen=True)
class Sharding:
    """What a ds_config sets of memory and links.

    `stage` is ZeRO's; `reduce_bucket` and `live_weights` (stage3_max_live_parameters) are in elements;
    `hierarchical` is hpZ's partition size, 1 without hpZ; `gradient_bytes` is of an accumulated gradient in bf16.
    """

    stage: int
    offload_optimizer: bool
    offload_weights: bool
    reduce_bucket: int
    live_weights: int
    hierarchical: int
    gradient_bytes: int

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> "Sharding":
        """Read from DeepSpeed's JSON, with DeepSpeed's defaults for keys that are absent or "auto"."""
        zero = {k: v for k, v in ds_config.get("zero_optimization", {}).items() if v != "auto"}
        accumulation = ds_config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            stage=int(zero.get("stage", 0)),
            offload_optimizer=_offloaded(zero.get("offload_optimizer")),
            offload_weights=_offloaded(zero.get("offload_param")),
            reduce_bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
            live_weights=int(zero.get("stage3_max_live_parameters", 10**9)),
            hierarchical=int(zero.get("zero_hpz_partition_size", 1)),
            gradient_bytes=4 if accumulation == "fp32" else 2,
        )


def memory_of(
    model: ModelCost,
    sharding: Sharding,
    ranks: int,
    checkpointing: bool,
    *,
    reference_bytes: float,
    rows_per_pair: int = 2,
    element_bytes: int = 2,
) -> Memory:
    """Bytes of each part on each of `ranks` GPUs.

    Args:
        checkpointing: blocks are computed again in the backward (`model.activation_checkpointing`).
        reference_bytes: what the reference's placement keeps on each GPU (`Placement.held_bytes`); 0 without one.
        rows_per_pair: sequences of a pair through the policy (`LossSpec.rows_per_pair`).
        element_bytes: of weights and activations, 2 for bf16.
    """
    size, stage = model.parameters, sharding.stage
    shard = [size / ranks if stage >= needed else size for needed in (1, 2, 3)]
    weights = 0.0 if sharding.offload_weights else shard[2] * element_bytes
    if sharding.hierarchical > 1:
        weights += size * element_bytes / sharding.hierarchical  # the second copy, within a node
    gathered = gathered_bytes(model, sharding, element_bytes) if stage == 3 else 0
    return Memory(
        weights=weights,
        # in fp32 DeepSpeed's file sets no accumulation type, and gradients have the weights' own
        gradients=shard[1] * max(sharding.gradient_bytes, element_bytes),
        optimizer=0.0 if sharding.offload_optimizer else shard[0] * 12,
        buffers=min(size, sharding.reduce_bucket) * element_bytes + gathered,
        reference=reference_bytes,
        head=LOGIT_CHUNK * (LOGIT_BYTES + element_bytes) + 4 * model.vocabulary * model.width,
        reserved=RESERVED_BYTES,
        # the head keeps onehot - softmax of every code for its backward
        activations_per_pair=model.codes
        * rows_per_pair
        * (activation_bytes(model, checkpointing, element_bytes) + model.vocabulary * element_bytes),
    )


def gathered_bytes(model: ModelCost, sharding: Sharding, element_bytes: int = 2) -> float:
    """Most bytes of a ZeRO-3 model's weights that are gathered on a GPU at a time."""
    return min(model.parameters, sharding.live_weights) * element_bytes


def activation_bytes(model: ModelCost, checkpointing: bool, element_bytes: int = 2) -> float:
    """Peak bytes a code of one sequence, at the start of the backward.

    Every block keeps what its backward needs; with checkpointing only its input, and one block's whole set at
    a time. Added to these are the stream, its norm and their gradients at the head, and one block's gradients.
    """
    block = model.block_token_elements * element_bytes + model.block_dropout_bytes
    passing = 8 * model.width * element_bytes
    if checkpointing:
        return model.layers * model.width * element_bytes + block + passing
    return model.layers * block + passing


def _offloaded(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"
