"""The weights of a run's policy, out of its checkpoints, for what uses them after training."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cca_ds.checkpoints import store
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.config.recipes import ConfigError, load_recipe
from cca_ds.config.schema import RunConfig
from cca_ds.data.manifest import class_names_of, fits_on_a_line
from cca_ds.models.weight_files import WeightsError, read_metadata
from cca_ds.untrusted import parse_json


@dataclass(frozen=True)
class RunWeights:
    """The policy's float32 weights by name, and the checkpoint they are from."""

    state: dict[str, Tensor]
    checkpoint: Path
    step: int


def is_run_folder(path: Path) -> bool:
    """Whether `path` is a folder that `train` wrote."""
    return (path / "config.yaml").is_file()


def recipe_of_run(folder: Path) -> RunConfig:
    """The resolved recipe of a run's folder. Raises ConfigError, CheckpointError."""
    if not is_run_folder(folder):
        raise CheckpointError(f"run {folder}: holds no config.yaml; name the folder that train wrote (--output)")
    return load_recipe(str(folder / "config.yaml"))


def recipe_text(path: Path) -> str | None:
    """The recipe in the header of exported weights; None for a file without one. Raises WeightsError."""
    return read_metadata(path).get("recipe")


def recipe_of_weights(path: Path) -> RunConfig:
    """The recipe of a run's folder or of exported weights.

    Raises:
        ConfigError, CheckpointError, WeightsError: there is none, or it is damaged.
    """
    if path.is_dir():
        return recipe_of_run(path)
    text = recipe_text(path)
    if text is None:
        raise ConfigError([f"{path}: no recipe in its header; `cca-export` writes one into safetensors"])
    return load_recipe(str(path), text=text)


def class_names(recipe: RunConfig, path: Path) -> tuple[str, ...]:
    """Names of a model's classes: from the header of its weights file, else from the codes of its recipe.

    Raises:
        WeightsError: a header whose names are none. CodesError: a damaged table.
    """
    text = None if path.is_dir() else read_metadata(path).get("class_names")
    if text is None:
        return class_names_of(recipe.data.codes, path if path.is_dir() else None)
    try:
        names = parse_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and fits_on_a_line(name) for name in names):
        raise WeightsError(f"weights file {path}: class_names in its header is no list of names; export it again")
    return tuple(names)


def newest_of_run(folder: Path) -> tuple[Path, store.Manifest]:
    """A run's newest intact checkpoint and its manifest; a damaged one that is passed over is named on stderr.

    Raises:
        CheckpointError: not a run's folder, or one without a whole checkpoint.
    """
    if not is_run_folder(folder):
        raise CheckpointError(f"weights {folder}: a folder without config.yaml; name a weights file, or a run's folder")
    passed_over: list[str] = []
    found = store.newest_verified(folder / "checkpoints", passed_over.append)
    if found is None:
        raise CheckpointError(f"run {folder}: holds no complete checkpoint; let it train until it saves one")
    for line in passed_over:
        print(line, file=sys.stderr)
    return found


def run_weights(folder: Path, checkpoint: Path | None = None, average: bool = False) -> RunWeights:
    """Whole weights out of the shards of a run's newest intact checkpoint, or of another one.

    Args:
        average: the policy's moving average instead of its last weights.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one without an average.
    """
    if checkpoint is None:
        checkpoint, _ = newest_of_run(folder)
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint {checkpoint}: no such folder; the run's are in {folder / 'checkpoints'}")
    manifest = store.verify(checkpoint)
    averages = sorted(name for name in manifest.files if name.startswith("average_rank_"))
    if average and not averages:
        raise CheckpointError(
            f"checkpoint {checkpoint}: holds no moving average; a run keeps one when model.ema_decay is set"
        )
    from cca_ds.checkpoints.deepspeed_state import consolidated_weights, load_own  # imports deepspeed: seconds

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it reads
        state = consolidated_weights(checkpoint)
    if average:
        with store.listed_files(checkpoint) as listed:
            joined = join_shards([load_own((listed / name).with_suffix("")) for name in averages])
        state |= {name: flat.view(state[name].shape) for name, flat in joined.items()}
    return RunWeights(state, checkpoint, manifest.step)


def join_shards(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flattened parameters by name, on the CPU, from the shards of a moving average of rank 0, 1, ..."""
    return {name: torch.cat([shard[name].cpu() for shard in shards]) for name in shards[0]}
