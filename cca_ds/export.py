"""A run's policy as one file of weights, in the layout that LlamaGen's or VAR's own programs load, or safetensors.

    python -m cca_ds.export --run runs/digits --output policy.safetensors
    python -m cca_ds.export --run runs/llamagen-3b --output c2i_3B_cca.pt --layout llamagen --dtype bf16
    python -m cca_ds.export --run runs/var-d30 --output var_d30_cca.pth --layout var --ema
    python -m cca_ds.export --run runs/llamagen-3b --output hub/model.safetensors --model_card --metrics scores.json
    python -m cca_ds.export --run runs/every-lambda --output c2i_L_cca.pt --layout llamagen --lambda 300

Needs no ranks and no GPU. The run's recipe goes into the safetensors file's metadata; the model card becomes README.md
beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cca_ds.config.recipes import ConfigError, RunConfig, dump_recipe, resolve_path

# what is slow to import is imported where it is used, so that --help answers at once
if TYPE_CHECKING:
    from cca_ds.checkpoints.run_weights import RunWeights

LAYOUTS = ("safetensors", "llamagen", "var")
PRECISIONS = ("fp32", "bf16", "fp16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the folder that train wrote")
    add("--checkpoint", type=Path, help="one of its checkpoints (default: the newest intact one)")
    add("--output", type=Path, required=True, help="file to write, whole or not at all")
    add("--layout", choices=LAYOUTS, default="safetensors", help="(default: safetensors)")
    add("--dtype", choices=PRECISIONS, default="fp32", help="of the weights in the file (default: fp32)")
    add("--lambda", type=float, dest="lambda_", metavar="LAMBDA",
        help="of a lambda-conditioned model: fix it, for the programs that know no such models")  # fmt: skip
    add("--ema", action="store_true", help="the policy's moving average instead of its last weights")
    add(
        "--model_card",
        action="store_true",
        help="with safetensors: a Hugging Face model card beside the file",
    )
    add("--metrics", type=Path, help="evaluate's JSON report, whose numbers go into the model card")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one clear line."""
    arguments = parse(argv)
    try:
        print(export(arguments))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def export(arguments: argparse.Namespace) -> str:
    """Write the file; returns the line that says so. Raises ValueError before anything is written."""
    check_arguments(arguments)
    from cca_ds.checkpoints.run_weights import recipe_of_run, run_weights
    from cca_ds.models import DTYPES, check_weights, expected_shapes, fix_lambda, save_weights

    folder, output = arguments.run.expanduser(), arguments.output.expanduser()
    run = recipe_of_run(folder)
    metrics = read_metrics(arguments.metrics) if arguments.metrics else None
    module = empty_module(run)
    check_fit(arguments, run, module.family)
    found = run_weights(folder, arguments.checkpoint, arguments.ema)
    expected = expected_shapes(module)
    check_weights(expected, found.state, found.checkpoint)
    state = {name: found.state[name] for name in expected if name in found.state}
    if arguments.lambda_ is not None:
        module, state = empty_module(run, conditioned=False), fix_lambda(state, arguments.lambda_)
    card = describe(run, module.family, output, metrics) if arguments.model_card else None
    save_weights(
        module, output, arguments.layout, state=state, dtype=DTYPES[arguments.dtype],
        metadata=metadata_of(run, found, arguments), model_card=card,
    )  # fmt: skip
    parameters = sum(tensor.numel() for tensor in state.values())
    return (
        f"{output}: {parameters / 1e6:.1f} M weights of {run.model.preset} after step {found.step} "
        f"({arguments.layout}, {arguments.dtype}{', moving average' if arguments.ema else ''}"
        f"{f', lambda fixed at {arguments.lambda_:g}' if arguments.lambda_ is not None else ''})"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError with all that the flags alone contradict."""
    problems = []
    if arguments.model_card and arguments.layout != "safetensors":
        problems.append(f"--model_card goes with --layout safetensors, not {arguments.layout}")
    if arguments.metrics and not arguments.model_card:
        problems.append("--metrics goes into the model card; give --model_card as well")
    if arguments.lambda_ is not None and not 0.0 < arguments.lambda_ < float("inf"):
        problems.append(f"--lambda {arguments.lambda_:g}: must be above 0")
    if arguments.output.expanduser().is_dir():
        problems.append(f"--output {arguments.output}: is a folder; name the file to write in it")
    if not arguments.run.expanduser().is_dir():
        problems.append(
            f"--run {arguments.run}: no such folder; name the one that train wrote (its --output)"
        )
    if problems:
        raise ConfigError(problems)


def check_fit(arguments: argparse.Namespace, run: RunConfig, family: str) -> None:
    """Raises ConfigError with all in which the flags contradict the run."""
    problems, layout, conditioned = [], arguments.layout, run.model.lambda_conditioning
    if layout not in ("safetensors", family):
        problems.append(f"--layout {layout}: {run.model.preset} is a {family} model; "
                        f"use --layout {family} or safetensors")  # fmt: skip
    elif layout != "safetensors" and conditioned and arguments.lambda_ is None:
        problems.append(f"--layout {layout}: its program knows no lambda-conditioned models; fix one with --lambda, "
                        "or use --layout safetensors")  # fmt: skip
    if arguments.lambda_ is not None and not conditioned:
        problems.append(
            f"--lambda {arguments.lambda_:g}: the run's model is not conditioned on lambda; leave it out"
        )
    if problems:
        raise ConfigError(problems)


def empty_module(run: RunConfig, conditioned: bool = True):
    """The recipe's model on the meta device: its names and shapes without its memory.

    Without `conditioned` its embedding of lambda, if any, is left out.
    """
    import torch

    from cca_ds.models import create_model

    shape = run.model.shape if conditioned else run.model.overrides
    with torch.device("meta"):
        return create_model(run.model.preset, **shape)


def metadata_of(run: RunConfig, found: RunWeights, arguments: argparse.Namespace) -> dict[str, str]:
    """What a reader of the file needs to know of its making."""
    import cca_ds

    fixed = {"lambda": f"{arguments.lambda_:g}"} if arguments.lambda_ is not None else {}
    return {
        **fixed,
        "recipe": dump_recipe(run),
        "recipe_name": run.name,
        "preset": run.model.preset,
        "step": str(found.step),
        "ema": str(arguments.ema).lower(),
        "dtype": arguments.dtype,
        "cca_ds_version": cca_ds.__version__,
    }


def describe(run: RunConfig, family: str, output: Path, metrics: dict[str, float] | None) -> str:
    """The model card's text."""
    from cca_ds.models.model_card import model_card

    base = resolve_path(run.model.weights).name if run.model.weights else run.model.preset
    return model_card(run.name, family, base, dump_recipe(run), metrics)


def read_metrics(path: Path) -> dict[str, float]:
    """Numbers of evaluate's JSON report. Raises ConfigError."""
    try:
        values = json.loads(path.expanduser().read_text())["metrics"]
        return {name: float(value) for name, value in values.items() if value is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            [f"--metrics {path}: not a report that evaluate --output wrote ({error})"]
        ) from None


if __name__ == "__main__":
    sys.exit(main())
