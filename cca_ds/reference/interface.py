"""What every reference is, and what it is built from.

Letters: R rows of a forward ([chosen, rejected] stacked), L codes per image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from cca_ds.cluster.coordination import Coordinator
from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import MicroBatch
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import GeneratedCodes


class Reference(ABC):
    """log p_reference of a forward's rows."""

    @abstractmethod
    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """[R] float32 without gradient; `inputs` are the policy's: codes [R, L], labels [R] (and log lambda [R])."""

    def tags(self) -> dict[str, float]:
        """What is logged at each step; nothing by default."""
        return {}

    def finished(self, step: int) -> None:  # noqa: B027, may be left out
        """Called on every rank when the run has ended after `step` steps; does nothing by default."""


class DrawingReference(Reference):
    """A reference that draws images too: that of a placement with `Placement.draws`."""

    @abstractmethod
    def draw(self, batch: MicroBatch) -> Tensor:
        """Codes [B, L] int64 of an image for each pair's label; of masked pairs the pair's own codes."""


@dataclass(frozen=True)
class ReferenceInputs:
    """What a placement builds the reference from.

    Args:
        weights: the full float32 state dict on rank 0, None on other ranks.
        precision: "bf16", "fp16" or "fp32".
        tokenizer: for models that hold its codebook (VAR).
        table: the codes that the run trains on.
        coordinator: this process among the ranks.
        generated: images that the reference drew, where the run trains on a table of them.
    """

    run: RunConfig
    weights: dict[str, Tensor] | None
    precision: str
    tokenizer: nn.Module | None
    table: CodeTable
    coordinator: Coordinator
    generated: GeneratedCodes | None = None
