"""The losses as pure functions of sequence log-likelihoods. Nothing of the package is imported.

Letters: K pairs (a batch, or any part of one). All inputs are [K] of one floating dtype, in nats:

    policy_pos     log p_policy(x_k | c_k)         reference_pos  log p_reference(x_k | c_k)
    policy_neg     log p_policy(x_k | c'_k)        reference_neg  log p_reference(x_k | c'_k)
    positive_mask  bool, the pair has no true negative (masked label, or c'_k = c_k)

`lambda_` is a number or a [K] tensor (lambda-conditioned models). `reduction` is "mean" or "sum" over pairs;
the sum lets a batch be cut up anyhow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def cca_loss(
    policy_pos: Tensor,
    policy_neg: Tensor,
    reference_pos: Tensor,
    reference_neg: Tensor,
    positive_mask: Tensor,
    beta: float,
    lambda_: float | Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Condition Contrastive Alignment (arXiv 2410.09347, equation 12), divided by max(lambda, 1).

    L_k = -log sigmoid(r(x,c)) - lambda log sigmoid(-r(x,c')),  r = beta (log p_policy - log p_reference);
    where `positive_mask` is set the second term is -log sigmoid(+r(x,c')) with weight 1.
    """
    reward_pos = beta * (policy_pos - reference_pos)
    reward_neg = beta * (policy_neg - reference_neg)
    sign, weight = _second_term(positive_mask, lambda_, policy_pos)
    return _reduce(-logsigmoid(reward_pos) - weight * logsigmoid(sign * reward_neg), lambda_, reduction)


def dpo_loss(
    policy_pos: Tensor,
    policy_neg: Tensor,
    reference_pos: Tensor,
    reference_neg: Tensor,
    positive_mask: Tensor,
    beta: float,
    lambda_: float | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference of c over c' for the same image: -log sigmoid(r(x,c) - r(x,c')).

    `positive_mask` and `lambda_` have no part in it; a masked pair's difference is zero by itself.
    """
    difference = (policy_pos - reference_pos) - (policy_neg - reference_neg)
    return _reduce(-logsigmoid(beta * difference), 1.0, reduction)


def unlearning_loss(
    policy_pos: Tensor,
    policy_neg: Tensor,
    reference_pos: Tensor,
    reference_neg: Tensor,
    positive_mask: Tensor,
    beta: float,
    lambda_: float | Tensor,
    reduction: str = "mean",
) -> Tensor:
    """-D(x,c) + lambda D(x,c'), D = log p_policy - log p_reference, divided by max(lambda, 1).

    The reference shifts the value only. Where `positive_mask` is set the second term is -D(x,c').
    """
    sign, weight = _second_term(positive_mask, lambda_, policy_pos)
    terms = -(policy_pos - reference_pos) - weight * sign * (policy_neg - reference_neg)
    return _reduce(terms, lambda_, reduction)


def mle_loss(policy_pos: Tensor, reduction: str = "mean") -> Tensor:
    """-log p(x|c): maximum likelihood, for making a base model."""
    return _reduce(-policy_pos, 1.0, reduction)


def _second_term(positive_mask: Tensor, lambda_: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and weight of the second term of each pair."""
    one = torch.ones_like(like)
    return torch.where(positive_mask, one, -one), torch.where(positive_mask, one, one * lambda_)


def _reduce(terms: Tensor, lambda_: float | Tensor, reduction: str) -> Tensor:
    assert reduction in ("mean", "sum"), reduction
    scaled = terms / (lambda_.clamp(min=1.0) if isinstance(lambda_, Tensor) else max(lambda_, 1.0))
    return scaled.mean() if reduction == "mean" else scaled.sum()
