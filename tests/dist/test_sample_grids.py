"""The grids that a run draws while it trains are those of its recipe's sampling section."""

import numpy as np
import pytest
import torch
from PIL import Image

from cca_ds.data.image_grid import image_grid
from cca_ds.models import create_model, load_weights
from cca_ds.sampling import generate
from cca_ds.vq import create_tokenizer
from tests.dist.runs import SHAPE, tiny_weights, train

pytestmark = pytest.mark.dist

DRAWN = {"guidance_scale": 2.0, "guidance_schedule": "linear", "guidance_interval": (8, 60), "seed": 5}


def grid(**settings) -> np.ndarray:
    """Two rows of the ten classes, drawn by the run's starting weights."""
    model = create_model("digits", **SHAPE)
    load_weights(model, tiny_weights())
    codes_BL = generate(model, torch.arange(20) % 10, **settings)
    return image_grid(create_tokenizer("digits").decode(codes_BL), columns=10)[..., 0]


def test_guidance_is_the_recipes(tmp_path):
    settings = [f"sampling.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in DRAWN.items()]
    train(1, tmp_path, "batch.max_steps=1", "logging.sample_every_steps=1", "logging.samples_per_grid=20", *settings)
    drawn = np.asarray(Image.open(tmp_path / "samples" / "step_000000.png"))
    np.testing.assert_array_equal(drawn, grid(**DRAWN))
    for left_out in DRAWN:  # each of them shapes the pictures
        assert not np.array_equal(drawn, grid(**{key: DRAWN[key] for key in DRAWN if key != left_out}))
