"""Policy and reference log-likelihoods of a micro-batch -> the loss to descend, and sums for the log.

Letters: B pairs of a micro-batch; L codes per image. Stacked tensors are [2B]: `[chosen, rejected]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cca_ds.alignment import losses
from cca_ds.config.schema import Loss
from cca_ds.data.batches import MicroBatch

_CONTRASTIVE = {"cca": losses.cca_loss, "dpo": losses.dpo_loss, "unlearning": losses.unlearning_loss}

# Sums over pairs that `Objective` returns, in this order, so that one all-reduce serves them all.
SUMS = (
    "pairs",
    "contrasted",
    "unconditional",
    "loss",
    "chosen",
    "rejected",
    "accurate",
    "chosen_logps",
    "rejected_logps",
    "unconditional_rewards",
    "nll",
)


class Objective:
    """Loss of a recipe's `loss` section.

    Args:
        settings: name, beta and lambda.
        lambda_conditioned: lambda is each pair's own (Table 5) and is given to the model.
    """

    def __init__(self, settings: Loss, lambda_conditioned: bool = False):
        self.settings = settings
        self.lambda_conditioned = lambda_conditioned
        self.contrastive = settings.name != "mle"

    def stacked(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Arguments of the forward: codes [2B, L], labels [2B] (and log lambda [2B]), [chosen, rejected].

        Maximum likelihood has the chosen half only.
        """
        twice = (lambda t: torch.cat([t, t])) if self.contrastive else (lambda t: t)
        labels = [batch.positive_labels_B] + [batch.negative_labels_B] * self.contrastive
        extra = (twice(batch.log_lambda_B),) if self.lambda_conditioned else ()
        return (twice(batch.codes_BL), torch.cat(labels), *extra)

    def __call__(
        self, policy_logp: Tensor, reference_logp: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            policy_logp: [2B] float32 with gradient ([B] for maximum likelihood).
            reference_logp: [2B] float32, or None for maximum likelihood.

        Returns:
            The loss summed over the B pairs, and `SUMS` as a detached float64 vector.
        """
        lambda_ = batch.log_lambda_B.exp() if self.lambda_conditioned else self.settings.lambda_
        if not self.contrastive:
            loss = losses.mle_loss(policy_logp, reduction="sum") * batch.weight
            return loss, self._sums(loss, policy_logp, None, batch)
        assert reference_logp is not None
        policy, reference = policy_logp.chunk(2), reference_logp.chunk(2)  # [chosen, rejected]
        loss_function = _CONTRASTIVE[self.settings.name]
        loss = batch.weight * loss_function(
            *policy, *reference, batch.positive_mask_B, self.settings.beta, lambda_, reduction="sum"
        )
        return loss, self._sums(loss, policy[0], (policy_logp - reference_logp).detach(), batch)

    @torch.no_grad()
    def _sums(self, loss: Tensor, policy_pos: Tensor, log_ratio: Tensor | None, batch: MicroBatch) -> Tensor:
        pairs = len(batch.codes_BL)
        chosen, rejected = (
            log_ratio.double().chunk(2) if log_ratio is not None else [loss.new_zeros(pairs).double()] * 2
        )
        contrasted, null = (~batch.positive_mask_B).double(), batch.null_mask_B.double()
        beta = self.settings.beta
        values = {
            "pairs": torch.tensor(float(pairs)),
            "contrasted": contrasted.sum(),
            "unconditional": null.sum(),
            "loss": loss.detach() / batch.weight if batch.weight else loss.detach(),
            "chosen": beta * (chosen * contrasted).sum(),
            "rejected": beta * (rejected * contrasted).sum(),
            "accurate": ((chosen > rejected) * contrasted).sum(),
            "chosen_logps": (chosen * contrasted).sum(),
            "rejected_logps": (rejected * contrasted).sum(),
            "unconditional_rewards": beta * (chosen * null).sum(),
            "nll": -policy_pos.double().sum() / batch.codes_BL.shape[1],
        }
        sums = torch.stack([values[name].double().to(loss.device) for name in SUMS])
        return sums * batch.weight if batch.weight else torch.zeros_like(sums)

    def expected_initial_loss(self, contrasted: float) -> float:
        """The loss at r = 0, where policy equals reference, of a batch with this share of true negatives."""
        lambda_ = self.settings.lambda_
        weight = contrasted * lambda_ + (1 - contrasted)  # of the second term
        by_name = {
            "cca": (1 + weight) * math.log(2) / max(lambda_, 1.0),
            "dpo": math.log(2),
            "unlearning": 0.0,
        }
        return by_name[self.settings.name]


def summarize(sums: Tensor, contrastive: bool = True) -> dict[str, float]:
    """Means of a whole global batch from its summed `SUMS`, under preference tuning's usual names.

    chosen, rejected, margins and accuracies are means over pairs with a true negative,
    `rewards/unconditional` over masked pairs; a tag whose pairs the batch lacks is left out.
    """
    s = dict(zip(SUMS, sums.tolist(), strict=True))
    means = {"loss": s["loss"] / s["pairs"], "nll_per_code": s["nll"] / s["pairs"]}
    if contrastive and s["contrasted"]:
        n = s["contrasted"]
        means |= {
            "rewards/chosen": s["chosen"] / n,
            "rewards/rejected": s["rejected"] / n,
            "rewards/margins": (s["chosen"] - s["rejected"]) / n,
            "rewards/accuracies": s["accurate"] / n,
            "logps/chosen": s["chosen_logps"] / n,
            "logps/rejected": s["rejected_logps"] / n,
        }
    if contrastive and s["unconditional"]:
        means["rewards/unconditional"] = s["unconditional_rewards"] / s["unconditional"]
    return means
