"""What a run computes, as balancing and utilization need it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from cca_ds.alignment.losses import LOSSES
from cca_ds.balance.measure import MOST_BLOCKS, Workload
from cca_ds.balance.memory import Sharding
from cca_ds.config.schema import RunConfig
from cca_ds.models.cost import model_cost
from cca_ds.models.from_recipe import build_shortened
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.training.utilization import pair_flops


def workload_of(
    run: RunConfig, ds: dict[str, Any], ranks: int, precision: str, tokenizer: nn.Module | None = None
) -> Workload:
    """The workload of a run on `ranks` ranks.

    Args:
        run: the recipe.
        ds: DeepSpeed's file as read.
        precision: "bf16", "fp16" or "fp32".
        tokenizer: VAR's.
    """
    loss, sharding = LOSSES[run.loss.name], Sharding.of(ds)
    workload = Workload(
        model=model_cost(run.model.preset, run.model.shape, run.model.dropout),
        build=lambda: build_shortened(run.model, MOST_BLOCKS, tokenizer),
        precision=precision,
        rows_per_pair=loss.rows_per_pair,
        sharding=sharding,
        compute=loss.forward,
    )
    if not loss.needs_reference:
        return workload
    held = PLACEMENTS[run.reference.placement].held_bytes(
        workload.model, sharding, workload.element_bytes, ranks, run.reference.offload
    )
    return replace(workload, reference_bytes=held)


def trained_flops(run: RunConfig, workload: Workload) -> float:
    """Operations that one pair costs the trainers, for `Utilization`."""
    loss = LOSSES[run.loss.name]
    reference = loss.needs_reference and PLACEMENTS[run.reference.placement].on_trainers
    return pair_flops(workload.model, workload.rows_per_pair, reference, loss.extra_forwards)
