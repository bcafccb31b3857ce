"""Where the reference lives: a record for each placement, `PLACEMENTS["inference"]`.

Nothing here imports deepspeed until a reference is built, so that planning reads the records without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cca_ds.config.registry import Registry

if TYPE_CHECKING:
    from cca_ds.reference.replica import Reference
    from cca_ds.training.session import Session

# (bytes of all weights, bytes of weights gathered at a time, ranks, offloaded) -> bytes on each GPU
ResidentBytes = Callable[[float, float, int, bool], float]


@dataclass(frozen=True)
class Placement:
    """What the rest of the package needs to know of a placement.

    Args:
        name: in recipes, `reference.placement`.
        resident_bytes: GPU bytes that the reference keeps on each rank.
        on_trainers: the trainers compute its forward.
        sharded: its weights are gathered over the links in every forward.
        stored: log-likelihoods are read from files.
        needs_producers: other nodes compute them while training runs.
    """

    name: str
    resident_bytes: ResidentBytes
    on_trainers: bool = False
    sharded: bool = False
    stored: bool = False
    needs_producers: bool = False


PLACEMENTS: Registry[Placement] = Registry("reference.placement")


def _whole(weights_bytes: float, gathered_bytes: float, ranks: int, offload: bool) -> float:
    return weights_bytes


def _shard(weights_bytes: float, gathered_bytes: float, ranks: int, offload: bool) -> float:
    """The weights gathered at a time, and the rank's shard unless it is kept in host memory."""
    return gathered_bytes + (0.0 if offload else weights_bytes / ranks)


def _nothing(weights_bytes: float, gathered_bytes: float, ranks: int, offload: bool) -> float:
    return 0.0


PLACEMENTS.register(Placement("inference", _whole, on_trainers=True))
PLACEMENTS.register(Placement("zero3", _shard, on_trainers=True, sharded=True))
PLACEMENTS.register(Placement("cached", _nothing, stored=True))
PLACEMENTS.register(Placement("streamed", _nothing, stored=True, needs_producers=True))


def make_reference(session: Session) -> Reference:
    """The reference of `reference.placement`; it is the policy's own start unless other weights are named."""
    from cca_ds.models.from_recipe import starting_weights
    from cca_ds.reference.cache import CachedReference, ReferenceCache, cache_key
    from cca_ds.reference.replica import InferenceReference, ZeroReference

    run, settings = session.run, session.run.reference
    weights = starting_weights(
        run, settings.weights or run.model.weights, session.tokenizer, for_reference=True
    )
    if settings.placement == "inference":
        return InferenceReference(
            run, weights, session.precision, session.tokenizer, settings.tensor_parallel
        )
    if settings.placement == "zero3":
        return ZeroReference(run, weights, session.precision, session.tokenizer)
    assert settings.cache is not None
    cache = ReferenceCache(settings.cache, cache_key(run, session.table, weights, session.precision))
    if settings.placement == "cached":
        return CachedReference(cache)
    return CachedReference(cache, settings.wait_seconds, session.ranks.rank == 0, session.agree_while_waiting)
