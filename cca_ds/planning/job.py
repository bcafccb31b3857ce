"""What is to be trained, as far as memory and time depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cca_ds.alignment.losses import LOSSES
from cca_ds.balance.memory import Memory, Sharding, memory_of
from cca_ds.config.schema import RunConfig
from cca_ds.data.generated import ONLINE
from cca_ds.models.cost import ModelCost
from cca_ds.planning.drawing import Drawing, drawing_seconds
from cca_ds.planning.nodes import NodeGroup
from cca_ds.reference.placements import PLACEMENTS, Placement

MOST_IMAGES = 10**12


@dataclass(frozen=True)
class Job:
    """A model, how it is sharded, `pairs` a step and `images` an epoch.

    `rows_per_pair`, `needs_reference`, `passes` and `extra_forwards` are the loss's (`LossSpec`), `reference_offload`
    is `reference.offload`, `element_bytes` are those of a weight, `drawing` is None where no images are drawn.
    """

    model: ModelCost
    sharding: Sharding
    pairs: int
    images: int
    rows_per_pair: int = 2
    needs_reference: bool = True
    passes: int = 4
    extra_forwards: int = 0
    reference_offload: bool = False
    element_bytes: int = 2
    drawing: Drawing | None = None

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last, incomplete batch is left out."""
        return max(1, self.images // self.pairs)

    @property
    def placements(self) -> list[Placement | None]:
        """The placements to compare; None alone where the loss needs no reference."""
        if not self.needs_reference:
            return [None]
        online = self.drawing is not None and self.drawing.online
        return [placement for placement in PLACEMENTS.values() if placement.draws or not online]

    def drawing_seconds(self, groups: Sequence[NodeGroup], producers: bool) -> float:
        """Seconds of a step in which the GPUs of `groups` draw its images; 0 where that is not done step by step.

        `producers` says whether they are those of a streamed reference, or the trainers.
        """
        if self.drawing is None or not self.drawing.online:
            return 0.0
        at_once = self.drawing.producers_at_once if producers else self.drawing.at_once
        return self.pairs * drawing_seconds(self.model, groups, at_once, self.element_bytes)

    def memory(self, placement: Placement | None, ranks: int, checkpointing: bool) -> Memory:
        """Bytes on each of `ranks` GPUs; `placement` None where the loss needs no reference."""
        return memory_of(
            self.model,
            self.sharding,
            ranks,
            checkpointing,
            reference_bytes=self._reference_bytes(placement, ranks),
            rows_per_pair=self.rows_per_pair,
            element_bytes=self.element_bytes,
        )

    def _reference_bytes(self, placement: Placement | None, ranks: int) -> float:
        if placement is None:
            return 0.0
        return placement.held_bytes(self.model, self.sharding, self.element_bytes, ranks, self.reference_offload)


def job_of(run: RunConfig, model: ModelCost, sharding: Sharding, images: int) -> Job:
    """The job of a recipe whose model costs `model`, over `images` images an epoch.

    Raises:
        ValueError: fewer than 1 image.
    """
    if not 1 <= images <= MOST_IMAGES:
        raise ValueError(f"--images {images}: an epoch has at least one image, and at most {MOST_IMAGES:,}")
    loss = LOSSES[run.loss.name]
    return Job(
        model=model,
        sharding=sharding,
        pairs=run.batch.global_size,
        images=images,
        rows_per_pair=loss.rows_per_pair,
        needs_reference=loss.needs_reference,
        passes=loss.passes,
        extra_forwards=loss.extra_forwards,
        reference_offload=run.reference.offload,
        element_bytes=4 if run.precision == "fp32" else 2,
        drawing=_drawing_of(run) if loss.negatives == "generated" else None,
    )


def _drawing_of(run: RunConfig) -> Drawing:
    """Online, the pairs of a forward are drawn at once."""
    online = run.data.generated == ONLINE
    return Drawing(online, usual_micro(run) if online else run.sampling.batch_size, run.reference.batch_size)


def usual_micro(run: RunConfig) -> int:
    """Pairs of a forward where no device is known: the recipe's, or 8 where the devices' memory sets them."""
    return min(8, run.batch.global_size) if run.batch.micro_size == "auto" else run.batch.micro_size


def placement_of(run: RunConfig) -> Placement | None:
    """The recipe's placement; None where its loss needs no reference."""
    return PLACEMENTS[run.reference.placement] if LOSSES[run.loss.name].needs_reference else None
