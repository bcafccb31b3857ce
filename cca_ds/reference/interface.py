"""What every reference is, and what it is built from.

Letters: R rows of a forward ([chosen, rejected] stacked), L codes per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from cca_ds.cluster.coordination import Coordinator
from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import MicroBatch
from cca_ds.data.codes import CodeTable


class Reference(Protocol):
    """log p_reference of a forward's rows."""

    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """[R] float32 without gradient; `inputs` are the policy's: codes [R, L], labels [R] (and log lambda [R])."""
        ...


@dataclass(frozen=True)
class ReferenceInputs:
    """What a placement builds the reference from.

    Args:
        weights: the full float32 state dict on rank 0, None on other ranks.
        precision: "bf16", "fp16" or "fp32".
        tokenizer: for models that hold its codebook (VAR).
        table: the codes that the run trains on.
        coordinator: this process among the ranks.
    """

    run: RunConfig
    weights: dict[str, Tensor] | None
    precision: str
    tokenizer: nn.Module | None
    table: CodeTable
    coordinator: Coordinator
