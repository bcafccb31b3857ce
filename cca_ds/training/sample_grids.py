"""Sample grids of the policy as it stands, drawn by rank 0 from a whole copy of the weights.

They are drawn as `cca_ds.sample` would draw them, by the recipe's `sampling`: guidance, top-k, seed and all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cca_ds.config.schema import RunConfig
from cca_ds.data.image_grid import image_grid
from cca_ds.models import DTYPES
from cca_ds.sampling import generate
from cca_ds.sampling.sampler import drawing
from cca_ds.training.policy import build_module

if TYPE_CHECKING:
    from cca_ds.training.session import Session


def draw_samples(session: Session, done: int) -> None:
    """A grid with one class a column into the log, after step number `done`; collective, and done by rank 0.

    Sampling in the sharded module itself would gather every weight once per code.
    """
    weights = {name: tensor for name, tensor in session.policy.full_weights() if tensor is not None}
    if session.ranks.rank == 0 and session.tokenizer is not None:
        with torch.random.fork_rng(devices=[session.device] if session.device.type == "cuda" else []):
            module = build_module(session.run, session.tokenizer)
            module.load_state_dict(weights, strict=False)
            module.to(session.device, DTYPES[session.precision]).eval()
            images = _sample(session, module)
        session.log.image("samples", done, image_grid(images, columns=_columns(session.run, module)),
                          f"step_{done:06d}.png")  # fmt: skip


def _columns(run: RunConfig, module: torch.nn.Module) -> int:
    return min(module.num_classes, 10, run.logging.samples_per_grid)


@torch.no_grad()
def _sample(session: Session, module: torch.nn.Module) -> torch.Tensor:
    run = session.run
    columns = _columns(run, module)
    classes = torch.arange(columns) * (module.num_classes // columns)
    labels_B = classes.repeat(-(-run.logging.samples_per_grid // columns))[: run.logging.samples_per_grid]
    codes_BL = generate(module, labels_B.to(session.device), **drawing(run))
    tokenizer = session.tokenizer.to(session.device)
    return tokenizer.decode(codes_BL).float().cpu()
