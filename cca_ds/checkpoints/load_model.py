"""A recipe's model and tokenizer with weights from a file or a run's folder, the same on every rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cca_ds.checkpoints.run_weights import newest_of_run, recipe_of_weights, run_weights
from cca_ds.cluster.collectives import on_first
from cca_ds.cluster.launch import Ranks
from cca_ds.config.recipes import ConfigError, resolve_path
from cca_ds.config.schema import Model, RunConfig, Tokenizer
from cca_ds.files import expand, file_hash
from cca_ds.models import (
    DTYPES,
    CodeModel,
    WeightsError,
    check_weights,
    create_model,
    expected_shapes,
    family_of,
    load_weights,
    state_hash,
    with_own_classes,
)
from cca_ds.models.from_recipe import build_module
from cca_ds.models.weight_files import existing_file
from cca_ds.vq import TOKENIZERS, create_tokenizer


@dataclass(frozen=True)
class Source:
    """Where weights are read: a file, or a run's folder with one of its checkpoints or its moving average."""

    path: Path
    checkpoint: Path | None = None
    average: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """Model and tokenizer on this rank's device, with the hashes of their weights.

    Without decoding, `tokenizer` may be None, and its hash is empty.
    """

    model: CodeModel
    tokenizer: nn.Module | None
    source: Source
    weights_sha256: str
    tokenizer_hash: str

    def identity(self) -> dict[str, str]:
        """What identifies the weights, for reports: path and hashes."""
        return {
            "weights": str(self.source.path),
            "weights_sha256": self.weights_sha256,
            "tokenizer_hash": self.tokenizer_hash,
        }


class Loaded(NamedTuple):
    """A model in eval mode, its tokenizer (None where its weights are not named and the model runs without), and the
    recipe that it was trained by.
    """

    model: CodeModel
    tokenizer: nn.Module | None
    recipe: RunConfig


def load(
    path: str | Path, *, tokenizer: str | Path | None = None, device: str = "cpu", precision: str = "fp32",
    average: bool = False,
) -> Loaded:  # fmt: skip
    """A trained model out of a run's folder, or of a safetensors file that `cca-export` wrote.

    Args:
        path: the folder or file; its recipe says which model it is.
        tokenizer: the tokenizer's weights file, where it is not the recipe's.
        device: of both modules, e.g. "cuda".
        precision: of the model: "fp32", "bf16" or "fp16".
        average: of a run: the moving average of its policy.

    Raises:
        ConfigError, WeightsError, CheckpointError, ValueError: what is missing, damaged or does not fit, in one line.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision}: choose one of {', '.join(DTYPES)}")
    source = Source(expand(path), average=average)
    recipe = recipe_of_weights(source.path)
    if tokenizer is not None:
        recipe.tokenizer.weights = str(tokenizer)
    module = open_tokenizer(recipe.model, recipe.tokenizer)
    model = create_model(recipe.model.preset, module, **recipe.model.shape)
    fill_module(model, source)
    model = model.to(device, DTYPES[precision]).eval()
    return Loaded(model, module.to(device).eval() if module is not None else None, recipe)


def open_tokenizer(model: Model, tokenizer: Tokenizer) -> nn.Module | None:
    """The frozen tokenizer, or None where its weights are not named and the model works without.

    Raises:
        ValueError: a model that needs its tokenizer's codebook, without it.
        WeightsError: weights that are missing, damaged or do not fit.
    """
    if TOKENIZERS[tokenizer.name].needs_weights and tokenizer.weights is None:
        family = family_of(model.preset)
        if family.needs_tokenizer:
            raise ValueError(
                f"{model.preset} needs its tokenizer's codebook: set tokenizer.weights={family.tokenizer_hint}"
            )
        return None
    weights = resolve_path(tokenizer.weights) if tokenizer.weights else None
    return create_tokenizer(tokenizer.name, weights=weights, **tokenizer.options)


def find_source(
    weights: Path | None, checkpoint: Path | None, average: bool, model_section: Model, recipe: str
) -> Source:
    """The weights that the flags name, else the recipe's model.weights.

    Args:
        weights, checkpoint, average: of --weights, --checkpoint and --ema.
        recipe: its name, for the message.

    Raises:
        ConfigError: neither names any.
    """
    path = weights or (model_section.weights and resolve_path(model_section.weights))
    if not path:
        raise ConfigError([f"--weights is missing: recipe {recipe} names no model.weights to draw from"])
    return Source(expand(path), checkpoint and expand(checkpoint), average)


def load_model(
    model_section: Model, tokenizer_section: Tokenizer, source: Source, ranks: Ranks, precision: str,
    decodes: bool = True,
) -> LoadedModel:  # fmt: skip
    """Read the weights on rank 0 and broadcast them; the model in eval mode and `precision`. Collective.

    Args:
        model_section: the recipe's `model`: preset and overrides.
        tokenizer_section: the recipe's `tokenizer`.
        precision: "fp32", "bf16" or "fp16".
        decodes: whether images are wanted of the codes; without, the tokenizer's weights need not be named.

    Raises:
        ValueError: a tokenizer without weights, or not the model's; WeightsError, CheckpointError: weights that are
            missing, damaged or of another shape. On every rank.
    """
    name = tokenizer_section.name
    if decodes and TOKENIZERS[name].needs_weights and tokenizer_section.weights is None:
        raise ValueError(f"tokenizer.weights is missing: --set tokenizer.weights=FILE ({name}'s)")
    tokenizer = open_tokenizer(model_section, tokenizer_section)
    with torch.device(ranks.device):  # random weights of 3 B parameters take a CPU half a minute
        model = create_model(model_section.preset, tokenizer, **model_section.shape)
    if tokenizer is not None and tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"tokenizer {name} has {tokenizer.vocab_size} codes, model {model_section.preset} "
            f"{model.vocab_size}: they do not belong together"
        )
    on_first(ranks, lambda: fill_module(model, source))
    sha256 = [state_hash(dict(model.named_parameters())) if ranks.rank == 0 else ""]
    if ranks.world_size > 1:
        share_module(model)
        torch.distributed.broadcast_object_list(sha256, src=0)
    model = model.to(ranks.device, DTYPES[precision]).eval()
    tokenizer_hash = tokenizer.hash() if tokenizer is not None else ""
    return LoadedModel(
        model, tokenizer.to(ranks.device) if tokenizer is not None else None, source, sha256[0], tokenizer_hash
    )


def fill_module(module: nn.Module, source: Source, reset_classes: bool = False) -> None:
    """Load a weights file, or a run's newest checkpoint, into `module`.

    Args:
        reset_classes: keep the module's own class rows, and only the null class's of the source.

    Raises:
        WeightsError, CheckpointError: weights that are missing, damaged or of another shape.
    """
    if not source.path.is_dir():
        if source.average or source.checkpoint:
            raise WeightsError(
                f"weights {source.path}: a file has neither an average nor checkpoints; name a run's folder"
            )
        load_weights(module, source.path, reset_classes)
        return
    found = run_weights(source.path, source.checkpoint, source.average)
    state = with_own_classes(found.state, module) if reset_classes else found.state
    check_weights(expected_shapes(module), state, found.checkpoint)
    own = module.state_dict()
    empty = any(value.is_meta for value in own.values())  # takes the tensors as they are
    module.load_state_dict({name: state[name] for name in own if name in state}, strict=False, assign=empty)


def weights_hash(path: Path) -> str:
    """What identifies a weights file, or a run's newest intact checkpoint: a sha256 of all its bytes.

    Raises:
        WeightsError, CheckpointError: there is none, or it cannot be read.
    """
    if not path.is_dir():
        return file_hash(existing_file(path))
    found = newest_of_run(path)
    return hashlib.sha256(json.dumps(found[1].files, sort_keys=True, default=vars).encode()).hexdigest()


def starting_weights(
    model: Model, path: str | None, seed: int, tokenizer: nn.Module | None = None
) -> dict[str, Tensor]:
    """The full float32 state dict of a weights file or of a run's newest checkpoint, or of a fresh model.

    A lambda-conditioned model starts as its base model: the embedding of lambda is absent from the file, is drawn
    from the seed, and contributes nothing until it is trained.

    Args:
        model: the recipe's section; with `reset_classes` the class rows are drawn from the seed.
        path: a file or a run's folder; None draws the whole model from `seed`.
        tokenizer: for families that hold its codebook (VAR).

    Raises:
        WeightsError, CheckpointError: weights that are missing, damaged or do not fit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device("cpu"):
            module = build_module(model, tokenizer)
    if path is not None:
        fill_module(module, Source(resolve_path(path)), model.reset_classes)
    return module.state_dict()


def share_module(module: nn.Module) -> None:
    """Copy rank 0's weights to every rank; collective."""
    for tensor in module.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)
