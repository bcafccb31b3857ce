"""Which reference a recipe asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cca_ds.reference.cache import CachedReference, ReferenceCache, cache_key
from cca_ds.reference.replica import InferenceReference, Reference, ZeroReference
from cca_ds.training.policy import starting_weights

if TYPE_CHECKING:
    from cca_ds.training.session import Session


def make_reference(session: Session) -> Reference:
    """The reference of `reference.placement`; it is the policy's own start unless other weights are named."""
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
