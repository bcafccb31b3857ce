"""Sample grids of the policy while it trains, drawn by rank 0 from a whole copy of the weights.

They are drawn as `cca_ds/sample.py` would draw them, by the recipe's `sampling` section.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cca_ds.config.schema import RunConfig
from cca_ds.data.image_grid import image_grid
from cca_ds.models import DTYPES
from cca_ds.models.from_recipe import build_module
from cca_ds.sampling import generate
from cca_ds.sampling.drawing import draw_settings, sampling_lambda
from cca_ds.training.policy import Policy
from cca_ds.training.run_log import RunLog

_COLUMNS = 10


class SampleGrids:
    """Draws a grid of the policy's samples into the run's log.

    Args:
        run: the recipe; `logging` sets the steps and the size of a grid, `sampling` how a code is drawn.
        tokenizer: decodes the codes; without one nothing is drawn.
        precision: of the copy, the run's.
        device: this rank's.
        steps: of the whole run.
        log: gets the picture.
    """

    def __init__(self, run: RunConfig, tokenizer: nn.Module | None, precision: str, device: torch.device, steps: int,
                 log: RunLog):  # fmt: skip
        self.run, self.tokenizer, self.precision, self.device = run, tokenizer, precision, device
        self.steps, self.log = steps, log

    def due(self, done: int) -> bool:
        """Whether a grid is to be drawn after `done` steps: before the first, every so many, and after the last."""
        every = self.run.logging.sample_every_steps
        return bool(every) and self.tokenizer is not None and (done % every == 0 or done == self.steps)

    def draw(self, policy: Policy, done: int) -> None:
        """Draw a grid after `done` steps, a class a column; collective, and drawn on rank 0.

        Sampling in the sharded module would gather every weight once per code.
        """
        weights = {name: tensor for name, tensor in policy.full_weights() if tensor is not None}
        if not weights:  # not rank 0
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            module = build_module(self.run.model, self.tokenizer)
            module.load_state_dict(weights, strict=False)
            module.to(self.device, DTYPES[self.precision]).eval()
            columns = min(module.num_classes, _COLUMNS, self.run.logging.samples_per_grid)
            grid = image_grid(self._sample(module, columns), columns=columns)
        self.log.image("samples", done, grid, f"step_{done:06d}.png")

    @torch.no_grad()
    def _sample(self, module: nn.Module, columns: int) -> Tensor:
        """Images [B, C, H, W] on the CPU, classes spread over all, one a column."""
        assert self.tokenizer is not None
        images = self.run.logging.samples_per_grid
        classes = torch.arange(columns) * (module.num_classes // columns)
        labels_B = classes.repeat(-(-images // columns))[:images]
        sampling, model = self.run.sampling, self.run.model
        lambda_ = sampling_lambda(sampling, self.run.loss.lambda_, model.lambda_conditioning)
        codes_BL = generate(module, labels_B.to(self.device), **draw_settings(sampling, lambda_), cuda_graphs=True)
        return self.tokenizer.to(self.device).decode(codes_BL).float().cpu()
