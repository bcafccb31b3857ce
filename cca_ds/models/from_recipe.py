"""A recipe's model as a module."""

from __future__ import annotations

from torch import nn

from cca_ds.config.schema import Model
from cca_ds.models.compilation import compile_blocks
from cca_ds.models.layers import DropPath
from cca_ds.models.registry import create_model, family_of, model_config


def build_module(model: Model, tokenizer: nn.Module | None = None) -> nn.Module:
    """The model of a recipe's `model` section with fresh weights, its dropouts on or off by `model.dropout`.

    "auto" in the section counts as false; a run resolves it before (`training/resolve.py`).

    Args:
        tokenizer: for families that hold its codebook (VAR).
    """
    module = create_model(model.preset, tokenizer, **model.shape)
    if not model.dropout:
        _switch_off_dropout(module)
    module.set_activation_checkpointing(model.activation_checkpointing is True)
    if model.compile is True:
        compile_blocks(module)
    return module


def build_shortened(model: Model, blocks: int, tokenizer: nn.Module | None = None) -> nn.Module:
    """The model of a recipe's `model` section with `blocks` blocks at most, otherwise of its own shape."""
    config = model_config(model.preset, **model.overrides)
    fields = family_of(model.preset).shortened(config, min(config.n_layer, blocks))
    return build_module(model.model_copy(update={"overrides": {**model.overrides, **fields}}), tokenizer)


def _switch_off_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, DropPath):
            part.rate = 0.0
