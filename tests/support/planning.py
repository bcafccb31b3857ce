"""A job to plan: a published model on ImageNet, sharded as ds_configs/zero3.json says."""

import json
from pathlib import Path

from cca_ds.balance.memory import Sharding
from cca_ds.models.cost import model_cost
from cca_ds.planning.job import Job

ZERO3 = Sharding.of(json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text()))
IMAGES = 1_281_167


def job_of(preset: str = "llamagen-3b", pairs: int = 256, sharding: Sharding = ZERO3, **rest: object) -> Job:
    """`pairs` pairs a step, all of ImageNet's training images an epoch."""
    return Job(model_cost(preset), sharding, pairs, IMAGES, **rest)
