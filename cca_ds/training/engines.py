"""The engines of a run: the policy that is trained, the frozen reference, and the objective over both.

Letters: B pairs of a micro-batch, R rows of its forward ([chosen, rejected] stacked).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cca_ds.alignment.objective import SUMS, Objective
from cca_ds.cluster.launch import Ranks
from cca_ds.config import schema
from cca_ds.data.batches import MicroBatch
from cca_ds.reference.interface import DrawingReference, Reference
from cca_ds.training import schedule
from cca_ds.training.policy import NonFinite, Policy


class Engines:
    """Policy, reference and objective on this rank.

    Args:
        policy: trained.
        reference: frozen; None where the loss needs none.
        objective: the loss over the log-likelihoods of both.
        device: this rank's.
        precision: "bf16", "fp16" or "fp32", of both models.
    """

    def __init__(self, policy: Policy, reference: Reference | None, objective: Objective, device: torch.device,
                 precision: str):  # fmt: skip
        self.policy, self.reference, self.objective = policy, reference, objective
        self.device, self.precision = device, precision

    def zero_sums(self) -> Tensor:
        """Zero-initialised `objective.SUMS`, float64."""
        return torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)

    def load(self, batch: MicroBatch) -> MicroBatch:
        """A micro-batch on this rank's device; where the loss needs generated images and no table holds them, with
        those that the reference draws.
        """
        batch = batch.to(self.device)
        if self.objective.needs_generated and batch.generated_codes_BL is None:
            assert isinstance(self.reference, DrawingReference)
            batch.generated_codes_BL = self.reference.draw(batch)
        return batch

    def reference_tags(self) -> dict[str, float]:
        """What is logged of the reference at each step, of those that have something to log."""
        return self.reference.tags() if self.reference is not None else {}

    def reference_logp(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """log p_reference [R] float32 of the forward's rows; None where the loss needs none."""
        return self.reference(batch, inputs) if self.reference is not None else None

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss summed over B pairs, `SUMS` of the micro-batch, and log p_policy [R] without gradient."""
        inputs = self.objective.stacked(batch)  # [chosen, rejected]
        reference_logp = self.reference_logp(batch, inputs)
        policy_logp = self.policy(*inputs, compute=self.objective.compute)
        loss, sums = self.objective(policy_logp, reference_logp, batch)
        return loss, sums, policy_logp.detach()

    def require_finite(
        self, step: int, sums: Tensor, batches: Sequence[MicroBatch], logps: Sequence[Tensor], ranks: Ranks
    ) -> None:
        """Stop before the optimizer step where the loss is not finite, naming step, rank and samples.

        Args:
            step: index of the step, from 0.
            sums: `SUMS` over all ranks.
            batches, logps: this rank's micro-batches and log p_policy [R] of each.

        Raises:
            NonFinite: on every rank.
        """
        if math.isfinite(float(sums[SUMS.index("loss")])):
            return
        found = []
        for batch, logp in zip(batches, logps, strict=True):
            bad = ~logp.view(-1, len(batch.codes_BL)).isfinite().all(dim=0)
            found += batch.sample_indices_B[bad.cpu()].tolist()
        everyone: list[Any] = [None] * ranks.world_size
        torch.distributed.all_gather_object(everyone, (ranks.rank, ranks.host, found[:8]))
        named = "; ".join(f"rank {rank} ({host}): samples {samples}" for rank, host, samples in everyone if samples)
        where = "these samples" if named else "reference.weights and reference.cache"
        named = named or "the policy's log-likelihoods are"
        raise NonFinite(
            f"step {step + 1}: the loss is not finite ({named}); the optimizer has not stepped; "
            f"look at {where}, or lower optimizer.learning_rate or loss.beta"
        )


class OptimizerSteps:
    """Optimizer steps at the scheduled rate and decay.

    As in DeepSpeed, a step that the loss scaler skips (fp16) counts as a step and does not advance the schedules.

    Args:
        policy: stepped.
        optimizer, settings: the recipe's `optimizer` and `schedule` sections.
        steps, steps_per_epoch: of the run.
        say: prints a line on rank 0's console.
    """

    def __init__(self, policy: Policy, optimizer: schema.Optimizer, settings: schema.Schedule, steps: int,
                 steps_per_epoch: int, say: Callable[[str], None]):  # fmt: skip
        self.policy, self.optimizer, self.settings = policy, optimizer, settings
        self.steps, self.steps_per_epoch, self.say = steps, steps_per_epoch, say

    def __call__(self, step: int) -> dict[str, float]:
        """Take step `step` (from 0). Returns its tags: lr, grad_norm, and in fp16 loss_scale and skipped_steps.

        A step that was skipped has no grad_norm.

        Raises:
            NonFinite: the gradient is not finite, and there is no lower loss scale to try.
        """
        policy, scale = self.policy, self.policy.loss_scale
        taken = step - policy.skipped_steps
        rate = schedule.learning_rate(taken, self.steps, self.steps_per_epoch, self.optimizer, self.settings)
        decay = schedule.weight_decay(taken, self.steps, self.optimizer)
        try:
            norm = policy.step(rate, decay)
        except NonFinite as error:
            raise NonFinite(
                f"step {step + 1}: {error}; the optimizer has not stepped; resume from the last checkpoint "
                "with a lower optimizer.learning_rate"
            ) from None
        tags = {"lr": rate} if norm is None else {"lr": rate, "grad_norm": norm}
        if scale is None:
            return tags
        scale_now, skipped = policy.loss_scale, policy.skipped_steps
        if norm is None:
            self.say(
                f"WARNING: step {step + 1} was skipped: its gradient overflowed in fp16 at loss scale {scale:.10g}; "
                f"loss scale now {scale_now:.10g}, {skipped} step(s) skipped so far"
            )
        return tags | {"loss_scale": scale_now, "skipped_steps": float(skipped)}
