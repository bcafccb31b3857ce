"""The weights of a run's policy, or of a file, for the commands that use them after training."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cca_ds.checkpoints import store
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.config.recipes import load_recipe
from cca_ds.config.schema import RunConfig
from cca_ds.models import WeightsError, check_weights, expected_shapes, load_weights


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
        raise CheckpointError(
            f"run {folder}: holds no config.yaml; name the folder that train wrote (--output)"
        )
    return load_recipe(str(folder / "config.yaml"))


def run_weights(folder: Path, checkpoint: Path | None = None, average: bool = False) -> RunWeights:
    """Whole weights out of the shards of a run's newest intact checkpoint, or of the one named.

    Args:
        average: the policy's moving average instead of its last weights.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one without an average.
    """
    passed_over: list[str] = []
    if checkpoint is None:
        found = store.newest_verified(folder / "checkpoints", passed_over.append)
        if found is None:
            told = f" ({'; '.join(passed_over)})" if passed_over else ""
            raise CheckpointError(
                f"run {folder}: holds no complete checkpoint{told}; let it train until it saves one"
            )
        checkpoint = found[0]
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"checkpoint {checkpoint}: no such folder; they stand under {folder / 'checkpoints'}"
        )
    manifest = store.verify(checkpoint)
    averages = sorted(name for name in manifest.files if name.startswith("average_rank_"))
    if average and not averages:
        raise CheckpointError(
            f"checkpoint {checkpoint}: holds no moving average; a run keeps one when model.ema_decay is set"
        )
    from cca_ds.checkpoints.deepspeed_state import (
        consolidated_weights,  # imports deepspeed, which takes seconds
    )

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it reads
        state = consolidated_weights(checkpoint)
    if average:
        shards = [torch.load(checkpoint / name, weights_only=True, map_location="cpu") for name in averages]
        joined = join_shards(shards)
        state |= {name: flat.view(state[name].shape) for name, flat in joined.items()}
    return RunWeights(state, checkpoint, manifest.step)


def fill_module(module: nn.Module, path: Path, checkpoint: Path | None = None, average: bool = False) -> None:
    """Load a weights file, or a run's newest checkpoint, into `module`. Raises WeightsError, CheckpointError."""
    if not path.is_dir():
        if average or checkpoint:
            raise WeightsError(
                f"weights {path}: a file has neither an average nor checkpoints; name a run's folder"
            )
        load_weights(module, path)
        return
    found = run_weights(path, checkpoint, average)
    check_weights(expected_shapes(module), found.state, found.checkpoint)
    own = module.state_dict()
    module.load_state_dict({name: value for name, value in found.state.items() if name in own}, strict=False)


def share_module(module: nn.Module) -> None:
    """Give rank 0's weights to every rank; collective."""
    for tensor in module.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)


def join_shards(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flattened parameters out of the shards of rank 0, 1, ..., on the CPU."""
    return {name: torch.cat([shard[name].cpu() for shard in shards]) for name in shards[0]}
