"""Policy and reference log-likelihoods of a micro-batch -> the loss to descend, and sums for the log.

Letters: B pairs of a micro-batch; L codes per image. Stacked tensors are [2B]: `[chosen, rejected]`, of DDO `[real,
generated]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cca_ds.alignment.losses import LOSSES, LossSpec
from cca_ds.config.schema import Loss
from cca_ds.data.batches import MicroBatch

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
    "nll_unconditional",
    "nll_mixed",
)


class Objective:
    """The loss of a recipe's `loss` section, as micro-batches give it.

    Args:
        settings: name, beta, lambda and the loss's own options.
        lambda_conditioned: lambda is each pair's own (Table 5) and is an input of the model.

    Raises:
        UnknownVariant: a loss that is not registered.
    """

    def __init__(self, settings: Loss, lambda_conditioned: bool = False):
        self.spec = LOSSES[settings.name]
        self.beta, self.lambda_ = settings.beta, settings.lambda_
        self.options = {**self.spec.options, **settings.options}
        self.lambda_conditioned = lambda_conditioned

    @property
    def needs_generated(self) -> bool:
        """Whether a pair's second sequence is an image that the reference drew."""
        return self.spec.negatives == "generated"

    @property
    def compute(self) -> Callable[..., Tensor] | None:
        """What the policy computes of `stacked` instead of log-likelihoods (`CodeModel.forward`); None: those."""
        return self.spec.forward

    def stacked(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Inputs of the forward: codes [R, L], labels [R] (and log lambda [R], or the `inputs` of the loss).

        R is 2B, [chosen, rejected]; a loss without negatives has the B chosen rows only.
        """
        rows = self.spec.rows_per_pair
        codes = [batch.codes_BL] * rows
        if self.needs_generated:
            assert batch.generated_codes_BL is not None
            codes[1] = batch.generated_codes_BL
        labels = [batch.positive_labels_B, batch.negative_labels_B][:rows]  # [chosen, rejected]
        extra = [getattr(batch, name).repeat(rows) for name in self.spec.inputs]
        if self.lambda_conditioned:
            extra.append(batch.log_lambda_B.repeat(rows))
        return (torch.cat(codes), torch.cat(labels), *extra)

    def __call__(self, policy_logp: Tensor, reference_logp: Tensor | None, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """
        Args:
            policy_logp: [R] float32 with gradient, in the order of `stacked`, or what `compute` returns.
            reference_logp: [R] float32, or None where the loss needs none.

        Returns:
            The loss summed over the B pairs, and `SUMS` as a detached float64 vector.
        """
        spec = self.spec
        policy = policy_logp.split(len(batch.codes_BL))  # [chosen, rejected], or the parts of `compute`
        inputs: list[Tensor] = [*policy]
        if spec.needs_reference:
            assert reference_logp is not None
            inputs += reference_logp.chunk(spec.rows_per_pair)
        settings = {}
        if spec.negatives:
            lambda_ = batch.log_lambda_B.exp() if self.lambda_conditioned else self.lambda_
            settings = {"positive_mask": batch.positive_mask_B, "beta": self.beta, "lambda_": lambda_}
        scale = batch.weight / batch.codes_BL.shape[1] if spec.per_code else batch.weight
        loss = scale * spec.fn(*inputs, **settings, **self.options, reduction="sum")
        log_ratio = (policy_logp - reference_logp).detach() if self.spec.compares else None
        return loss, self._sums(loss, policy, log_ratio, batch)

    @torch.no_grad()
    def _sums(self, loss: Tensor, policy: Sequence[Tensor], log_ratio: Tensor | None, batch: MicroBatch) -> Tensor:
        pairs = len(batch.codes_BL)
        chosen, rejected = (
            log_ratio.double().chunk(2) if log_ratio is not None else [loss.new_zeros(pairs).double()] * 2
        )
        contrasted, null = (~batch.positive_mask_B).double(), batch.null_mask_B.double()
        beta = self.beta
        values = {
            "pairs": loss.new_full((), pairs),  # on the device: a copy from the host would wait for the stream
            "contrasted": contrasted.sum(),
            "unconditional": null.sum(),
            "loss": loss.detach() / batch.weight if batch.weight else loss.detach(),
            "chosen": beta * (chosen * contrasted).sum(),
            "rejected": beta * (rejected * contrasted).sum(),
            "accurate": ((chosen > rejected) * contrasted).sum(),
            "chosen_logps": (chosen * contrasted).sum(),
            "rejected_logps": (rejected * contrasted).sum(),
            "unconditional_rewards": beta * (chosen * null).sum(),
        }
        values |= {
            name: -part.double().sum() / batch.codes_BL.shape[1]
            for name, part in zip(self.spec.logged, policy, strict=False)  # of the rejected nothing is logged
        }
        none = loss.new_zeros(())
        sums = torch.stack([values.get(name, none).double() for name in SUMS])
        return sums * batch.weight if batch.weight else torch.zeros_like(sums)

    def expected_initial_loss(self, contrasted: float) -> float | None:
        """The loss where policy equals reference, of a batch with this share of true negatives; None if unknown."""
        if self.spec.initial_loss is None or self.lambda_conditioned:
            return None
        return self.spec.initial_loss(contrasted, self.lambda_)


def summarize(sums: Tensor, spec: LossSpec) -> dict[str, float]:
    """Means of a whole global batch from its summed `SUMS`, under preference tuning's usual names.

    chosen, rejected, margins and accuracies are means over pairs with a true negative,
    `rewards/unconditional` over masked pairs; a tag whose pairs the batch lacks is left out.

    Args:
        sums: [len(SUMS)].
        spec: of the loss; it names the two sequences and what else it has.
    """
    s = dict(zip(SUMS, sums.tolist(), strict=True))
    means = {"loss": s["loss"] / s["pairs"], "nll_per_code": s["nll"] / s["pairs"]}
    parts = {"nll_unconditional": "nll_per_code/unconditional", "nll_mixed": "nll_per_code/mixed"}
    means |= {tag: s[name] / s["pairs"] for name, tag in parts.items() if name in spec.logged}
    if spec.compares and s["contrasted"]:
        n, (first, second) = s["contrasted"], spec.sides
        means |= {
            f"rewards/{first}": s["chosen"] / n,
            f"rewards/{second}": s["rejected"] / n,
            "rewards/margins": (s["chosen"] - s["rejected"]) / n,
            "rewards/accuracies": s["accurate"] / n,
            f"logps/{first}": s["chosen_logps"] / n,
            f"logps/{second}": s["rejected_logps"] / n,
        }
    if spec.compares and s["unconditional"]:
        means["rewards/unconditional"] = s["unconditional_rewards"] / s["unconditional"]
    return means
