"""A run's policy as one file of weights, with the recipe in its header and a model card beside it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

import cca_ds
from cca_ds.alignment.losses import LOSSES
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.checkpoints.hub import open_repository
from cca_ds.checkpoints.run_weights import RunWeights, is_run_folder, recipe_of_run, run_weights
from cca_ds.config.recipes import ConfigError, dump_recipe, resolve_path
from cca_ds.config.schema import Model, RunConfig, path_keys
from cca_ds.data.manifest import class_names_of
from cca_ds.models import (
    DTYPES,
    CodeModel,
    Family,
    check_weights,
    create_model,
    expected_shapes,
    family_of,
    fix_lambda,
    save_weights,
)
from cca_ds.models.model_card import CARD, CONFIG, LIBRARY, hub_config, model_card
from cca_ds.models.weights import SAFETENSORS, layouts
from cca_ds.reporting.evaluation_report import card_scores, read_report
from cca_ds.sampling import generate
from cca_ds.sampling.drawing import draw_settings, sampling_lambda
from cca_ds.untrusted import regular_file
from cca_ds.vq import TOKENIZERS

_MOST_RUNS = 100  # each of which began with the one before


def export_weights(
    folder: Path,
    output: Path,
    *,
    checkpoint: Path | None = None,
    layout: str = SAFETENSORS,
    dtype: str = "fp32",
    average: bool = False,
    lambda_: float | None = None,
    with_card: bool = False,
    metrics: Path | None = None,
    repository: str | None = None,
    public: bool = False,
) -> str:
    """Write the weights of a run's checkpoint to a file, whole or not at all. Needs no ranks and no GPU.

    Args:
        folder: of the run.
        output: the file.
        checkpoint: of the run; None: its newest intact one.
        layout: "safetensors" or a published layout of the model's family.
        dtype: of the tensors in the file: "fp32", "bf16" or "fp16".
        average: the policy's moving average instead of its last weights.
        lambda_: fixes a lambda-conditioned model at this lambda, as an ordinary model.
        with_card: write a model card, README.md, and config.json beside a safetensors file.
        metrics: JSON report of `evaluate`, whose numbers and settings go into the card.
        repository: name on the Hugging Face Hub to push the file, the card and config.json to.
        public: the repository may be one that everybody can read.

    Returns:
        Lines that describe what was written, and where it was pushed to.

    Raises:
        ConfigError, before anything is read: settings that contradict each other or the run. CheckpointError,
            WeightsError: weights that cannot be read or written. HubError: the Hub cannot be written to.
    """
    with_card = with_card or repository is not None
    _check_settings(folder, output, layout, lambda_, with_card, metrics, repository, public)
    run = recipe_of_run(folder)
    family, scores = family_of(run.model.preset), card_scores(read_report(metrics)) if metrics else None
    _check_fit(layout, lambda_, run.model, family)
    hub = open_repository(repository, public) if repository else None
    names = class_names_of(run.data.codes, folder)
    found = run_weights(folder, checkpoint, average)
    module = _empty_module(run.model)
    expected = expected_shapes(module)
    check_weights(expected, found.state, found.checkpoint)
    state = {name: found.state[name] for name in expected if name in found.state}
    if lambda_ is not None:
        plain = run.model.model_copy(update={"lambda_conditioning": False})
        module, state = _empty_module(plain), fix_lambda(state, lambda_)
    save_weights(
        module, output, layout, state=state, dtype=DTYPES[dtype],
        metadata=_metadata(run, found, dtype, average, lambda_, names),
        beside=_beside(run, module, family, output.name, hub and hub.name, lambda_, scores, names)
        if with_card else None,
    )  # fmt: skip
    parameters = sum(tensor.numel() for tensor in state.values())
    line = (
        f"{output}: {parameters / 1e6:.1f} M weights of {run.model.preset} after step {found.step} "
        f"({layout}, {dtype}{', moving average' if average else ''}"
        f"{f', lambda fixed at {lambda_:g}' if lambda_ is not None else ''})"
    )
    if hub is None:
        return line
    print(line, flush=True)  # the upload may take an hour, and may fail
    return hub.push([output, *map(output.with_name, (CARD, CONFIG))], f"{run.name}, step {found.step}")


def _check_settings(
    folder: Path, output: Path, layout: str, lambda_: float | None, with_card: bool, metrics: Path | None,
    repository: str | None, public: bool,
) -> None:  # fmt: skip
    """Raise ConfigError with all that the settings alone contradict."""
    problems = []
    if layout not in layouts():
        problems.append(f"--layout {layout}: unknown; choose one of {', '.join(layouts())}")
    if with_card and layout != SAFETENSORS:
        problems.append(f"--model_card and --push_to_hub go with --layout safetensors, not {layout}")
    if repository == "":
        problems.append("--push_to_hub: the name is empty; give USER/NAME or NAME")
    if public and repository is None:
        problems.append("--public goes with --push_to_hub NAME")
    if with_card:
        problems += [
            f"--model_card: {path} is there and not of an export; name an --output in a folder of its own"
            for path in map(output.with_name, (CARD, CONFIG))
            if path.exists() and not _exported(path)
        ]
    if metrics and not with_card:
        problems.append("--metrics goes into the model card; give --model_card as well")
    if lambda_ is not None and not 0.0 < lambda_ < float("inf"):
        problems.append(f"--lambda {lambda_:g}: must be above 0")
    if output.is_dir():
        problems.append(f"--output {output}: is a folder; name the file to write in it")
    if not folder.is_dir():
        problems.append(f"--run {folder}: no such folder; name the one that train wrote (its --output)")
    if problems:
        raise ConfigError(problems)


def _check_fit(layout: str, lambda_: float | None, model: Model, family: Family) -> None:
    """Raise ConfigError with all in which the settings contradict the run's model."""
    problems, published = [], layout != SAFETENSORS
    if published and layout not in family.layouts:
        own = " or ".join([f"--layout {name}" for name in family.layouts] + [SAFETENSORS])
        problems.append(f"--layout {layout}: {model.preset} is a {family.name} model; use {own}")
    elif published and model.lambda_conditioning and lambda_ is None:
        problems.append(
            f"--layout {layout}: its program has no lambda-conditioned models; fix one with --lambda, "
            "or use --layout safetensors"
        )
    if lambda_ is not None and not model.lambda_conditioning:
        problems.append(f"--lambda {lambda_:g}: the run's model is not conditioned on lambda; leave it out")
    if problems:
        raise ConfigError(problems)


def _empty_module(model: Model) -> CodeModel:
    """The recipe's model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return create_model(model.preset, **model.shape)


def _shared_recipe(run: RunConfig) -> str:
    """The recipe as YAML without the folders of this machine: of every path the last name."""
    tree = yaml.safe_load(dump_recipe(run))
    for section, name in path_keys():
        if isinstance(value := tree[section][name], str) and not value.startswith("asset:"):
            tree[section][name] = Path(value).name
    return yaml.safe_dump(tree, sort_keys=False)


def _metadata(
    run: RunConfig, found: RunWeights, dtype: str, average: bool, lambda_: float | None, names: Sequence[str]
) -> dict[str, str]:
    """Entries of the safetensors header that describe how the weights were made."""
    return {
        **({"class_names": json.dumps(names)} if names else {}),
        **({"lambda": f"{lambda_:g}"} if lambda_ is not None else {}),
        "recipe": _shared_recipe(run),
        "recipe_name": run.name,
        "preset": run.model.preset,
        "step": str(found.step),
        "ema": str(average).lower(),
        "dtype": dtype,
        "cca_ds_version": cca_ds.__version__,
    }


def _exported(path: Path) -> bool:
    """Whether a model card or config.json is an earlier export's, which may be replaced."""
    try:
        with regular_file(path).open(errors="replace") as file:
            beginning = file.read(1000)
    except (OSError, ValueError):
        return False
    header, _, _ = beginning.partition("\n---\n")
    line = rf"---\n.*^library_name: {LIBRARY}$" if path.name == CARD else rf'\{{\n *"library_name": "{LIBRARY}",$'
    return re.match(line, header, re.MULTILINE | re.DOTALL) is not None


def _base(weights: str | None) -> str | None:
    """Name of the file that training began with, through the runs between, where their folders are still there."""
    for _ in range(_MOST_RUNS):
        if weights is None or not is_run_folder(resolve_path(weights)):
            break
        try:
            weights = recipe_of_run(resolve_path(weights)).model.weights
        except (ConfigError, CheckpointError):  # damaged, or of an older version
            break
    return resolve_path(weights).name if weights else None


def _beside(
    run: RunConfig, module: CodeModel, family: Family, file: str, repository: str | None, lambda_: float | None,
    scores: str | None, names: Sequence[str],
) -> dict[str, str]:  # fmt: skip
    """The model card and config.json of an exported file: name -> text."""
    spec = TOKENIZERS[run.tokenizer.name]
    given = run.tokenizer.weights and resolve_path(run.tokenizer.weights).name
    tokenizer = (given or family.tokenizer_hint) if spec.needs_weights else None
    fixed = sampling_lambda(run.sampling, run.loss.lambda_, run.model.lambda_conditioning and lambda_ is None)
    plain = inspect.signature(generate).parameters
    settings = draw_settings(run.sampling, fixed)
    card = model_card(
        run.name, family, _shared_recipe(run), method=LOSSES[run.loss.name].method, file=file, repository=repository,
        base=_base(run.model.weights), tokenizer=tokenizer,
        settings={key: value for key, value in settings.items() if value != plain[key].default},
        classes=module.num_classes, class_names=names, metrics=scores,
    )  # fmt: skip
    described = {"name": spec.name, "weights": tokenizer, "options": run.tokenizer.options}
    return {CARD: card, CONFIG: hub_config(module, run.model.preset, described, names)}
