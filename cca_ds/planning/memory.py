"""Bytes on one GPU, part by part.

Per parameter: 2 bytes of bf16 weights, 2 or 4 of gradients, 12 of float32 master weights and Adam's two
moments, each divided by the W ranks where the ZeRO stage shards it (optimizer from 1, gradients from 2,
weights at 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cca_ds.planning.architecture import Architecture

RESERVED_BYTES = 1.5 * 2**30  # CUDA context, NCCL's buffers, library workspaces
USABLE_SHARE = 0.94  # the rest goes to fragmentation
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


@dataclass(frozen=True)
class Sharding:
    """What a ds_config says that planning needs: the ZeRO stage, offload, buckets, hierarchical
    partitions."""

    stage: int
    offload_optimizer: bool
    offload_weights: bool
    reduce_bucket: int
    live_weights: int
    hierarchical: int
    gradient_bytes: int

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> "Sharding":
        """Read from DeepSpeed's JSON, with DeepSpeed's defaults for what it leaves out or says "auto" of."""
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
    model: Architecture,
    sharding: Sharding,
    ranks: int,
    placement: str,
    checkpointing: bool,
    *,
    reference_offload: bool = False,
    tensor_parallel: int = 1,
    sequences_per_pair: int = 2,
    element_bytes: int = 2,
) -> Memory:
    """Bytes of each part on each of `ranks` GPUs.

    Args:
        placement: "inference", "zero3", "cached", "streamed", or "none".
        sequences_per_pair: 2 where positives and negatives are both computed, 1 for `mle`.
        element_bytes: of weights and activations, 2 for bf16.
    """
    size, stage = model.parameters, sharding.stage
    shard = [size / ranks if stage >= needed else size for needed in (1, 2, 3)]
    live = min(size, sharding.live_weights) * element_bytes
    weights = 0.0 if sharding.offload_weights else shard[2] * element_bytes
    if sharding.hierarchical > 1:
        weights += size * element_bytes / sharding.hierarchical  # the second copy, within a node
    buffers = min(size, sharding.reduce_bucket) * element_bytes + (live if stage == 3 else 0)
    reference = {"inference": size * element_bytes / tensor_parallel, "zero3": live}.get(placement, 0.0)
    if placement == "zero3" and not reference_offload:
        reference += size * element_bytes / ranks
    tokens = model.codes * sequences_per_pair
    return Memory(
        weights=weights,
        gradients=shard[1] * sharding.gradient_bytes,
        optimizer=0.0 if sharding.offload_optimizer else shard[0] * 12,
        buffers=buffers,
        reference=reference,
        head=LOGIT_CHUNK * (LOGIT_BYTES + element_bytes) + 4 * model.vocabulary * model.width,
        reserved=RESERVED_BYTES,
        activations_per_pair=tokens * activation_bytes(model, checkpointing, element_bytes),
    )


def activation_bytes(model: Architecture, checkpointing: bool, element_bytes: int = 2) -> float:
    """Peak bytes a code of one sequence, at the start of the backward.

    Every block keeps what its backward needs; with checkpointing only its input, and one block's whole set at
    a time. Beside them stand the stream, its norm and their gradients at the head, and one block's gradients.
    """
    block = model.block_token_elements * element_bytes + model.block_dropout_bytes
    passing = 8 * model.width * element_bytes
    if checkpointing:
        return model.layers * model.width * element_bytes + block + passing
    return model.layers * block + passing


def _offloaded(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"
