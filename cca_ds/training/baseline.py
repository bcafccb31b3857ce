"""Before the first step: policy and reference must agree, and the data must be what the model was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cca_ds.alignment.objective import SUMS, summarize
from cca_ds.data.batches import Steps

if TYPE_CHECKING:
    from cca_ds.training.session import Session

# Any step of an epoch that no run reaches: its images come in an order of their own.
_HELD_OUT_EPOCH = 10**6
# In reduced precision the two engines round the same numbers in the same order; these are generous.
_TOLERANCE_NATS = {"fp32": 1e-2, "bf16": 2.0, "fp16": 0.5}


@torch.no_grad()
def check_baseline(session: Session) -> None:
    """Forward one batch without dropout: the loss must be that of r = 0, the likelihood within its band.

    Raises:
        ValueError: the reference is not the policy's start, or codes and checkpoint do not belong together.
    """
    settings = session.run.baseline
    if not settings.check:
        return
    policy, objective = session.policy, session.objective
    cut = session.cut.positions(session.ranks.rank)
    steps = Steps(session.table, session.plan, cut[0].start, [len(r) for r in cut])
    policy.engine.eval()
    sums, worst = session.zero_sums(), 0.0
    stored = session.run.reference.placement in ("cached", "streamed")  # these hold the run's own steps only
    for batch in steps[0 if stored else _HELD_OUT_EPOCH * session.steps_per_epoch]:
        batch = batch.to(session.device)
        inputs = objective.stacked(batch)
        policy_logp, reference_logp = policy(*inputs), session.reference_logp(batch, inputs)
        sums += objective(policy_logp, reference_logp, batch)[1]
        if reference_logp is not None:
            worst = max(worst, float((policy_logp - reference_logp).abs().max()))
    policy.engine.train()
    sums, _ = session.sum_over_ranks(sums)
    _judge(session, summarize(sums, objective.contrastive)["nll_per_code"], worst, sums)


def _judge(session: Session, nll: float, worst: float, sums: torch.Tensor) -> None:
    run, band = session.run, session.run.baseline.nll_band
    limit = _TOLERANCE_NATS[session.precision]
    if worst > limit and run.reference.weights is None and not run.reference.dropout:
        raise ValueError(
            f"before training, policy and reference differ by up to {worst:.3g} nats an image (at most {limit} in "
            f"{session.precision}): the reference is not the policy's start; check reference.weights and its cache"
        )
    published = f", published {band[0]} to {band[1]}" if band else ""
    session.log.say(
        f"baseline: {nll:.4f} nats a code{published}; policy and reference agree to {worst:.2g} nats"
    )
    if session.objective.contrastive and not session.objective.lambda_conditioned:
        pairs, contrasted = sums[SUMS.index("pairs")], sums[SUMS.index("contrasted")]
        expected = session.objective.expected_initial_loss(float(contrasted / pairs))
        session.log.say(
            f"loss at r = 0: {expected:.6f}, measured {float(sums[SUMS.index('loss')] / pairs):.6f}"
        )
    if band and not band[0] <= nll <= band[1]:
        raise ValueError(
            f"before training, the negative log-likelihood is {nll:.3f} nats a code, outside {band[0]} to {band[1]}: "
            f"data.codes={run.data.codes} and model.weights={run.model.weights} do not belong together "
            "(another tokenizer, image size or model), or set baseline.nll_band=null"
        )
