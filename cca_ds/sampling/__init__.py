"""Sampling codes from either family, one function for both."""

from collections.abc import Sequence

import torch
from torch import nn

from cca_ds.models.llamagen.decode import sample_raster
from cca_ds.sampling.guidance import Draw, guidance_scales, image_uniforms


@torch.no_grad()
def generate(
    model: nn.Module,
    labels_B: torch.Tensor,
    guidance_scale: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
    *,
    image_indices_B: Sequence[int] | None = None,
    guidance_schedule: str = "constant",
    guidance_interval: tuple[int, int] | None = None,
    log_lambda: float | None = None,
    cuda_graphs: bool = False,
) -> torch.Tensor:
    """Codes [B, L] int64 of new images of the given labels [B], on the model's device.

    `guidance_scale` is the paper's s, logits = c + s (c - u); at 0 the unconditional half is never run. Image
    b is seeded by (`seed`, `image_indices_B[b]`, by default b) alone, so it is the same whatever batch or
    rank it is made in. `log_lambda` is the natural logarithm of lambda for a model conditioned on it.
    `cuda_graphs` replays the decoding step of a LlamaGen as CUDA graphs, on a GPU. Raises ValueError for
    settings that make no sense.
    """
    labels_B = torch.as_tensor(labels_B, dtype=torch.int64, device="cpu")
    wrong = labels_B[(labels_B < 0) | (labels_B > model.num_classes)]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} is outside the model's classes 0..{model.num_classes - 1} "
            f"({model.num_classes} is no condition)"
        )
    draw = Draw(temperature, top_k, top_p)
    steps = model.sequence_length if model.family == "llamagen" else len(model.config.scales)
    scales = guidance_scales(guidance_scale, steps, guidance_schedule, guidance_interval)
    device = next(model.parameters()).device
    indices = range(len(labels_B)) if image_indices_B is None else image_indices_B
    if len(indices) != len(labels_B):
        raise ValueError(f"{len(indices)} image indices for {len(labels_B)} labels: give one index per label")
    uniforms_BL = image_uniforms(seed, indices, model.sequence_length).to(device)
    log_lambda_B = None if log_lambda is None else torch.full((len(labels_B),), log_lambda, device=device)
    arguments = (model, labels_B.to(device), scales, uniforms_BL, draw, log_lambda_B)
    was_training = model.training
    model.eval()
    try:
        if model.family == "llamagen":
            return sample_raster(*arguments, cuda_graphs=cuda_graphs)
        from cca_ds.models.var.decode import sample_next_scale

        return sample_next_scale(*arguments)
    finally:
        model.train(was_training)
