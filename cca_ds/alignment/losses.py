"""The losses as pure functions of sequence log-likelihoods, and a record for each: `LOSSES["cca"]`.

A new loss is a function and its record here; nothing else compares a loss's name.

Letters: K pairs (a batch, or any part of one). All inputs are [K] of one floating dtype, in nats:

    policy_pos     log p_policy(x_k | c_k)         reference_pos  log p_reference(x_k | c_k)
    policy_neg     log p_policy(x_k | c'_k)        reference_neg  log p_reference(x_k | c'_k)
    positive_mask  bool, the pair has no true negative (masked label, or c'_k = c_k)

Of DDO the second sequence is another image of the same class: *_neg is of (x~_k | c_k), and the mask is the label's.

`lambda_` is a number or a [K] tensor (lambda-conditioned models). `reduction` is "mean" or "sum" over pairs;
the sum lets a batch be cut up anyhow. A loss that needs more than log-likelihoods computes it of the model itself, in
the `forward` of its record.
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
from cca_ds.models.base import CodeModel
from cca_ds.models.conditioning import GFT_BETA, Conditioning


@dataclass(frozen=True)
class LossSpec:
    """What the rest of the package needs to know of a loss.

    Args:
        name: in recipes, `loss.name`.
        fn: called with policy_pos [K]; then, where the loss has negatives, policy_neg [K]; then, where it needs the
            reference, reference_pos and reference_neg [K]; then, with negatives, positive_mask [K], beta and lambda_;
            and `reduction` and the loss's own `options` as keywords. Returns a scalar. A loss with a `forward` of its
            own gets the policy's log-likelihoods as that returns them.
        negatives: where the second sequence of a pair comes from: "labels" is the same image under another label,
            "generated" is an image that the reference drew for the same label, None is no second sequence.
        needs_reference: whether log p_reference is computed.
        initial_loss: the loss where policy equals reference, of (share of pairs with a true negative, lambda); None
            where it is not known beforehand.
        lambda_per_pair: whether lambda may be each pair's own (model.lambda_conditioning, Table 5).
        options: the loss's own hyperparameters and their defaults; recipes set them as `loss.options.NAME`.
        conditioning: the number of each image that the model must take as an input.
        forward: (model, codes [R, L], labels [R], then `inputs`) -> the policy's log-likelihoods [n R], where the loss
            needs more of the model than log p(x|c); the first R are log p(x|c). It runs within the module's forward.
        inputs: fields of `MicroBatch` that `forward` takes, after codes and labels.
        extra_forwards: forwards of each sequence that `forward` runs beside the one that has a gradient.
        per_code: the loss is a mean over codes, not a sum.
        method: name, and arXiv number where there is one, for the model card.
        sides: names of the two sequences of a pair in the tags `rewards/...` and `logps/...`.
        logged: what is logged of the n parts that `forward` returns: names in `objective.SUMS`.
    """

    name: str
    fn: Callable[..., Tensor]
    negatives: Literal["labels", "generated"] | None = "labels"
    needs_reference: bool = True
    initial_loss: Callable[[float, float], float] | None = None
    lambda_per_pair: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    conditioning: Conditioning | None = None
    forward: Callable[..., Tensor] | None = None
    inputs: tuple[str, ...] = ()
    extra_forwards: int = 0
    per_code: bool = False
    logged: tuple[str, ...] = ("nll",)
    sides: tuple[str, str] = ("chosen", "rejected")
    method: tuple[str, str | None] = ("Condition Contrastive Alignment", "2410.09347")

    @property
    def rows_per_pair(self) -> int:
        """Sequences through the policy for each pair: the chosen one, and the rejected one where there is one."""
        return 2 if self.negatives else 1

    @property
    def compares(self) -> bool:
        """Whether both sequences of a pair are compared to the reference, which gives the reward tags."""
        return self.needs_reference and bool(self.negatives)

    @property
    def passes(self) -> int:
        """Forwards of each sequence: three for the policy's forward and backward, one for the reference, and the extra.

        CCA's pair costs 2 x 4 forwards, GFT's 1 x 4.
        """
        return 3 + self.needs_reference + self.extra_forwards


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


def ddo_loss(
    policy_pos: Tensor,
    policy_neg: Tensor,
    reference_pos: Tensor,
    reference_neg: Tensor,
    positive_mask: Tensor,
    beta: float,
    lambda_: float | Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Direct discriminative optimization (arXiv 2503.01103), divided by max(lambda, 1).

    L_k = -log sigmoid(r(x,c)) - lambda log sigmoid(-r(x~,c)),  r = beta (log p_policy - log p_reference), with x~ drawn
    from the reference for the same c; lambda is the paper's alpha. Where `positive_mask` is set (a masked label) the
    pair keeps its first term only.

    With beta = lambda = 1 the policy is a discriminator of real and generated images, whose optimum is the
    distribution of the real ones.
    """
    reward_real = beta * (policy_pos - reference_pos)
    reward_generated = beta * (policy_neg - reference_neg)
    second = torch.where(positive_mask, torch.zeros_like(reward_real), lambda_ * logsigmoid(-reward_generated))
    return _reduce(-logsigmoid(reward_real) - second, lambda_, reduction)


def mle_loss(policy_pos: Tensor, reduction: str = "mean") -> Tensor:
    """-log p(x|c): maximum likelihood, for making a base model."""
    return _reduce(-policy_pos, 1.0, reduction)


def gft_loss(
    model: CodeModel, codes_BL: Tensor, labels_B: Tensor, gft_beta: Tensor, label_mask: Tensor | None = None
) -> Tensor:
    """Guidance-free training (arXiv 2501.15420): the mean cross-entropy of mixed logits over codes and images.

        l = t * l_policy(x | c, t) + (1 - t) * stopgrad(l_policy(x | null, t = 1, evaluation mode))

    Args:
        model: conditioned on GFT's beta; in training mode only the conditional half has dropout.
        codes_BL: [B, L] integers.
        labels_B: [B] int64, those of masked rows too.
        gft_beta: [B] float in (0, 1), t of each row.
        label_mask: [B] bool; a masked row takes the null class and the embedding of t = 1 in its conditional half, and
            is mixed with its own t nonetheless. None masks none.
    """
    if label_mask is not None:
        labels_B = torch.where(label_mask, model.null_class, labels_B)
    _, _, mixed_B = _gft_logp(model, codes_BL, labels_B, gft_beta, label_mask, parts=False)
    return -mixed_B.mean() / codes_BL.shape[1]


def gft_forward(
    model: CodeModel, codes_BL: Tensor, labels_B: Tensor, gft_beta_B: Tensor, label_mask_B: Tensor | None = None
) -> Tensor:
    """log p of codes [3 B] float32: [conditional, unconditional, mixed], of which the last has a gradient.

    Arguments as in `gft_loss`, but `labels_B` is the null class already where masked. The logits follow
    `LlamaGen/autoregressive/train/GFT_c2i.py` of thu-ml/GFT.
    """
    return torch.cat(_gft_logp(model, codes_BL, labels_B, gft_beta_B, label_mask_B, parts=True))


def _gft_logp(
    model: CodeModel, codes_BL: Tensor, labels_B: Tensor, beta_B: Tensor, mask_B: Tensor | None, parts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditional, unconditional and mixed log p, each [B]; the first two are empty without `parts`."""
    codes_BL, one_B = codes_BL.long(), torch.ones_like(beta_B)
    embedded_B = beta_B if mask_B is None else torch.where(mask_B, one_B, beta_B)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            uncond_BLD = model.hidden(codes_BL, torch.full_like(labels_B, model.null_class), one_B)
    finally:
        model.train(was_training)
    cond_BLD = model.hidden(codes_BL, labels_B, embedded_B)
    mixed_B = model.read_out(cond_BLD, codes_BL, uncond_BLD, beta_B)
    if not parts:
        return mixed_B.new_empty(0), mixed_B.new_empty(0), mixed_B
    with torch.no_grad():  # for the log
        return model.read_out(cond_BLD, codes_BL), model.read_out(uncond_BLD, codes_BL), mixed_B


def _mixed_nll(policy_cond: Tensor, policy_uncond: Tensor, policy_mixed: Tensor, reduction: str = "mean") -> Tensor:
    """-log p of the mixed distributions: what `gft_forward` returns, in its order."""
    return _reduce(-policy_mixed, 1.0, reduction)


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
LOSSES.register(
    LossSpec(
        "dpo",
        dpo_loss,
        initial_loss=lambda contrasted, lambda_: math.log(2),
        method=("Direct Preference Optimization", "2305.18290"),
    )
)
LOSSES.register(
    LossSpec(
        "unlearning", unlearning_loss, initial_loss=lambda contrasted, lambda_: 0.0, method=("Unlearning", "2410.09347")
    )
)
LOSSES.register(
    LossSpec(
        "ddo",
        ddo_loss,
        negatives="generated",
        initial_loss=lambda contrasted, lambda_: (1 + contrasted * lambda_) * math.log(2) / max(lambda_, 1.0),
        sides=("real", "generated"),
        method=("Direct Discriminative Optimization", "2503.01103"),
    )
)
LOSSES.register(LossSpec("mle", mle_loss, negatives=None, needs_reference=False, method=("Maximum Likelihood", None)))
LOSSES.register(
    LossSpec(
        "gft",
        _mixed_nll,
        negatives=None,
        needs_reference=False,
        conditioning=GFT_BETA,
        forward=gft_forward,
        inputs=("gft_beta_B", "null_mask_B"),
        extra_forwards=1,
        per_code=True,
        logged=("nll", "nll_unconditional", "nll_mixed"),
        method=("Guidance-Free Training", "2501.15420"),
    )
)
