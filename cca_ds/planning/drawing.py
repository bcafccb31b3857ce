"""What it costs to draw the images that a loss contrasts real ones with (DDO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cca_ds.cluster.devices import Device
from cca_ds.models.cost import ModelCost
from cca_ds.planning.nodes import NodeGroup


@dataclass(frozen=True)
class Drawing:
    """How a recipe draws them: step by step while training, or ahead into a table.

    `at_once` images at a time; online that is a forward of the trainers, and one of producers has `producers_at_once`.
    """

    online: bool
    at_once: int
    producers_at_once: int


def image_seconds(model: ModelCost, device: Device, at_once: int, element_bytes: int = 2) -> float:
    """Seconds an image on one GPU, where `at_once` are drawn together.

    Each of S sampling steps reads all weights once for all images, and of each image the keys and values so far, on
    average those of half its codes; a forward's operations are done once. The slower of memory and operations counts:

        max((S P b + B S L D n b) / bandwidth,  B forward / (peak x efficiency)) / B

    with P parameters of b bytes, B images, L codes, width D, n layers. Keys and values are 2 x L / 2 each. VAR's steps
    are its scales, whose last ones hold most codes, so for VAR their part is an upper bound.
    """
    steps = model.decode_steps
    weights = steps * model.parameters * element_bytes
    stored = at_once * steps * model.codes * model.width * model.layers * element_bytes
    reading = (weights + stored) / device.memory_bandwidth
    computing = at_once * model.forward_flops() / (device.peak_flops * device.efficiency)
    return max(reading, computing) / at_once


def drawing_seconds(model: ModelCost, groups: Sequence[NodeGroup], at_once: int, element_bytes: int = 2) -> float:
    """Seconds an image where all GPUs of `groups` draw side by side."""
    rates = (group.ranks / image_seconds(model, group.device, at_once, element_bytes) for group in groups)
    return 1 / sum(rates)
