"""Images to a table of codes, on any number of ranks, resumable after a kill at any point.

    python -m cca_ds.encode --recipe llamagen-b --source imagenet/train --set tokenizer.weights=vq_ds16_c2i.pt
    torchrun --nproc_per_node 8 cca_ds/encode.py --recipe var-d30 --source train.tar --output codes/var \\
        --set tokenizer.weights=vae_ch160v4096z32.pth data.crops_per_image=4
    python -m cca_ds.encode --recipe llamagen-b --import_npy ten_crop ten_crop_105 --output codes/llamagen
    python -m cca_ds.encode --recipe llamagen-b --output codes/llamagen --verify

`--source` is an image folder of ImageNet's layout, a Hugging Face dataset on disk, or a tar of either.
The same command again takes up where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cca_ds.config.recipes import RunConfig, add_recipe_arguments, recipe_from_arguments, resolve_path

# what is slow to import is imported where it is used, so that --help answers at once
if TYPE_CHECKING:
    from cca_ds.cluster.launch import Ranks
    from cca_ds.data.building import Plan, Producer
    from cca_ds.data.codes import Manifest
    from cca_ds.data.crops import CropSettings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    add = parser.add_argument
    add("--source", help="images: folder, dataset on disk, or tar (default: the recipe's data.source)")
    add("--split", default="train", help="of a dataset with several splits (default: train)")
    add("--output", type=Path, help="folder of the table to make (default: the recipe's data.codes)")
    add("--import_npy", nargs="+", metavar="FOLDER",
        help="instead of images, the original's codes: folders that hold *_codes and *_labels")  # fmt: skip
    add("--verify", action="store_true",
        help="check the table (the one made, or without --source the one at --output) and decode a grid")  # fmt: skip
    add("--batch_size", type=positive, default=32, help="crops in a forward of the tokenizer (default: 32)")
    add("--threads", type=positive, default=min(16, os.cpu_count() or 1), help="that read and crop images")
    add(
        "--images_per_shard", type=positive, default=1024, help="a kill costs at most so many (default: 1024)"
    )
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        default="tf32",
        help="of the tokenizer (default: tf32)",
    )
    add("--flip", action="store_true", help="mirror half of the random crops (VAR's --hflip)")
    add("--max_unreadable", type=float, default=0.001,
        help="share of images that may be unusable; they are listed in skipped.jsonl (default: 0.001)")  # fmt: skip
    add("--max_megapixels", type=float, default=90.0, help="larger images count as unusable (default: 90)")
    add("--device", help="default: this rank's GPU, or cpu")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher gives it
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """An integer above zero."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Encode, import or verify; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        run = recipe_from_arguments(options)
        return work(options, run)
    except (ValueError, OSError) as error:
        print(f"encode: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("encode: stopped; finished shards are kept, the same command goes on", file=sys.stderr)
        return 130


def work(options: argparse.Namespace, run: RunConfig) -> int:
    """What the command line asks for. Raises ValueError with one line for the user."""
    from cca_ds.cluster.launch import find_ranks
    from cca_ds.data.codes import CodeTable

    output = Path(options.output or run.data.codes).expanduser()
    source = options.source or run.data.source
    if options.output is None and run.data.codes == "digits":
        raise ValueError(
            f"--output is missing: the recipe {run.name} names no folder of codes (data.codes=digits)"
        )
    if not (source or options.import_npy or options.verify):
        raise ValueError(
            "--source is missing: give the images (or --import_npy, or --verify for a finished table)"
        )
    ranks = find_ranks(os.environ)
    device = options.device or ranks.device
    if options.import_npy or source:
        make = import_codes if options.import_npy else encode_images
        manifest = make(options, run, output, ranks, device)
        if manifest is None:
            print(f"encode: rank {ranks.rank} has finished its shards, others are at work", file=sys.stderr)
            return 0
    if options.verify:
        from cca_ds.data.verify import verify_table

        table = CodeTable.open(output)
        for line in verify_table(table, tokenizer_of(run), device, output / "verify.png"):
            print(line)
    return 0


def tokenizer_of(run: RunConfig):
    """The recipe's tokenizer with its weights."""
    from cca_ds.vq import create_tokenizer

    settings = run.tokenizer
    if settings.name != "digits" and settings.weights is None:
        raise ValueError(
            f"tokenizer.weights is missing: {settings.name} without weights makes codes of nothing"
        )
    weights = None if settings.weights is None else resolve_path(settings.weights)
    return create_tokenizer(settings.name, weights=weights, **settings.options)


def encode_images(
    options: argparse.Namespace, run: RunConfig, output: Path, ranks: Ranks, device: str
) -> Manifest | None:
    """Encode a source of images; None when other ranks are still at work."""
    from cca_ds.data.building import Plan
    from cca_ds.data.encoding import ImageEncoder
    from cca_ds.data.images import open_images

    settings = crop_settings(run, options.flip)
    source = open_images(options.source or run.data.source, options.split)
    tokenizer = tokenizer_of(run)
    table = empty_manifest(run, tokenizer.vocab_size, tokenizer.hash())
    table = replace(
        table,
        classes=len(source.class_names),
        class_names=source.class_names,
        crops=settings.count,
        sequence_length=tokenizer.sequence_length(settings.image_size),
        crop_settings=settings.as_dict(),
        source_hash=source.fingerprint(),
    )
    how = {"precision": options.precision, "max_megapixels": options.max_megapixels}
    plan = Plan(table, len(source), options.images_per_shard, how)
    encoder = ImageEncoder(
        source,
        settings,
        tokenizer,
        device,
        options.batch_size,
        options.threads,
        options.precision,
        options.max_megapixels,
    )
    return run_builder(plan, output, encoder, options.max_unreadable, ranks)


def import_codes(
    options: argparse.Namespace, run: RunConfig, output: Path, ranks: Ranks, device: str
) -> Manifest | None:
    """Turn the original's .npy files into a table; None when other ranks are still at work."""
    from tqdm import tqdm

    from cca_ds.data.building import Plan
    from cca_ds.data.import_npy import NpyFolders
    from cca_ds.vq import create_tokenizer

    if run.tokenizer.name != "llamagen-vq16":
        raise ValueError(f"--import_npy takes LlamaGen's codes: give a --recipe llamagen-..., not {run.name}")
    folders = NpyFolders(options.import_npy)
    if folders.images < folders.files and ranks.rank == 0:
        print(
            f"encode: the last {folders.files - folders.images} files repeat the first ones (the original's sampler "
            "pads to its number of ranks) and are left out",
            file=sys.stderr,
        )
    with tqdm(total=folders.images, desc="labels", disable=ranks.rank != 0, dynamic_ncols=True) as bar:
        labels_N = folders.labels(bar.update)
    known = run.tokenizer.weights is not None
    tokenizer = tokenizer_of(run) if known else create_tokenizer(run.tokenizer.name, **run.tokenizer.options)
    table = replace(
        empty_manifest(run, tokenizer.vocab_size, tokenizer.hash() if known else ""),
        classes=int(labels_N.max()) + 1,
        crops=folders.crops,
        sequence_length=folders.sequence_length,
        crop_settings={"kind": "imported", "folders": [Path(f).name for f in options.import_npy]},
        source_hash=folders.fingerprint(labels_N),
    )
    plan = Plan(table, folders.images, options.images_per_shard, {})
    return run_builder(plan, output, folders, 0.0, ranks)


def crop_settings(run: RunConfig, flip: bool) -> CropSettings:
    """The recipe's crops."""
    from cca_ds.data.crops import CropSettings

    ranges = () if run.data.crops == "none" else tuple(run.data.crop_ranges)
    mode = "L" if run.tokenizer.name == "digits" else "RGB"
    return CropSettings(
        run.data.crops, run.data.image_size, ranges, run.data.crops_per_image, flip, run.seed, mode
    )


def empty_manifest(run: RunConfig, vocab_size: int, tokenizer_hash: str) -> Manifest:
    """What is known of a table before any image is looked at."""
    from cca_ds.data.manifest import Manifest, package_version

    return Manifest(
        images=0,
        classes=0,
        crops=0,
        sequence_length=0,
        vocab_size=vocab_size,
        family="var" if run.tokenizer.name == "var-vqvae" else "llamagen",
        tokenizer=run.tokenizer.name,
        tokenizer_hash=tokenizer_hash,
        package_version=package_version(),
    )


def run_builder(
    plan: Plan, output: Path, produce: Producer, allowed_share: float, ranks: Ranks
) -> Manifest | None:
    """Build the table under a progress bar and say what came of it."""
    from tqdm import tqdm

    from cca_ds.data.building import TableBuilder, build
    from cca_ds.data.writing import one_line_errors

    builder = TableBuilder(output, plan)
    rank, world_size = ranks.rank, ranks.world_size
    with one_line_errors(output):
        try:
            manifest = builder.begin()
            if manifest is not None:
                print(f"encode: {output} is finished already: {manifest.images} images", file=sys.stderr)
                return manifest
            share, todo = builder.work_of(rank, world_size)
            with tqdm(total=share, initial=share - todo, desc="images", unit="image",
                      disable=rank != 0, dynamic_ncols=True) as bar:  # fmt: skip
                manifest = build(builder, produce, rank, world_size, allowed_share, bar.update)
        except BaseException:
            if world_size == 1:
                builder.discard_if_empty()
            raise
    if manifest is not None:
        report(output, manifest)
    return manifest


def report(output: Path, manifest: Manifest) -> None:
    """Say what the table holds."""
    print(
        f"encode: {output}: {manifest.images} images of {manifest.classes} classes, {manifest.crops} crops of "
        f"{manifest.sequence_length} codes, {sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB",
        file=sys.stderr,
    )
    if manifest.converted:
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(manifest.converted.items()))
        print(f"encode: converted to {manifest.crop_settings['mode']}: {modes}", file=sys.stderr)
    if manifest.skipped_images:
        print(
            f"encode: {manifest.skipped_images} images skipped, listed in {output / 'skipped.jsonl'}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
