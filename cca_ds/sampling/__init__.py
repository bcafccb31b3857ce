"""Sampling codes: one function for all families of models."""

from collections.abc import Sequence

import torch
from torch import nn

from cca_ds.models.registry import family_of_model
from cca_ds.ops.attention import decoding_attention_backends
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
    gft_beta: float | None = None,
    cuda_graphs: bool = False,
) -> torch.Tensor:
    """Codes [B, L] int64 of new images of the given labels [B], on the model's device.

    Args:
        guidance_scale: the paper's s, logits = c + s (c - u); at 0 the unconditional half is never run.
        top_k, top_p, temperature: of the draw of a code, see `guidance.draw_codes`.
        seed: of the images; image b depends on (`seed`, `image_indices_B[b]`) alone, so that it is the same in
            any batch and on any rank.
        image_indices_B: B numbers, by default 0 to B - 1.
        guidance_schedule, guidance_interval: of s over the sampling steps, see `guidance.guidance_scales`.
        log_lambda: natural logarithm of lambda, for a model conditioned on it.
        gft_beta: in (0, 1], for a model trained by GFT: guidance-free samples like those of s = (1 - beta) / beta.
        cuda_graphs: replay the decoding step as CUDA graphs where the family and the device can.

    Raises:
        ValueError: a label outside the classes, or settings out of their range.
    """
    labels_B = torch.as_tensor(labels_B, dtype=torch.int64, device="cpu")
    wrong = labels_B[(labels_B < 0) | (labels_B > model.num_classes)]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} is outside the model's classes 0..{model.num_classes - 1} "
            f"({model.num_classes} is no condition)"
        )
    if gft_beta is not None and not 0.0 < gft_beta <= 1.0:
        raise ValueError(f"gft_beta={gft_beta:g} must be above 0 and at most 1")
    draw = Draw(temperature, top_k, top_p)
    family = family_of_model(model)
    steps = family.guidance_steps(model.config)
    scales = guidance_scales(guidance_scale, steps, guidance_schedule, guidance_interval)
    device = next(model.parameters()).device
    indices = range(len(labels_B)) if image_indices_B is None else image_indices_B
    if len(indices) != len(labels_B):
        raise ValueError(f"{len(indices)} image indices for {len(labels_B)} labels: give one index per label")
    uniforms_BL = image_uniforms(seed, indices, model.sequence_length).to(device)
    labels_B = labels_B.to(device)
    conditioning_B = model.given_conditioning(labels_B, log_lambda=log_lambda, gft_beta=gft_beta)
    was_training = model.training
    model.eval()
    try:
        with decoding_attention_backends():
            return family.generate(model, labels_B, scales, uniforms_BL, draw, conditioning_B, cuda_graphs=cuda_graphs)
    finally:
        model.train(was_training)
