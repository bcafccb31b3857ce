"""Sequence log-likelihoods: the op, its plain-torch twin, and the output head that uses it."""

from cca_ds.likelihood.decoding import linear, one_query_attention
from cca_ds.likelihood.head import LikelihoodHead
from cca_ds.likelihood.ops import (
    backend,
    linear_sequence_logp,
    linear_sequence_logp_reference,
    sequence_logp,
    sequence_logp_reference,
)

__all__ = [
    "LikelihoodHead",
    "backend",
    "linear",
    "linear_sequence_logp",
    "linear_sequence_logp_reference",
    "one_query_attention",
    "sequence_logp",
    "sequence_logp_reference",
]
