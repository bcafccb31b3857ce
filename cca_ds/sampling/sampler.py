"""A recipe's model and tokenizer on every rank, and the images they draw into one folder.

Letters: B images, L codes per image, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cca_ds.checkpoints.run_weights import fill_module, share_module
from cca_ds.cluster.launch import Ranks
from cca_ds.config.recipes import resolve_path
from cca_ds.config.schema import RunConfig
from cca_ds.console import progress
from cca_ds.models import DTYPES, PRESETS, create_model, preset_name
from cca_ds.sampling import generate
from cca_ds.sampling.image_folder import SampleFolder, to_pixels
from cca_ds.vq import create_tokenizer, weights_hash

DECODED = 32  # images that the tokenizer decodes at once


@dataclass(frozen=True)
class Source:
    """Where the weights come from: a file or a run's folder, one of its checkpoints, its moving average."""

    path: Path
    checkpoint: Path | None = None
    average: bool = False


@dataclass(frozen=True)
class Sampler:
    """Model and tokenizer on this rank's device, with the hashes of their weights (on rank 0)."""

    model: nn.Module
    tokenizer: nn.Module
    weights_sha256: str
    tokenizer_hash: str


def family_of(run: RunConfig) -> str:
    """ "llamagen" or "var". Raises ValueError for an unknown preset."""
    return PRESETS[preset_name(run.model.preset)][0]


def log_lambda(run: RunConfig) -> float | None:
    """Logarithm of sampling.lambda, else of the loss's, for a lambda-conditioned model; None for another."""
    return math.log(run.sampling.lambda_ or run.loss.lambda_) if run.model.lambda_conditioning else None


def drawing(run: RunConfig) -> dict[str, Any]:
    """What `generate` takes from a recipe: guidance, the draw of a code, the seed, lambda."""
    settings = run.sampling
    names = (
        "guidance_scale",
        "guidance_schedule",
        "guidance_interval",
        "temperature",
        "top_k",
        "top_p",
        "seed",
    )
    return {**{name: getattr(settings, name) for name in names}, "log_lambda": log_lambda(run)}


def on_first(ranks: Ranks, action: Callable[[], Any]) -> None:
    """Run `action` on rank 0; where it fails, every rank raises ValueError with its line. Collective."""
    if ranks.world_size == 1:
        action()
        return
    problem: list[str | None] = [None]
    if ranks.rank == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ValueError(problem[0])


def load_sampler(run: RunConfig, source: Source, ranks: Ranks, precision: str) -> Sampler:
    """Read the weights on rank 0 and give them to all; collective.

    Raises:
        ValueError: a tokenizer without weights; WeightsError, CheckpointError: weights that cannot be had.
    """
    if run.tokenizer.name != "digits" and run.tokenizer.weights is None:
        raise ValueError(
            f"tokenizer.weights is missing: --set tokenizer.weights=FILE ({run.tokenizer.name}'s)"
        )
    weights = resolve_path(run.tokenizer.weights) if run.tokenizer.weights else None
    tokenizer = create_tokenizer(run.tokenizer.name, weights=weights, **run.tokenizer.options)
    with torch.device(ranks.device):  # first weights of 3 B parameters take a CPU half a minute
        model = create_model(run.model.preset, tokenizer, **run.model.shape)
    _check_fit(run, model, tokenizer)
    on_first(ranks, lambda: fill_module(model, source.path, source.checkpoint, source.average))
    sha256 = weights_hash(model) if ranks.rank == 0 else ""
    if ranks.world_size > 1:
        share_module(model)
    model = model.to(ranks.device, DTYPES[precision]).eval()
    return Sampler(model, tokenizer.to(ranks.device), sha256, tokenizer.hash())


def draw_missing(
    run: RunConfig, sampler: Sampler, folder: SampleFolder, wanted: Sequence[int], ranks: Ranks,
    side: int | None = None, cuda_graphs: bool = True,
) -> int:  # fmt: skip
    """Draw the images of this rank's share of `wanted` that are not in the folder yet; returns their number.

    Args:
        side: resize to this many pixels a side; None leaves the tokenizer's.
        cuda_graphs: replay LlamaGen's decoding step as CUDA graphs where the device is a GPU.
    """
    model, size = sampler.model, run.sampling.batch_size
    missing = folder.missing(wanted[ranks.rank :: ranks.world_size])
    batches = [missing[i : i + size] for i in range(0, len(missing), size)]
    show = ranks.rank == 0 and run.logging.progress
    try:
        for indices in progress(batches, "sample", len(batches), show=show):
            codes_BL = generate(
                model,
                torch.tensor([index % model.num_classes for index in indices]),
                image_indices_B=indices,
                cuda_graphs=cuda_graphs and ranks.device.startswith("cuda"),
                **drawing(run),
            )
            for start in range(0, len(indices), DECODED):
                images_BCHW = decode(sampler.tokenizer, codes_BL[start : start + DECODED], side)
                folder.write(indices[start : start + DECODED], to_pixels(images_BCHW, model.family))
    finally:
        folder.close()
    return len(missing)


@torch.no_grad()
def decode(tokenizer: nn.Module, codes_BL: Tensor, side: int | None = None) -> Tensor:
    """Images [B, C, H, W] float32 around [-1, 1], resized as LlamaGen's sampling program does.

    Bicubic without antialiasing, before values beyond the range are cut off (LlamaGen's `sample_c2i_ddp.py`).
    """
    images_BCHW = tokenizer.decode(codes_BL).float()
    if side is None or side == images_BCHW.shape[-1]:
        return images_BCHW
    return interpolate(images_BCHW, size=(side, side), mode="bicubic")


def _check_fit(run: RunConfig, model: nn.Module, tokenizer: nn.Module) -> None:
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"tokenizer {run.tokenizer.name} has {tokenizer.vocab_size} codes, model {run.model.preset} "
            f"{model.vocab_size}: they do not belong together"
        )
