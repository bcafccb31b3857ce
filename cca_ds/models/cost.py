"""What a model costs: its parameters, floating-point operations and activations, counted from its own modules.

Letters: L codes an image, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cca_ds.models.registry import create_model, family_of_model


@dataclass(frozen=True)
class ModelCost:
    """Sizes of one model that its memory and time follow from.

    `token_weights` are the matrix elements that every code is multiplied by, `image_weights` the parameters that an
    image uses once (VAR's adaptive norms). `block_token_elements` are the activations that one block keeps for its
    backward, in elements a code, and `block_dropout_bytes` the bytes a code of its dropout masks. `eager_bytes` and
    `compiled_bytes` are what its element-wise operations move, (forward, backward) a code in 16 bits. `decode_steps`
    are the forwards in which an image is drawn.
    """

    name: str
    layers: int
    width: int
    vocabulary: int
    codes: int
    parameters: int
    token_weights: int
    image_weights: int
    block_token_elements: int
    block_dropout_bytes: int
    eager_bytes: tuple[float, float] = (0.0, 0.0)
    compiled_bytes: tuple[float, float] = (0.0, 0.0)
    decode_steps: int = 0

    def forward_flops(self) -> float:
        """Operations of one image's forward: 2 a weight, and attention over all L^2 pairs of codes (as PaLM counts,
        arXiv 2204.02311, appendix B; causal attention needs about half of them).
        """
        matrices = 2 * (self.token_weights * self.codes + self.image_weights)
        attention = 4 * self.codes**2 * self.width * self.layers
        return float(matrices + attention)


def model_cost(preset: str, overrides: Mapping[str, Any] | None = None, dropout: bool = True) -> ModelCost:
    """The cost of a preset with some fields of its config replaced.

    Args:
        preset: e.g. "llamagen-3b".
        overrides: fields of the family's config, as a recipe's `model.overrides`.
        dropout: whether the model trains with its dropouts, whose masks are kept for the backward.

    Raises:
        ValueError: an unknown preset or field, or a shape that cannot be built.
    """
    return cost_of_module(meta_model(preset, overrides), preset, dropout)


def meta_model(preset: str, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A model without storage, on the meta device. Raises ValueError as `model_cost` does."""
    with torch.device("meta"), _WithoutInitialValues():
        return create_model(preset, **(overrides or {}))


class _WithoutInitialValues(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device its draws have no effect, but the first one imports torch._dynamo,
    which takes two seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def cost_of_module(module: nn.Module, name: str, dropout: bool = True) -> ModelCost:
    """The cost of a model on any device, from its parameters and its config; `name` is for reports."""
    family, config = family_of_model(module), module.config

    def once_an_image(parameter: str) -> bool:
        return any(part in parameter for part in family.per_image_modules)

    linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    parameters = list(module.named_parameters())
    return ModelCost(
        name=name,
        layers=config.n_layer,
        width=config.dim,
        vocabulary=config.vocab_size,
        codes=config.sequence_length,
        parameters=sum(parameter.numel() for _, parameter in parameters),
        token_weights=sum(part.weight.numel() for name, part in linear if not once_an_image(name)),
        image_weights=sum(parameter.numel() for name, parameter in parameters if once_an_image(name)),
        block_token_elements=family.activation_elements(config),
        block_dropout_bytes=family.dropout_bytes(config) if dropout else 0,
        eager_bytes=family.element_wise_bytes(config, False),
        compiled_bytes=family.element_wise_bytes(config, True),
        decode_steps=family.guidance_steps(config),
    )
