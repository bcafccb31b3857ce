"""The reference placements: one record each, asked by everything above and by the planner.

    inference   a replica on every rank in a DeepSpeed inference engine
    zero3       sharded over the ranks by ZeRO-3, in host memory between forwards if offloaded
    cached      no model: log-likelihoods computed ahead are read from files
    streamed    no model here: other nodes compute the log-likelihoods while training runs

This file does not import deepspeed, which takes seconds, so that plans and dry runs can ask the records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cca_ds.balance.memory import Sharding, gathered_bytes
from cca_ds.cluster.collectives import on_first
from cca_ds.config.variants import Registry
from cca_ds.data.batches import total_steps
from cca_ds.models.cost import ModelCost
from cca_ds.reference.cache import CachedReference, open_cache
from cca_ds.reference.interface import Reference, ReferenceInputs


@dataclass(frozen=True)
class Placement:
    """Where the frozen reference is held.

    Args:
        name: in recipes, `reference.placement`.
        build: the reference on this rank; collective.
        stored: log-likelihoods are read from files, so that only the run's own steps are there, with one dropout mask.
        on_trainers: its forwards run on the ranks that train.
        resident_bytes: of a rank's GPU, from (bytes of all weights, bytes of the weights that ZeRO-3 gathers at a
            time, ranks, whether shards are offloaded to host memory).
        can_offload: whether `reference.offload` applies.
        sharded: its weights are gathered over the links in every forward.
        needs_producers: other nodes compute the log-likelihoods while training runs.
        draws: it can draw images too (`data.generated: online`).
    """

    name: str
    build: Callable[[ReferenceInputs], Reference]
    stored: bool
    on_trainers: bool
    resident_bytes: Callable[[float, float, int, bool], float]
    can_offload: bool = False
    sharded: bool = False
    needs_producers: bool = False
    draws: bool = False

    def held_bytes(self, model: ModelCost, sharding: Sharding, element_bytes: int, ranks: int, offload: bool) -> float:
        """`resident_bytes` of a reference of the policy's shape, sharded as it is over `ranks` ranks."""
        weights = float(model.parameters * element_bytes)
        return self.resident_bytes(weights, gathered_bytes(model, sharding, element_bytes), ranks, offload)


def _build_replica(inputs: ReferenceInputs) -> Reference:
    from cca_ds.reference.replica import ReplicaReference

    return ReplicaReference(
        inputs.run.model, inputs.run.reference, inputs.weights, inputs.precision, inputs.coordinator.device,
        inputs.tokenizer, inputs.run.seed,
    )  # fmt: skip


def _build_sharded(inputs: ReferenceInputs) -> Reference:
    from cca_ds.reference.sharded import ShardedReference

    return ShardedReference(
        inputs.run.model, inputs.run.reference, inputs.weights, inputs.precision, inputs.coordinator.device,
        inputs.tokenizer,
    )  # fmt: skip


def _build_cached(inputs: ReferenceInputs) -> Reference:
    cache, batch = open_cache(inputs, make=False), inputs.run.batch
    steps = total_steps(batch, len(inputs.table) // batch.global_size)
    on_first(inputs.coordinator.ranks, lambda: cache.require(steps))
    return CachedReference(cache)


def _build_streamed(inputs: ReferenceInputs) -> Reference:
    coordinator = inputs.coordinator
    return CachedReference(
        open_cache(inputs),
        inputs.run.reference.wait_seconds,
        coordinator.ranks.rank == 0,
        coordinator.agree_while_waiting,
    )


PLACEMENTS: Registry[Placement] = Registry("reference.placement")
PLACEMENTS.register(
    Placement(
        "inference",
        _build_replica,
        stored=False,
        on_trainers=True,
        resident_bytes=lambda weights, gathered, ranks, offload: weights,
        draws=True,
    )
)
PLACEMENTS.register(
    Placement(
        "zero3",
        _build_sharded,
        stored=False,
        on_trainers=True,
        resident_bytes=lambda weights, gathered, ranks, offload: gathered + (0.0 if offload else weights / ranks),
        can_offload=True,
        sharded=True,
    )
)
PLACEMENTS.register(Placement("cached", _build_cached, stored=True, on_trainers=False, resident_bytes=lambda *_: 0.0))
PLACEMENTS.register(
    Placement(
        "streamed",
        _build_streamed,
        stored=True,
        on_trainers=False,
        resident_bytes=lambda *_: 0.0,
        needs_producers=True,
        draws=True,
    )
)
