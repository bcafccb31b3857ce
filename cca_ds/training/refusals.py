"""What would make a run stop at its start, found without ranks, engines or a GPU, for `--dry_run`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cca_ds.checkpoints import store
from cca_ds.checkpoints.load_model import Source, fill_module
from cca_ds.cluster.failures import explain_error
from cca_ds.config.deepspeed_file import resolve_precision, zero_stage
from cca_ds.config.recipes import ConfigError, resolve_path
from cca_ds.config.schema import RunConfig
from cca_ds.data.generated import GeneratedCodes, require_drawn_by
from cca_ds.files import expand
from cca_ds.models.conditioning import CONDITIONINGS
from cca_ds.models.cost import meta_model, model_cost
from cca_ds.models.weight_files import state_hash
from cca_ds.models.weights import DTYPES
from cca_ds.training import run_folder
from cca_ds.training.checks import require_base
from cca_ds.training.inputs import RunInputs, open_inputs

COMPARED_BYTES = 10**9  # larger tables are compared with their hashes by the run itself


def refusals(run: RunConfig, ds: dict[str, Any], output: str | None, resume: str) -> list[str]:
    """One line for each part of a run that its start would refuse; empty where none would.

    Looked at are the output folder and its room, the checkpoint to resume from, codes, drawn images and what drew them,
    tokenizer, batch and weights.
    What only the run finds: ranks, GPUs, fp16 without a GPU, a reference's cache, and hashes of tables over 1 GB.

    Args:
        run: a checked recipe.
        ds: DeepSpeed's file as read.
        output, resume: as on the command line of `train`.
    """
    found: list[str] = []
    folder = expand(output or f"runs/{run.name}")

    def attempt(check: Callable[[], Any]) -> None:
        try:
            check()
        except (ValueError, OSError) as error:
            found.extend(error.problems if isinstance(error, ConfigError) else [explain_error(error)])

    attempt(lambda: run_folder.check_output(folder, run, resume))
    attempt(lambda: run_folder.check_data(folder, run))
    inputs: list[RunInputs] = []
    attempt(lambda: inputs.append(_read_inputs(run, ds, folder)))
    attempt(lambda: require_base(run))
    generated = inputs[0].generated if inputs else None
    for path, anew, drew in (
        (run.model.weights, run.model.reset_classes, run.reference.weights is None and not run.model.reset_classes),
        (run.reference.weights, False, True),
    ):
        if path is not None:
            attempt(partial(_read_weights, run, path, anew, generated if drew else None))
    return list(dict.fromkeys(found))


def _read_inputs(run: RunConfig, ds: dict[str, Any], folder: Path) -> RunInputs:
    """Codes and tokenizer; then room for the checkpoints of as many steps as they make."""
    with tempfile.TemporaryDirectory() as scratch:  # for a table that the package builds
        inputs = open_inputs(run, Path(scratch))
        for table in inputs.tables:
            if not table.is_verified() and sum(shard.bytes for shard in table.manifest.shards) <= COMPARED_BYTES:
                table.check()
    element_bytes = DTYPES[resolve_precision(ds, run, torch.cuda.is_available())].itemsize
    each = store.bytes_per_weight(zero_stage(ds), element_bytes, run.model.ema_decay is not None)
    size = model_cost(run.model.preset, run.model.shape).parameters * each
    store.require_room(folder / "checkpoints", size, run.checkpoint, inputs.steps)
    return inputs


def _read_weights(run: RunConfig, path: str, reset_classes: bool, generated: GeneratedCodes | None) -> None:
    """Weights that fit the model, and that drew the images `generated`, if any."""
    module = meta_model(run.model.preset, run.model.shape)
    fill_module(module, Source(resolve_path(path)), reset_classes)
    if generated is not None:
        embeddings = tuple(kind.prefix for kind in CONDITIONINGS)
        own = {name: value for name, value in module.named_parameters() if not name.startswith(embeddings)}
        require_drawn_by(generated, state_hash(own))
