"""Score generated images, or write the report page of a run.

python -m cca_ds.evaluate runs/digits/samples.npz --recipe digits
python -m cca_ds.evaluate samples.npz --recipe llamagen-3b --reference REFERENCE.npz --inception_weights FILE
torchrun --nproc_per_node 8 -m cca_ds.evaluate samples/ --recipe var-d30 --reference statistics.npz
python -m cca_ds.evaluate --report runs/digits
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cca_ds.cluster.failures import run_command
from cca_ds.config.recipes import add_recipe_arguments, recipe_from_arguments
from cca_ds.console import command_parser, path, positive
from cca_ds.files import expand

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from cca_ds.config.schema import RunConfig


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` imports no torch."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("samples", nargs="?", help=".npz (arr_0: uint8 [N, H, W, 3]) or folder of images")
    parser.add_argument("--reference", help="the same of real images, or .npz of mu, sigma, mu_s, sigma_s")
    parser.add_argument("--inception_weights", type=path, help="the FID network's weights file; never downloaded")
    parser.add_argument("--batch_size", type=positive, help="images per forward (default: the recipe's)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--output", type=path, help="also write this .json file and the Markdown table beside it")
    parser.add_argument(
        "--format", choices=("line", "json", "markdown"), default="line", help="what to print (default: line)"
    )
    parser.add_argument("--no_cache", action="store_true", help="no cache of features beside the images")
    parser.add_argument("--report", metavar="RUN_DIR", help="write RUN_DIR/report.html and nothing else")
    add_recipe_arguments(parser, reads=())
    arguments = parser.parse_args(argv)
    if (arguments.samples is None) == (arguments.report is None):
        parser.error("give the samples to score, or --report RUN_DIR")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for input that cannot be scored, 1 for a failure; each error is one line on stderr."""
    arguments = parse(argv)

    def work() -> None:
        if arguments.report:
            from cca_ds.reporting.page import write_report

            return print(write_report(expand(arguments.report)))
        from cca_ds.reporting.evaluation_report import check_output
        from cca_ds.training.checks import recipe_problems

        run = recipe_from_arguments(arguments, recipe_problems)
        if arguments.output:
            check_output(arguments.output)
        report = evaluate(
            run,
            samples=arguments.samples,
            reference=arguments.reference or run.evaluation.reference,
            inception_weights=arguments.inception_weights or run.evaluation.inception_weights,
            batch_size=arguments.batch_size or run.evaluation.batch_size,
            device=arguments.device,
            cached=not arguments.no_cache,
        )
        if report is not None:
            publish(report, arguments.format, arguments.output)

    return run_command("evaluate", work)


def evaluate(
    run: RunConfig, *, samples: str, reference: str | None, inception_weights: str | None, batch_size: int,
    device: str | None, cached: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """Score the samples on all ranks of the launcher; the report on rank 0, None on the others."""
    import torch.distributed

    from cca_ds.cluster.launch import checked_device, find_ranks, initialize, shutdown
    from cca_ds.metrics.evaluation import FeatureSource, RankGroup, evaluate_images
    from cca_ds.metrics.extraction import network_for
    from cca_ds.metrics.image_sets import open_images
    from cca_ds.reporting.evaluation_report import build_report

    images = open_images(samples)
    place = find_ranks(os.environ)
    device = checked_device(device) or place.device
    group = None
    try:
        if place.world_size > 1:
            initialize(place, rendezvous_seconds=run.distributed.rendezvous_seconds)
            group = torch.distributed.new_group(backend="gloo")  # features are gathered on the CPU
        network = network_for(run.tokenizer.name)
        extractor = network.build(inception_weights, device)
        source = FeatureSource(RankGroup(place.rank, place.world_size, group), extractor, batch_size, cached)
        scores = evaluate_images(images, reference, network, source, device)
    finally:
        shutdown()
    if scores is None:
        return None
    sampling = run.sampling.model_dump(mode="json", by_alias=True)
    real = reference or str(network.real_images)
    return build_report(images, extractor, scores, real, run.name, sampling, run.paper)


def publish(report: dict[str, Any], style: str, output: Path | None) -> None:
    """Print the report in one of --format's styles; with an output, also write it as JSON and Markdown."""
    from cca_ds.reporting.evaluation_report import STYLES, write_report_files

    print(STYLES[style](report))
    if output:
        write_report_files(report, output)


if __name__ == "__main__":
    sys.exit(main())
