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

from cca_ds.config.recipes import ConfigError, add_recipe_arguments, recipe_from_arguments
from cca_ds.console import progress, say
from cca_ds.files import write_atomic

if TYPE_CHECKING:
    from cca_ds.config.schema import RunConfig
    from cca_ds.metrics.extraction import Extractor, Features
    from cca_ds.metrics.images import Images
    from cca_ds.metrics.scores import Reference

FORMATS = ("line", "json", "markdown")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` imports no torch."""
    parser = argparse.ArgumentParser(
        prog="cca_ds.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", nargs="?", help=".npz (arr_0: uint8 [N, H, W, 3]) or folder of images")
    parser.add_argument("--reference", help="the same of real images, or .npz of mu, sigma, mu_s, sigma_s")
    parser.add_argument("--inception_weights", help="the FID network's weights file; never downloaded")
    parser.add_argument("--batch_size", type=int, help="images a forward (default: the recipe's)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where one is)")
    parser.add_argument("--output", help="also write this .json file and the Markdown table beside it")
    parser.add_argument("--format", choices=FORMATS, default="line", help="what to print (default: line)")
    parser.add_argument(
        "--no_cache", action="store_true", help="neither read nor write features beside the images"
    )
    parser.add_argument("--report", metavar="RUN_DIR", help="write RUN_DIR/report.html and nothing else")
    add_recipe_arguments(parser)
    arguments = parser.parse_args(argv)
    if (arguments.samples is None) == (arguments.report is None):
        parser.error("give the samples to score, or --report RUN_DIR")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one clear line for input that cannot be scored."""
    arguments = parse(argv)
    try:
        if arguments.report:
            from cca_ds.reporting.page import write_report

            print(write_report(Path(arguments.report).expanduser()))
            return 0
        run = recipe_from_arguments(arguments)
        report = evaluate(run, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        say(f"evaluate: {' '.join(str(error).split())}")
        return 2
    if report is not None:
        publish(report, arguments.format, arguments.output)
    return 0


def evaluate(run: RunConfig, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Features of the samples and of the reference across all ranks, then the report; None on ranks but 0."""
    from cca_ds.metrics.images import open_images
    from cca_ds.metrics.scores import order_note, score
    from cca_ds.reporting.score_report import build_report

    images = open_images(arguments.samples)
    ranks = Ranks.find(arguments.device)
    try:
        extractor = make_extractor(run, arguments, ranks.device)
        batch_size = arguments.batch_size or run.evaluation.batch_size
        extraction = Extraction(ranks, extractor, batch_size, cached=not arguments.no_cache)
        reference_path = arguments.reference or run.evaluation.reference
        reference = find_reference(run, reference_path, extraction)
        samples = extraction.features(images, "samples")
    finally:
        ranks.leave()
    if ranks.rank != 0:
        return None
    assert reference is not None and samples is not None
    labels_N = images.labels_N if is_digits(run) else None  # Inception's 1,008 classes are in another order
    scores = score(samples, reference, labels_N, device=ranks.device)
    scores.notes.extend(order_note(images.labels_N))
    return build_report(run, images, extractor, scores, reference_path)


def publish(report: dict[str, Any], style: str, output: str | None) -> None:
    """Print the report in one style, and write it as JSON and as Markdown where an output is named."""
    from cca_ds.reporting.score_report import as_json, as_line, as_markdown

    print({"line": as_line, "json": as_json, "markdown": as_markdown}[style](report))
    if output:
        path = Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, as_json(report) + "\n")
        write_atomic(path.with_suffix(".md"), as_markdown(report) + "\n")


def is_digits(run: RunConfig) -> bool:
    """Whether the recipe's images are the handwritten digits, which have their own classifier."""
    return run.tokenizer.name == "digits"


def make_extractor(run: RunConfig, arguments: argparse.Namespace, device: str) -> Extractor:
    """The network of the recipe's images. Raises InceptionWeightsError when its weights are missing."""
    from cca_ds.metrics.extraction import DigitsExtractor, InceptionExtractor

    if is_digits(run):
        return DigitsExtractor()
    return InceptionExtractor(arguments.inception_weights or run.evaluation.inception_weights, device)


def find_reference(run: RunConfig, path: str | None, extraction: Extraction) -> Reference | None:
    """Stored statistics win over computed ones, as in the ADM evaluator; images give precision and recall."""
    from cca_ds.metrics.extraction import digits_features
    from cca_ds.metrics.features import digits_classifier
    from cca_ds.metrics.images import ImagesError, open_images, read_statistics
    from cca_ds.metrics.scores import Reference, reference_of

    if path is None:
        if is_digits(run):
            return reference_of(digits_features(digits_classifier().reference_codes))
        raise ImagesError("--reference is missing: real images or their statistics, an .npz or a folder")
    stored = read_statistics(path)
    try:
        images = open_images(path)
    except ImagesError:
        if stored is None:
            raise
        return Reference(*stored, features_ND=None)
    features = extraction.features(images, "reference")
    if features is None:
        return None
    return Reference(*stored, features.pool_ND) if stored else reference_of(features)


class Ranks:
    """This process among those that torchrun, deepspeed, srun or mpirun started; they gather on the CPU."""

    def __init__(self, rank: int, world_size: int, device: str):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.group: Any = None

    @classmethod
    def find(cls, device: str | None) -> Ranks:
        """Join the other ranks where there are any."""
        from cca_ds.cluster.launch import find_ranks, initialize

        found = find_ranks(os.environ)
        self = cls(found.rank, found.world_size, device or found.device)
        if found.world_size > 1:
            initialize(found)
            import torch.distributed

            self.group = torch.distributed.new_group(backend="gloo")
        return self

    def leave(self) -> None:
        """End the group; without one, nothing."""
        if self.group is not None:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def to_first(self, value: Any) -> list[Any] | None:
        """Every rank's value in order, on rank 0; None on the others."""
        if self.group is None:
            return [value]
        import torch.distributed

        values = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(value, values, dst=0, group=self.group)
        return values


class Extraction:
    """Features of whole image sets: from the cache beside them, or by all ranks together."""

    def __init__(self, ranks: Ranks, extractor: Extractor, batch_size: int, cached: bool):
        self.ranks, self.extractor, self.batch_size, self.cached = ranks, extractor, batch_size, cached

    def features(self, images: Images, what: str) -> Features | None:
        """Features of all images on rank 0, None on the others; collective."""
        from cca_ds.metrics.extraction import cache_path, extract, join, load_cached

        first, found, key = self.ranks.rank == 0, None, ""
        if first and self.cached:
            key = f"{images.sha256()} {self.extractor.identity}"
            found = load_cached(cache_path(images), key)
        if self.ranks.from_first(found is not None):
            if first:
                say(f"{what}: features of {images.count} images from {cache_path(images).name}")
            return found
        part = extract(
            images, self.extractor, self.batch_size,
            lambda batches, total: progress(batches, what, total, show=first), self.ranks.rank, self.ranks.world_size,
        )  # fmt: skip
        parts = self.ranks.to_first(part)
        if parts is None:
            return None
        features = join(parts)
        if self.cached:
            self._store(images, key, features)
        return features

    def _store(self, images: Images, key: str, features: Features) -> None:
        from cca_ds.metrics.extraction import cache_path, store_cached

        try:
            store_cached(cache_path(images), key, features)
        except OSError as error:
            say(f"warning: features are not kept beside the images ({error})")


if __name__ == "__main__":
    sys.exit(main())
