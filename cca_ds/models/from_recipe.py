"""A recipe's model: built, and with the weights that it starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cca_ds.config.recipes import resolve_path
from cca_ds.config.schema import RunConfig
from cca_ds.models.layers import DropPath
from cca_ds.models.registry import create_model, model_config
from cca_ds.models.weights import load_weights


def build_module(run: RunConfig, tokenizer: nn.Module | None = None) -> nn.Module:
    """The recipe's model, its dropouts on or off, with fresh weights."""
    module = create_model(run.model.preset, tokenizer, **run.model.shape)
    if not run.model.dropout:
        _switch_off_dropout(module)
    module.set_activation_checkpointing(run.model.activation_checkpointing)
    return module


def build_shortened(run: RunConfig, blocks: int, tokenizer: nn.Module | None = None) -> nn.Module:
    """The recipe's model with `blocks` blocks at most, otherwise of its own shape, with fresh weights."""
    config = model_config(run.model.preset, **run.model.overrides)
    blocks = min(config.n_layer, blocks)
    if hasattr(config, "depth"):  # VAR: width, heads and stochastic depth follow the depth unless given
        shape = {
            "depth": blocks,
            "width": config.dim,
            "heads": config.n_head,
            "drop_path": config.drop_path_rate,
        }
    else:
        shape = {"n_layer": blocks}
    model = run.model.model_copy(update={"overrides": {**run.model.overrides, **shape}})
    return build_module(run.model_copy(update={"model": model}), tokenizer)


def starting_weights(
    run: RunConfig, path: str | None, tokenizer: nn.Module | None = None, for_reference: bool = False
) -> dict[str, Tensor]:
    """State dict of a checkpoint, or of a fresh model drawn from the recipe's seed.

    A lambda-conditioned model starts as its base model: the embedding of lambda, absent from the checkpoint, is
    drawn from the seed and contributes nothing until it is trained.

    Raises:
        WeightsError: a missing, damaged or foreign checkpoint.
    """
    if for_reference:
        run = run.model_copy(update={"model": run.model.model_copy(update={"lambda_conditioning": False})})
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        with torch.device("cpu"):
            module = build_module(run, tokenizer)
    if path is not None:
        load_weights(module, resolve_path(path))
    return module.state_dict()


def _switch_off_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, DropPath):
            part.rate = 0.0
        if hasattr(part, "drop_path_rate"):
            part.drop_path_rate = 0.0
