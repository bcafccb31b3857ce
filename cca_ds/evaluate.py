"""Score generated images, or write the report page of a run.

python -m cca_ds.evaluate runs/digits/samples.npz --recipe digits
python -m cca_ds.evaluate samples.npz --recipe llamagen-3b --reference REFERENCE.npz --inception_weights FILE
torchrun --nproc_per_node 8 -m cca_ds.evaluate samples/ --recipe var-d30 --reference statistics.npz
python -m cca_ds.evaluate --make_reference photos/ --recipe mine.yaml --inception_weights FILE --output real.npz
python -m cca_ds.evaluate --report runs/digits

Samples in a run's folder leave their scores there, as scores.json, for its report.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cca_ds.cluster.failures import run_command
from cca_ds.config.recipes import add_recipe_arguments, recipe_from_arguments
from cca_ds.console import command_parser, path, positive
from cca_ds.files import expand

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for torch
    from cca_ds.config.schema import RunConfig
    from cca_ds.metrics.evaluation import FeatureSource
    from cca_ds.metrics.extraction import ScoringNetwork

Result = TypeVar("Result")

# flags that mean something for samples to score, --make_reference or --report, and not for all three
_MODES = {
    "reference": ("samples",), "format": ("samples",), "no_cache": ("samples",), "resize": ("make_reference",),
    "split": ("make_reference",), "output": ("samples", "make_reference"), "device": ("samples", "make_reference"),
    "inception_weights": ("samples", "make_reference"), "batch_size": ("samples", "make_reference"),
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` imports no torch."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "samples", nargs="*", help=".npz (arr_0: uint8 [N, H, W, 3]) or folder of images; "
        "two are the reference and the samples, in the order of ADM's evaluator"
    )  # fmt: skip
    parser.add_argument("--reference", help="the same of real images, or .npz of mu, sigma, mu_s, sigma_s")
    parser.add_argument("--inception_weights", type=path, help="the FID network's weights file; never downloaded")
    parser.add_argument("--batch_size", type=positive, help="images per forward (default: the recipe's)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--output", type=path, help="also write this .json file and the Markdown table beside it")
    parser.add_argument("--format", choices=("line", "json", "markdown"), help="what to print (default: line)")
    parser.add_argument("--no_cache", action="store_true", help="no cache of features beside the images")
    parser.add_argument("--make_reference", metavar="SOURCE", help="write --output, the statistics of real images: "
                        "a folder, dataset or tar, as encode takes them")  # fmt: skip
    parser.add_argument("--split", help="of a dataset with several splits (default: train)")
    parser.add_argument("--resize", type=positive, metavar="SIDE", help="of real images (default: data.image_size)")
    parser.add_argument("--report", metavar="RUN_DIR", help="write RUN_DIR/report.html and nothing else")
    add_recipe_arguments(parser, reads=())
    arguments = parser.parse_args(argv)
    if len(arguments.samples) == 2 and arguments.reference is None:
        arguments.reference = arguments.samples.pop(0)
    arguments.samples = arguments.samples[0] if len(arguments.samples) == 1 else arguments.samples or None
    given = sum(part is not None for part in (arguments.samples, arguments.report, arguments.make_reference))
    if given != 1 or isinstance(arguments.samples, list):
        parser.error("give the samples to score, or --make_reference SOURCE, or --report RUN_DIR")
    if arguments.make_reference and arguments.output is None:
        parser.error("--make_reference needs --output FILE.npz")
    mode = "make_reference" if arguments.make_reference else "report" if arguments.report else "samples"
    for flag, modes in _MODES.items():
        if getattr(arguments, flag) and mode not in modes:
            what = {"samples": "samples to score"}.get(mode, f"--{mode}")
            parser.error(f"--{flag} has no meaning with {what}: leave it out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for input that cannot be scored, 1 for a failure; each error is one line on stderr."""
    return run_command("evaluate", lambda: work(parse(argv)))


def work(arguments: argparse.Namespace) -> None:
    """Write a run's report page, or the statistics of real images, or score samples. Raises ValueError, OSError."""
    if arguments.report:
        from cca_ds.reporting.page import write_report

        return print(write_report(expand(arguments.report)))
    from cca_ds.reporting.evaluation_report import check_output, output_in_run
    from cca_ds.training.checks import recipe_problems

    run = recipe_from_arguments(arguments, recipe_problems)
    if arguments.make_reference:
        check_output(arguments.output, ".npz")
        return with_network(run, arguments, lambda *found: make_reference(run, arguments, *found))
    output = arguments.output or output_in_run(expand(arguments.samples))
    if output:
        check_output(output, ".json")
    report = with_network(run, arguments, lambda *found: evaluate(run, arguments, *found))
    if report is not None:
        publish(report, arguments.format or "line", output)


def with_network(run: RunConfig, arguments: argparse.Namespace, use: Callable[..., Result]) -> Result:
    """What `use(network, source, device)` returns on this rank of the launcher, with the recipe's scoring network."""
    import torch.distributed

    from cca_ds.cluster.launch import checked_device, find_ranks, initialize, shutdown
    from cca_ds.metrics.evaluation import FeatureSource, RankGroup
    from cca_ds.metrics.extraction import network_for

    place = find_ranks(os.environ)
    device = checked_device(arguments.device) or place.device
    group = None
    try:
        if place.world_size > 1:
            initialize(place, rendezvous_seconds=run.distributed.rendezvous_seconds)
            group = torch.distributed.new_group(backend="gloo")  # features are gathered on the CPU
        network = network_for(run.tokenizer.name)
        extractor = network.build(arguments.inception_weights or run.evaluation.inception_weights, device)
        batch_size = arguments.batch_size or run.evaluation.batch_size
        ranks = RankGroup(place.rank, place.world_size, group)
        cached = not (arguments.no_cache or arguments.make_reference)
        return use(network, FeatureSource(ranks, extractor, batch_size, cached), device)
    finally:
        shutdown()


def evaluate(
    run: RunConfig, arguments: argparse.Namespace, network: ScoringNetwork, source: FeatureSource, device: str
) -> dict[str, Any] | None:
    """Score the samples on all ranks of the launcher; the report on rank 0, None on the others."""
    from cca_ds.metrics.evaluation import evaluate_images
    from cca_ds.metrics.image_sets import open_images
    from cca_ds.reporting.evaluation_report import build_report

    images, reference = open_images(arguments.samples), arguments.reference or run.evaluation.reference
    scores = evaluate_images(images, reference, network, source, device)
    if scores is None:
        return None
    sampling = run.sampling.model_dump(mode="json", by_alias=True)
    real = reference or str(network.real_images)
    return build_report(images, source.extractor, scores, real, run.name, sampling, run.paper)


def make_reference(
    run: RunConfig, arguments: argparse.Namespace, network: ScoringNetwork, source: FeatureSource, device: str
) -> None:
    """Write the statistics of real images, cropped as encode does without augmentation."""
    from cca_ds.data.crops import CropSettings
    from cca_ds.data.image_sources import open_images, say_left_out
    from cca_ds.metrics.real_images import CroppedImages, write_reference
    from cca_ds.reporting.evaluation_report import protocol
    from cca_ds.vq import TOKENIZERS

    path, side = expand(arguments.make_reference), arguments.resize or run.data.image_size
    found, threads = open_images(path, arguments.split or "train"), min(16, os.cpu_count() or 1)
    crops = CropSettings("none", side, mode=TOKENIZERS[run.tokenizer.name].image_mode, upright=run.data.upright)
    images = CroppedImages(found, path, crops, threads)
    if source.ranks.rank == 0:
        say_left_out(found)
    features = source.features(images, "reference")
    skipped = source.ranks.gather(images.skipped)
    if features is not None and skipped is not None:
        about = {"recipe": run.name, "protocol": protocol(source.extractor)}
        print(write_reference(arguments.output, images, features, [*itertools.chain(*skipped)], about))


def publish(report: dict[str, Any], style: str, output: Path | None) -> None:
    """Print the report in one of --format's styles; with an output, also write it as JSON and Markdown."""
    from cca_ds.reporting.evaluation_report import STYLES, write_report_files

    print(STYLES[style](report))
    if output:
        write_report_files(report, output)


if __name__ == "__main__":
    sys.exit(main())
