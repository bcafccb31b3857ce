"""Encode images into a table of codes, on any number of ranks, resumable after a kill at any moment.

    python -m cca_ds.encode --recipe llamagen-b --source imagenet/train --set tokenizer.weights=vq_ds16_c2i.pt
    torchrun --nproc_per_node 8 cca_ds/encode.py --recipe var-d30 --source train.tar --output codes/var \\
        --set tokenizer.weights=vae_ch160v4096z32.pth data.crops_per_image=4
    python -m cca_ds.encode --recipe llamagen-b --import_npy ten_crop ten_crop_105 --output codes/llamagen
    python -m cca_ds.encode --recipe llamagen-b --output codes/llamagen --verify

`--source` is an image folder of ImageNet's layout, a Hugging Face dataset on disk, or a tar of either.
The same command again continues where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys

from cca_ds.cluster.failures import run_command
from cca_ds.config.recipes import add_recipe_arguments, recipe_from_arguments, resolve_path
from cca_ds.console import command_parser, number, path, positive
from cca_ds.files import expand


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; nothing slow is imported, so that --help answers at once."""
    parser = command_parser("encode", __doc__)
    add_recipe_arguments(parser, reads=("data", "seed"))
    add = parser.add_argument
    add("--source", help="images: folder, dataset on disk, or tar (default: the recipe's data.source)")
    add("--split", default="train", help="of a dataset with several splits (default: train)")
    add("--output", type=path, help="folder of the table to write (default: the recipe's data.codes)")
    add("--import_npy", nargs="+", metavar="FOLDER",
        help="instead of images, the original's codes: folders that hold *_codes and *_labels")  # fmt: skip
    add("--verify", action="store_true",
        help="check the table at --output, after encoding it if there is a --source, and decode a grid")  # fmt: skip
    add("--batch_size", type=positive, default=32, help="crops per forward of the tokenizer (default: 32)")
    add("--threads", type=threads, default=min(16, os.cpu_count() or 1), help="that read and crop images")
    add("--images_per_shard", type=positive, default=1024, help="most images lost by a kill (default: 1024)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="tf32", help="of the tokenizer (tf32)")
    add("--flip", action="store_true", help="mirror half of the random crops (VAR's --hflip)")
    add("--max_unreadable", type=share, default=0.001,
        help="share of images that may be unusable; they are listed in skipped.jsonl (default: 0.001)")  # fmt: skip
    add("--max_megapixels", type=megapixels, default=90.0, help="larger images count as unusable (default: 90)")
    add("--device", help="default: this rank's GPU, or cpu")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher gives it
    return parser.parse_args(arguments)


def threads(text: str) -> int:
    """A number of threads."""
    return int(number(text, 1, 256, whole=True))


def share(text: str) -> float:
    """From 0 to 1."""
    return number(text, 0, 1)


def megapixels(text: str) -> float:
    """Of an image that is still decoded."""
    return number(text, 1e-6, 10_000)


def main(arguments: list[str] | None = None) -> int:
    """Encode or import, then verify; returns the exit code."""
    options = parse_arguments(arguments)
    return run_command("encode", lambda: work(options))


def work(options: argparse.Namespace) -> None:
    """Build the table, unless only --verify is given, then verify it if asked to. Raises ValueError, OSError."""
    from cca_ds.cluster.launch import checked_device, find_ranks
    from cca_ds.data.codes import CodeTable
    from cca_ds.data.crops import CropSettings
    from cca_ds.data.image_encoder import ImageEncoder
    from cca_ds.data.image_sources import open_images, say_left_out
    from cca_ds.data.manifest import Manifest
    from cca_ds.data.npy_folders import NpyFolders
    from cca_ds.data.table_builder import build_table
    from cca_ds.data.verify import verify_table
    from cca_ds.training.checks import recipe_problems
    from cca_ds.vq import TOKENIZERS, create_tokenizer

    run = recipe_from_arguments(options, recipe_problems)
    data, spec, images = run.data, TOKENIZERS[run.tokenizer.name], options.source or run.data.source
    if options.output is None and data.codes in TOKENIZERS:
        raise ValueError(f"--output is missing: data.codes={data.codes} of recipe {run.name} is no folder")
    if not (images or options.import_npy or options.verify):
        raise ValueError("--source is missing: give the images, --import_npy, or --verify for a finished table")
    if options.import_npy and not spec.imports_npy:
        raise ValueError(f"--import_npy takes LlamaGen's codes: give a --recipe llamagen-..., not {run.name}")
    if options.import_npy and (options.source or options.flip):
        raise ValueError("--import_npy takes finished codes: leave out --source and --flip")
    if options.flip and data.crops != "random":
        raise ValueError(
            f"--flip mirrors random crops, and data.crops={data.crops}: leave it out, or set data.crops=random"
        )
    weights = resolve_path(run.tokenizer.weights) if run.tokenizer.weights else None
    weights_missing = spec.needs_weights and weights is None
    if weights_missing and (options.verify or not options.import_npy):
        raise ValueError(f"tokenizer.weights is missing: --set tokenizer.weights=FILE ({spec.name}'s)")
    tokenizer = create_tokenizer(spec.name, weights=weights, **run.tokenizer.options)
    ranks = find_ranks(os.environ)
    device, output = checked_device(options.device) or ranks.device, expand(options.output or data.codes)
    if images or options.import_npy:
        if options.import_npy:
            produce, allowed_share = NpyFolders(options.import_npy, show=ranks.rank == 0), 0.0
        else:
            crops = CropSettings(
                data.crops, data.image_size, tuple(data.crop_ranges), data.crops_per_image, options.flip,
                run.seed, spec.image_mode, data.upright,
            )  # fmt: skip
            source, allowed_share = open_images(images, options.split), options.max_unreadable
            if ranks.rank == 0:
                say_left_out(source)
            produce = ImageEncoder(
                source, crops, tokenizer, device, options.batch_size, options.threads, options.precision,
                options.max_megapixels,
            )  # fmt: skip
        tokenizer_hash = "" if weights_missing else tokenizer.hash()
        table = Manifest.before_encoding(spec.name, spec.family, tokenizer.vocab_size, tokenizer_hash)
        plan = produce.plan(table, options.images_per_shard)
        if build_table(output, plan, produce, allowed_share, ranks.rank, ranks.world_size) is None:
            return
    if options.verify:
        for line in verify_table(CodeTable.open(output), tokenizer, device, output / "verify.png"):
            print(line)


if __name__ == "__main__":
    sys.exit(main())
