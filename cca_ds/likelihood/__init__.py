"""Sequence log-likelihoods: the ops, their plain versions, and the output head that uses them."""

from cca_ds.likelihood.head import LikelihoodHead
from cca_ds.likelihood.sequence_logp import (
    linear_sequence_logp,
    linear_sequence_logp_eager,
    sequence_logp,
    sequence_logp_eager,
)
from cca_ds.ops.library import backend

__all__ = [
    "LikelihoodHead",
    "backend",
    "linear_sequence_logp",
    "linear_sequence_logp_eager",
    "sequence_logp",
    "sequence_logp_eager",
]
