"""What a run reads before any engine is built: its codes, its tokenizer, and how many steps they make."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cca_ds.config.recipes import resolve_path
from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import BatchPlan
from cca_ds.data.codes import CodeTable, open_codes
from cca_ds.models import model_config
from cca_ds.vq import create_tokenizer


def open_table(run: RunConfig, cache_folder: Path) -> CodeTable:
    """The codes to train on, checked against the model. Raises CodesError, ValueError."""
    table = open_codes(run.data.codes, cache_folder)
    config = model_config(run.model.preset, **run.model.overrides)
    expected = (config.sequence_length, config.vocab_size)
    found = (table.manifest.sequence_length, table.manifest.vocab_size)
    if expected != found:
        raise ValueError(
            f"data.codes={run.data.codes}: {found[0]} codes an image from a vocabulary of {found[1]}, but "
            f"{run.model.preset} takes {expected[0]} from {expected[1]}; encode the images for this model"
        )
    if table.manifest.classes > config.num_classes:
        raise ValueError(
            f"data.codes={run.data.codes}: {table.manifest.classes} classes, but {run.model.preset} knows "
            f"{config.num_classes}; set model.overrides.num_classes or take other data"
        )
    return table


def open_tokenizer(run: RunConfig) -> nn.Module | None:
    """The frozen tokenizer, or None where its weights were not named and the model can do without.

    Raises:
        ValueError: a VAR without its tokenizer, whose codebook makes the model's inputs.
    """
    if run.tokenizer.name != "digits" and run.tokenizer.weights is None:
        if run.model.preset.startswith("var"):
            raise ValueError(
                f"{run.model.preset} needs its tokenizer's codebook: set tokenizer.weights=vae_ch160v4096z32.pth"
            )
        return None
    weights = resolve_path(run.tokenizer.weights) if run.tokenizer.weights else None
    return create_tokenizer(run.tokenizer.name, weights=weights, **run.tokenizer.options)


def check_tokenizer(run: RunConfig, table: CodeTable, tokenizer: nn.Module | None) -> None:
    """Codes of another tokenizer look like codes, and train nothing. Raises ValueError for them."""
    found = table.manifest.tokenizer_hash  # empty for codes that were imported without their tokenizer
    if tokenizer is not None and found and found != tokenizer.hash():
        raise ValueError(
            f"data.codes={run.data.codes} was made by the tokenizer {found[:12]}, but tokenizer.weights="
            f"{run.tokenizer.weights} is {tokenizer.hash()[:12]}: name the weights that made the codes, or encode again"
        )


def batch_plan(run: RunConfig, table: CodeTable) -> BatchPlan:
    """What a global batch of this run is."""
    return BatchPlan(
        global_size=run.batch.global_size,
        seed=run.seed,
        mask_probability=run.loss.condition_mask_probability,
        null_class=model_config(run.model.preset, **run.model.overrides).num_classes,
        contrastive=run.loss.name != "mle",
    )


def total_steps(run: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = max(1, round(run.batch.epochs * steps_per_epoch))
    return min(steps, run.batch.max_steps) if run.batch.max_steps else steps
