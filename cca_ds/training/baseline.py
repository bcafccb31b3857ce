"""Before the first step: policy and reference must agree, and the codes must be what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cca_ds.alignment.objective import SUMS, summarize
from cca_ds.cluster.coordination import Coordinator
from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import Steps
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.training.engines import Engines

# An epoch that no run reaches: its images come in an order of their own.
_HELD_OUT_EPOCH = 10**6
# In reduced precision the two engines round the same numbers in the same order; these are generous.
_TOLERANCE_NATS = {"fp32": 1e-2, "bf16": 2.0, "fp16": 0.5}


@torch.no_grad()
def check_baseline(
    run: RunConfig, engines: Engines, own_steps: Steps, coordinator: Coordinator, say: Callable[[str], None]
) -> None:
    """Forward one global batch without dropout: the loss must be that of r = 0, the likelihood within its band.

    Args:
        own_steps: this rank's micro-batches.
        say: prints a line on rank 0's console.

    Raises:
        ValueError: the reference is not the policy's start, or codes and weights do not belong together.
    """
    if not run.baseline.check:
        return
    policy, objective = engines.policy, engines.objective
    stored = objective.spec.needs_reference and PLACEMENTS[run.reference.placement].stored
    step = 0 if stored else _HELD_OUT_EPOCH * own_steps.steps_per_epoch  # stored ones hold the run's own steps only
    policy.engine.eval()
    sums, differences = engines.zero_sums(), [torch.zeros((), device=engines.device)]
    for batch in own_steps[step]:
        batch = engines.load(batch)
        inputs = objective.stacked(batch)
        policy_logp = policy(*inputs, compute=objective.compute)
        reference_logp = engines.reference_logp(batch, inputs)
        sums += objective(policy_logp, reference_logp, batch)[1]
        if reference_logp is not None:
            differences.append((policy_logp - reference_logp).abs().max())
    policy.engine.train()
    sums, *_ = coordinator.sum_over_ranks(sums)
    worst = coordinator.max_over_ranks(torch.stack(differences).max().item())
    _check_agreement(run, worst, engines.precision)
    nll = summarize(sums, objective.spec)["nll_per_code"]
    band = run.baseline.nll_band
    expected_band = f", expected {band[0]} to {band[1]}" if band else ""
    say(f"baseline: {nll:.4f} nats a code{expected_band}; policy and reference agree to {worst:.2g} nats")
    pairs, contrasted, loss = (sums[SUMS.index(name)] for name in ("pairs", "contrasted", "loss"))
    expected = objective.expected_initial_loss(float(contrasted / pairs))
    if expected is not None:
        say(f"loss at r = 0: {expected:.6f}, measured {float(loss / pairs):.6f}")
    if band and not band[0] <= nll <= band[1]:
        raise ValueError(
            f"before training, the negative log-likelihood is {nll:.3f} nats a code, outside {band[0]} to {band[1]}: "
            f"data.codes={run.data.codes} and model.weights={run.model.weights} do not belong together "
            "(another tokenizer, image size or model), or set baseline.nll_band=null"
        )


def _check_agreement(run: RunConfig, worst: float, precision: str) -> None:
    limit = _TOLERANCE_NATS[precision]
    if worst > limit and run.reference.weights is None and not run.reference.dropout:
        raise ValueError(
            f"before training, policy and reference differ by up to {worst:.3g} nats an image (at most {limit} in "
            f"{precision}): the reference is not the policy's start; delete its cache, "
            "or name the reference's own weights in reference.weights"
        )
