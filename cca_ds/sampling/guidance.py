"""Guidance, per-image random numbers and the draw of one code: what the samplers of all families share.

Guidance is the paper's s (arXiv 2410.09347, equation 3): logits = c + s (c - u), and s = 0 is guidance-free. A family's
own number may be another, as LlamaGen's g = s + 1 (u + g (c - u)).

Legend: B images, or rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cca_ds.config.recipes import ConfigError
from cca_ds.models.base import Family

_SCHEDULES = ("constant", "linear")


def family_scale(family: Family, scale: float) -> float:
    """The family's own guidance number for the paper's s: LlamaGen's g = s + 1, VAR's s."""
    return scale + family.guidance_offset


def paper_scale(family: Family, own_scale: float) -> float:
    """The paper's s for a family's own number, the inverse of `family_scale`."""
    return own_scale - family.guidance_offset


def chosen_scale(family: Family, scale: float | None, own_scale: float | None, default: float) -> float:
    """The paper's s that a command line sets, by --guidance_scale or by the family's own number in --cfg_scale.

    `default` where it sets neither. Raises ConfigError when it sets both, and for a negative or infinite s.
    """
    if scale is not None and own_scale is not None:
        raise ConfigError(["--guidance_scale and --cfg_scale set the same number; give one"])
    if own_scale is not None:
        scale = paper_scale(family, own_scale)
    if scale is not None and not 0.0 <= scale < float("inf"):
        raise ConfigError([f"guidance s = {scale:g} must be finite and at least 0 (0 is guidance-free)"])
    return default if scale is None else scale


def chosen_gft_beta(given: float | None, default: float | None, conditioned: bool) -> float | None:
    """GFT's beta that a command line sets; `default` where it does not.

    Raises ConfigError for a model that is not conditioned on it, and for a beta outside (0, 1].
    """
    if given is None:
        return default
    if not conditioned:
        raise ConfigError([f"--gft_beta {given:g}: the model is not trained by GFT; leave it out, or name its recipe"])
    if not 0.0 < given <= 1.0:
        raise ConfigError([f"--gft_beta {given:g}: must be above 0 and at most 1 (1 is the plain model)"])
    return given


def gft_scale(gft_beta: float) -> float:
    """The guidance s whose samples GFT's beta is meant to give without guidance: (1 - beta) / beta."""
    return (1.0 - gft_beta) / gft_beta


def describe_guidance(family: Family, scale: float) -> str:
    """One phrase for the log with both numbers, as in "guidance s = 0.5 (LlamaGen's cfg-scale = 1.5)"."""
    return f"guidance s = {scale:g} ({family.guidance_name} = {family_scale(family, scale):g})"


def guidance_scales(
    scale: float, steps: int, schedule: str = "constant", interval: tuple[int, int] | None = None
) -> list[float]:
    """The guidance s of every sampling step (LlamaGen's step is a code, VAR's a scale).

    "constant" holds s; "linear" grows from 0 at the first step to s at the last (VAR's "cfg v2"). `interval`
    is the half-open range of steps that are guided, the others get 0; LlamaGen's `cfg_interval=k` is `(0, k +
    2)`, since it counts from the second code. Raises ValueError for an unknown schedule, a negative scale or
    an empty interval.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"guidance_schedule={schedule!r} is unknown: choose one of {', '.join(_SCHEDULES)}")
    if not 0.0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale={scale} must be a finite number of at least 0 (0 is guidance-free)")
    first, end = (0, steps) if interval is None else interval
    if not 0 <= first < end:
        raise ValueError(f"guidance_interval=({first}, {end}) must be a range of steps with 0 <= first < end")
    growth = [1.0] * steps if schedule == "constant" else [step / max(steps - 1, 1) for step in range(steps)]
    return [scale * growth[step] if first <= step < end else 0.0 for step in range(steps)]


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Guided logits c + s (c - u) (equation 3), any shape; s = 0 returns `cond` itself."""
    return torch.lerp(uncond, cond, 1.0 + scale) if scale else cond


def image_uniforms(seed: int, image_indices_B: Sequence[int] | np.ndarray, length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), [B, length] float64 on the CPU, one independent Philox stream per (seed,
    image).

    The numbers of an image depend on nothing but the seed and its index, so it is the same image in any batch
    and on any rank.
    """
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    uniforms_BL = np.empty((len(image_indices_B), length))
    for row, index in enumerate(image_indices_B):
        key[1] = int(index) % 2**64
        np.random.Generator(np.random.Philox(key=key)).random(out=uniforms_BL[row])
    return torch.from_numpy(uniforms_BL)


def _keep_top_k(logits_BV: torch.Tensor, top_k: int) -> torch.Tensor:
    smallest_kept_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_kept_B1, -torch.inf)


def _keep_top_p(probabilities_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero what lies outside the smallest set of most probable codes holding `top_p` of the probability."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV = sorted_BV.masked_fill(before_BV > top_p, 0.0)
    return torch.zeros_like(probabilities_BV).scatter_(1, order_BV, sorted_BV)


def draw_codes(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """One code per row, [B] int64: the inverse of the cumulative distribution at `uniforms_B` (float64, in
    [0, 1)).

    Codes below the `top_k`-th logit are left out first, then those outside the nucleus `top_p`, both as in
    LlamaGen and VAR. `top_k=1` is argmax and reads no random number.
    """
    if top_k == 1:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float()
    if temperature != 1.0:
        logits_BV = logits_BV / temperature
    if top_k:
        logits_BV = _keep_top_k(logits_BV, top_k)
    probabilities_BV = logits_BV.softmax(-1)
    if top_p < 1.0:
        probabilities_BV = _keep_top_p(probabilities_BV, top_p)
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    # strictly below the total, so that rounding never reaches a code of probability 0 at the end
    threshold_B1 = torch.minimum(uniforms_B[:, None] * total_B1, total_B1 * (1.0 - 1e-15))
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]


@dataclass(frozen=True)
class Draw:
    """How a code is drawn from its distribution: settings shared by all steps, checked once."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be above 0; for the most probable code use top_k=1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 keeps every code)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1] (1 keeps every code)")

    def __call__(
        self, cond_BV: torch.Tensor, uncond_BV: torch.Tensor | None, scale: float, uniforms_B: torch.Tensor
    ) -> torch.Tensor:
        """`draw_codes` with these settings, [B] int64, from logits guided in float32 where `uncond_BV` is given."""
        logits_BV = cond_BV if uncond_BV is None else guide(cond_BV.float(), uncond_BV.float(), scale)
        return draw_codes(logits_BV, uniforms_B, self.temperature, self.top_k, self.top_p)
