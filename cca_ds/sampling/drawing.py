"""Images drawn from a model into a folder, and the settings that they are drawn with.

Letters: B images, L codes per image, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import cca_ds
from cca_ds.config.recipes import ConfigError
from cca_ds.config.schema import Sampling
from cca_ds.console import progress
from cca_ds.models.base import Family
from cca_ds.models.registry import family_of_model
from cca_ds.sampling import generate
from cca_ds.sampling.guidance import describe_guidance, family_scale, gft_scale
from cca_ds.sampling.image_folder import SampleFolder, to_pixels

LARGEST_SIDE = 8192  # pixels
DECODED = 32  # images that the tokenizer decodes at once
# fields of a recipe's `sampling` that `generate` takes
_OF_GENERATE = (
    "guidance_scale", "guidance_schedule", "guidance_interval", "gft_beta", "temperature", "top_k", "top_p", "seed"
)  # fmt: skip


def check_side(side: int | None) -> None:
    """Raise ConfigError for a side in pixels that images cannot be resized to; None keeps the tokenizer's."""
    if side is not None and not 1 <= side <= LARGEST_SIDE:
        raise ConfigError([f"--resize {side}: give the side in pixels, 1 to {LARGEST_SIDE}, e.g. 256"])


def sampling_lambda(sampling: Sampling, loss_lambda: float, conditioned: bool) -> float | None:
    """The lambda to sample a lambda-conditioned model at: sampling.lambda, else the loss's; None for another model."""
    return (sampling.lambda_ or loss_lambda) if conditioned else None


def draw_settings(sampling: Sampling, lambda_: float | None = None) -> dict[str, Any]:
    """Keyword arguments of `generate` from a recipe's `sampling`: guidance, the draw of a code, the seed, log lambda.

    `lambda_` is what `sampling_lambda` returns.
    """
    log_lambda = None if lambda_ is None else math.log(lambda_)
    return {**{name: getattr(sampling, name) for name in _OF_GENERATE}, "log_lambda": log_lambda}


def describe_settings(
    sampling: Sampling, family: Family, lambda_: float | None, precision: str, side: int | None
) -> dict[str, Any]:
    """What shapes the images besides the weights, in JSON's types, for sampling.json and the evaluation's report.

    `lambda_` is what `sampling_lambda` returns; `side` the side in pixels that images are resized to, if any.
    """
    settings = sampling.model_dump(mode="json", by_alias=True, exclude={"batch_size"})
    return {
        **settings,
        "lambda": lambda_,
        "guidance_of_family": family_scale(family, sampling.guidance_scale),
        "guidance_of_gft_beta": None if sampling.gft_beta is None else gft_scale(sampling.gft_beta),
        "precision": precision,
        "resize": side and f"bicubic to {side}",
        "versions": {"cca_ds": cca_ds.__version__, "torch": torch.__version__},
    }


def describe_draw(sampling: Sampling, family: Family, folder: SampleFolder, indices: Sequence[int]) -> str:
    """One phrase for the log: images, those already in the folder, guidance by both numbers, how a code is drawn."""
    beta = sampling.gft_beta
    gft = "" if beta is None else f"GFT's beta {beta:g} (like s = {gft_scale(beta):.3g}), "
    return (
        f"{len(indices)} images, {len(indices) - len(folder.missing(indices))} of them there already; "
        f"{gft}{describe_guidance(family, sampling.guidance_scale)}, {sampling.guidance_schedule}; "
        f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, "
        f"seed {sampling.seed}"
    )


def draw_missing(
    model: nn.Module,
    tokenizer: nn.Module,
    folder: SampleFolder,
    indices: Sequence[int],
    settings: Mapping[str, Any],
    batch_size: int,
    *,
    side: int | None = None,
    cuda_graphs: bool = True,
    show: bool = False,
) -> int:
    """Draw those of the images `indices` that are not in the folder yet; returns their number.

    Args:
        model, tokenizer: in eval mode, on one device.
        settings: see `draw_settings`.
        batch_size: images that the model samples at once; it does not change them.
        side: resize to this many pixels a side; None keeps the tokenizer's.
        cuda_graphs: see `generate`.
        show: a progress bar.

    Raises:
        OSError: the folder cannot be written; images written before are whole.
    """
    missing, shift = folder.missing(indices), family_of_model(model).pixel_shift
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    try:
        for batch in progress(batches, "sample", len(batches), show=show):
            labels_B = torch.tensor([index % model.num_classes for index in batch])
            codes_BL = generate(model, labels_B, image_indices_B=batch, cuda_graphs=cuda_graphs, **settings)
            for start in range(0, len(batch), DECODED):
                images_BCHW = decode(tokenizer, codes_BL[start : start + DECODED], side)
                folder.write(batch[start : start + DECODED], to_pixels(images_BCHW, shift))
    finally:
        folder.close()
    return len(missing)


@torch.no_grad()
def decode(tokenizer: nn.Module, codes_BL: Tensor, side: int | None = None) -> Tensor:
    """Images [B, C, H, W] float32 around [-1, 1] of codes [B, L], resized as LlamaGen's sampling program does.

    Bicubic without antialiasing, before values beyond the range are cut off (LlamaGen's `sample_c2i_ddp.py`).
    """
    images_BCHW = tokenizer.decode(codes_BL).float()
    if side is None or side == images_BCHW.shape[-1]:
        return images_BCHW
    return interpolate(images_BCHW, size=(side, side), mode="bicubic")
