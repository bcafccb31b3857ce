"""What a run needs and how long it takes on a given allocation, without starting anything.

python -m cca_ds.plan --recipe llamagen-3b --nodes "4xh100:8,2xa100:8,4xa40:8"
python -m cca_ds.plan --recipe var-d30 --nodes 1xa40:4 --ds_config ds_configs/zero3_offload.json --json
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from cca_ds.config.deepspeed_file import read_ds_config
from cca_ds.config.recipes import add_recipe_arguments, recipe_from_arguments
from cca_ds.config.schema import RunConfig
from cca_ds.data.manifest import expected_images
from cca_ds.planning.architecture import architecture_of
from cca_ds.planning.memory import Sharding
from cca_ds.planning.nodes import DEVICES, parse_nodes
from cca_ds.planning.outcomes import PLACEMENTS, Job, leaner_outcome, outcome
from cca_ds.planning.report import COST_MODEL, as_tree, report

DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero3.json"


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 2 and one line for what cannot be planned."""
    arguments = _parser().parse_args(argv)
    try:
        run = recipe_from_arguments(arguments)
        groups = parse_nodes(arguments.nodes, arguments.efficiency, arguments.network)
        job = _job(run, Sharding.of(read_ds_config(arguments.ds_config)), arguments.images)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    placements = PLACEMENTS if run.loss.name != "mle" else ("none",)
    own = run.model.activation_checkpointing
    outcomes = [outcome(job, groups, name, on) for name in placements for on in (own, not own)]
    wanted = run.reference.placement if run.loss.name != "mle" else "none"
    shown = next(one for one in outcomes if one.placement == wanted and one.checkpointing == own)
    leaner = leaner_outcome(job, groups, shown)
    if arguments.json:
        print(json.dumps(as_tree(job, groups, outcomes, leaner), indent=1))
    else:
        print(report(job, groups, outcomes, shown, leaner))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cca_ds.plan",
        description=__doc__,
        epilog=COST_MODEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--nodes", required=True, help=f"NODESxDEVICE:GPUS, comma-separated; devices: {', '.join(DEVICES)}"
    )
    parser.add_argument("--ds_config", default=str(DS_CONFIG), help="DeepSpeed's JSON (default: zero3.json)")
    parser.add_argument(
        "--images", type=int, help="images an epoch (default: the data's, ImageNet's unless known)"
    )
    parser.add_argument("--efficiency", default="", help="share of the peak reached, e.g. h100=0.45,a40=0.5")
    parser.add_argument("--network", default="", help="GB/s of a node's network, e.g. a40=12.5,h100=400")
    parser.add_argument("--json", action="store_true", help="plain values: bytes, seconds, FLOPs")
    return parser


def _job(run: RunConfig, sharding: Sharding, images: int | None) -> Job:
    """The recipe as far as planning needs it.

    Raises:
        ValueError: for a model that planning does not know, or no images.
    """
    if images is None:
        images, _ = expected_images(run.data.codes)
    if images < 1:
        raise ValueError(f"--images {images}: an epoch has at least one image")
    return Job(
        model=architecture_of(run.model.preset, run.model.shape, run.model.dropout),
        sharding=sharding,
        pairs=run.batch.global_size,
        images=images,
        sequences=1 if run.loss.name == "mle" else 2,
        reference_offload=run.reference.offload,
        tensor_parallel=run.reference.tensor_parallel,
        element_bytes=4 if run.precision == "fp32" else 2,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the plan, not with a traceback
    sys.exit(main())
