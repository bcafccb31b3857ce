"""The losses as pure functions of sequence log-likelihoods, and a record for each: `LOSSES["cca"]`.

A new loss is a function and its record here; nothing else compares a loss's name.

Letters: K pairs (a batch, or any part of one). All inputs are [K] of one floating dtype, in nats:

    policy_pos     log p_policy(x_k | c_k)         reference_pos  log p_reference(x_k | c_k)
    policy_neg     log p_policy(x_k | c'_k)        reference_neg  log p_reference(x_k | c'_k)
    positive_mask  bool, the pair has no true negative (masked label, or c'_k = c_k)

`lambda_` is a number or a [K] tensor (lambda-conditioned models). `reduction` is "mean" or "sum" over pairs;
the sum lets a batch be cut up anyhow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cca_ds.config.variants import Registry


@dataclass(frozen=True)
class LossSpec:
    """What the rest of the package needs to know of a loss.

    Args:
        name: in recipes, `loss.name`.
        fn: called with policy_pos [K]; then, where the loss has negatives, policy_neg [K]; then, where it needs the
            reference, reference_pos and reference_neg [K]; then, with negatives, positive_mask [K], beta and lambda_;
            and `reduction` and the loss's own `options` as keywords. Returns a scalar.
        negatives: where the second sequence of a pair comes from: "labels" is the same image under another label,
            None is no second sequence.
        needs_reference: whether log p_reference is computed.
        initial_loss: the loss where policy equals reference, of (share of pairs with a true negative, lambda); None
            where it is not known beforehand.
        lambda_per_pair: whether lambda may be each pair's own (model.lambda_conditioning, Table 5).
        options: the loss's own hyperparameters and their defaults; recipes set them as `loss.options.NAME`.
    """

    name: str
    fn: Callable[..., Tensor]
    negatives: Literal["labels", "generated"] | None = "labels"
    needs_reference: bool = True
    initial_loss: Callable[[float, float], float] | None = None
    lambda_per_pair: bool = False
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows_per_pair(self) -> int:
        """Sequences through the policy for each pair: the chosen one, and the rejected one where there is one."""
        return 2 if self.negatives else 1


LOSSES: Registry[LossSpec] = Registry("loss.name")


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


def _second_weight(contrasted: float, lambda_: float) -> float:
    """Mean weight of the second term over a batch with this share of true negatives."""
    return contrasted * lambda_ + (1 - contrasted)


LOSSES.register(
    LossSpec(
        "cca",
        cca_loss,
        initial_loss=lambda contrasted, lambda_: (
            (1 + _second_weight(contrasted, lambda_)) * math.log(2) / max(lambda_, 1.0)
        ),
        lambda_per_pair=True,
    )
)
LOSSES.register(LossSpec("dpo", dpo_loss, initial_loss=lambda contrasted, lambda_: math.log(2)))
LOSSES.register(LossSpec("unlearning", unlearning_loss, initial_loss=lambda contrasted, lambda_: 0.0))
LOSSES.register(LossSpec("mle", mle_loss, negatives=None, needs_reference=False))
