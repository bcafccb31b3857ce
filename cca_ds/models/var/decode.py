"""Sampling from VAR, scale by scale (arXiv 2404.02905; `autoregressive_infer_cfg` in `models/var.py` of its program).

Keys and values of the coarser scales are kept; what the class determines (gates, scales, shifts) is computed once. The
unconditional half of the batch runs only as long as a scale to come is guided, so never without guidance.

Legend: B images, R rows (B, or 2 B with the unconditional half behind), S scales, L codes over all scales, l codes of
one scale, N = B l rows of a draw, V vocabulary, D width, H heads, C channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cca_ds.models.base import DrawCodes
from cca_ds.models.var.model import VAR
from cca_ds.ops.library import autocast_dtype


def sample_next_scale(
    model: VAR,
    labels_B: Tensor,
    scales: Sequence[float],
    uniforms_BL: Tensor,
    draw: DrawCodes,
    conditioning_B: Tensor | None = None,
    cuda_graphs: bool = False,
) -> Tensor:
    """Codes of all scales, [B, L] int64, one sampling step a scale; arguments as in `models.base.Generate`.

    Without CUDA graphs whatever `cuda_graphs`: every scale has its own shapes. Raises ValueError when the model has no
    tokenizer.
    """
    pyramid = model.require_pyramid()
    batch = len(labels_B)
    guided_until = max((index + 1 for index, strength in enumerate(scales) if strength), default=0)
    if guided_until:
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, model.null_class)])
        conditioning_B = None if conditioning_B is None else conditioning_B.repeat(2)
    transformer = _Transformer(model, labels_B, conditioning_B)
    sum_BZhh, codes = pyramid.empty(batch), []
    for scale, (start, end) in enumerate(model.scale_slices()):
        if scale == guided_until:
            transformer.keep_rows(batch)
        seen_BlZ = pyramid.next_input(sum_BZhh, scale) if scale else None
        # the head does not compute an unconditional half that this scale does not use
        logits_RlV = transformer.logits(scale, seen_BlZ, None if scales[scale] else batch)
        uncond_NV = logits_RlV[batch:].flatten(0, 1) if scales[scale] else None
        uniforms_N = uniforms_BL[:, start:end].flatten()
        codes_N = draw(logits_RlV[:batch].flatten(0, 1), uncond_NV, scales[scale], uniforms_N)
        codes.append(codes_N.view(batch, -1))
        if end < model.sequence_length:
            sum_BZhh += pyramid.contribution(codes[-1], scale)
    return torch.cat(codes, dim=1)


class _Transformer:
    """The model with the keys and values of the scales so far; the rows may become fewer on the way."""

    def __init__(self, model: VAR, labels_R: Tensor, conditioning_R: Tensor | None) -> None:
        self.model, self.slices = model, model.scale_slices()
        self.class_RD = model.condition(labels_R, conditioning_R)
        shared = model.shared_ada_lin(self.class_RD)
        self.adalns = [block.adaln(shared) for block in model.blocks]
        self.positions_1LD = model.positions()
        self.dtype = autocast_dtype(self.class_RD)
        config = model.config
        shape = (2, len(labels_R), config.n_head, config.sequence_length, config.dim // config.n_head)
        self.caches = [torch.empty(shape, dtype=self.dtype, device=labels_R.device) for _ in model.blocks]

    def keep_rows(self, rows: int) -> None:
        """Leave out all but the first rows from here on: the unconditional half is no longer needed."""
        self.class_RD = self.class_RD[:rows]
        self.adalns = [tuple(part[:rows] for part in adaln) for adaln in self.adalns]
        self.caches = [cache[:, :rows] for cache in self.caches]

    def _input(self, scale: int, seen_BlZ: Tensor | None) -> Tensor:
        if seen_BlZ is None:
            return self.model.first_input(self.class_RD, self.positions_1LD).to(self.dtype)
        start, end = self.slices[scale]
        word_embed = self.model.word_embed
        x_BlD = word_embed(seen_BlZ.to(word_embed.weight.dtype)) + self.positions_1LD[:, start:end]
        return x_BlD.to(self.dtype).repeat(len(self.class_RD) // len(x_BlD), 1, 1)

    def logits(self, scale: int, seen_BlZ: Tensor | None, head_rows: int | None) -> Tensor:
        """Logits [R, l, V] float32 of one scale, of the first `head_rows` rows only where that is given."""
        x_RlD = self._input(scale, seen_BlZ)
        start = self.slices[scale][0]
        for block, adaln, cache_2RHLC in zip(self.model.blocks, self.adalns, self.caches, strict=True):
            x_RlD = block.step(x_RlD, adaln, cache_2RHLC, start)
        x_RlD, class_RD = x_RlD[:head_rows], self.class_RD[:head_rows]
        return self.model.head(self.model.head_nm(x_RlD, class_RD)).float()
