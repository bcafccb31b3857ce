"""What a run needs and how long it takes on a given allocation, without starting anything.

python -m cca_ds.plan --recipe llamagen-3b --nodes "4xh100:8,2xa100:8,4xa40:8"
python -m cca_ds.plan --recipe llamagen-3b --nodes 1xh200:8 --explain
python -m cca_ds.plan --recipe var-d30 --nodes 1xa40:4 --ds_config ds_configs/zero3_offload.json --json
"""

from __future__ import annotations

import argparse
import signal
import sys

from cca_ds.cluster.devices import DEVICES
from cca_ds.cluster.failures import run_command
from cca_ds.config.deepspeed_file import add_ds_config_argument
from cca_ds.config.recipes import add_recipe_arguments
from cca_ds.console import command_parser
from cca_ds.planning.explanation import COST_MODEL


def main(argv: list[str] | None = None) -> int:
    """Print the plan. Exit code 0, or 2 with one line for bad input."""
    arguments = parse(argv)
    return run_command("plan", lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> None:
    """Read recipe, nodes and DeepSpeed's file, compare the placements, and print."""
    from cca_ds.balance.memory import Sharding
    from cca_ds.config.deepspeed_file import read_ds_config
    from cca_ds.config.recipes import recipe_from_arguments
    from cca_ds.data.manifest import expected_images
    from cca_ds.models.cost import model_cost
    from cca_ds.planning.job import job_of, placement_of
    from cca_ds.planning.nodes import parse_nodes
    from cca_ds.planning.outcomes import leaner_outcome, outcome, own_outcome
    from cca_ds.planning.report import as_json, explain, report
    from cca_ds.training.checks import recipe_problems
    from cca_ds.vq import builtin_images

    run = recipe_from_arguments(arguments, recipe_problems)
    groups = parse_nodes(arguments.nodes, arguments.efficiency, arguments.network)
    images = arguments.images
    if images is None:
        images, _ = expected_images(run.data.codes, builtin_images(run.data.codes))
    model = model_cost(run.model.preset, run.model.shape, run.model.dropout)
    job = job_of(run, model, Sharding.of(read_ds_config(arguments.ds_config)), images)
    first = run.model.activation_checkpointing is True
    outcomes = [outcome(job, groups, place, on) for place in job.placements for on in (first, not first)]
    shown = own_outcome(outcomes, placement_of(run), run.model.activation_checkpointing)
    leaner = leaner_outcome(job, groups, shown)
    explained = explain(job, shown, run.model.compile is not False) if arguments.explain else []
    if arguments.json:
        print(as_json(job, groups, outcomes, leaner, explained))
    else:
        print(report(job, groups, outcomes, shown, leaner, explained))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` does not import torch."""
    parser = command_parser("plan", __doc__, epilog=COST_MODEL)
    add_recipe_arguments(parser, reads=("loss.name", "model.dropout", "data.codes", "batch"))
    add_ds_config_argument(parser)
    parser.add_argument(
        "--nodes", required=True, help=f"NODESxDEVICE:GPUS, comma-separated; devices: {', '.join(DEVICES)}"
    )
    parser.add_argument("--images", type=int, help="images an epoch (default: the data's, ImageNet's unless known)")
    parser.add_argument("--efficiency", default="", help="share of the peak reached, e.g. h100=0.45,a40=0.5")
    parser.add_argument("--network", default="", help="GB/s of a node's network, e.g. a40=12.5,h100=400")
    parser.add_argument("--explain", action="store_true", help="the parts of a step on each kind of GPU")
    parser.add_argument("--json", action="store_true", help="plain values: bytes, seconds, FLOPs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the plan without a traceback
    sys.exit(main())
