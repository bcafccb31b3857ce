"""Sequence log-likelihoods: the op, its plain-torch twin, and the output head that uses it."""

from cca_ds.likelihood.head import LikelihoodHead
from cca_ds.likelihood.sequence_logp import (
    linear_sequence_logp,
    linear_sequence_logp_reference,
    sequence_logp,
    sequence_logp_reference,
)
from cca_ds.ops.library import backend

__all__ = [
    "LikelihoodHead",
    "backend",
    "linear_sequence_logp",
    "linear_sequence_logp_reference",
    "sequence_logp",
    "sequence_logp_reference",
]
