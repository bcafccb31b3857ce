"""Draw images: PNG files by class, a grid, and the archive that ADM's evaluator reads.

    python -m cca_ds.sample --weights runs/digits --output samples --npz --grid
    python -m cca_ds.sample --recipe digits --output samples/guided --guidance_scale 0.5
    torchrun --nproc_per_node 8 -m cca_ds.sample --recipe llamagen-3b --weights policy.safetensors \\
        --set tokenizer.weights=vq_ds16_c2i.pt --output samples/3b --resize 256 --npz
    python -m cca_ds.sample --recipe var-d30 --weights runs/var-d30 --output dogs --classes 207 --grid \\
        --set tokenizer.weights=vae_ch160v4096z32.pth sampling.images_per_class=8

The same command again, on any number of ranks, draws what is missing. An image depends on sampling.seed and its own
index, never on the batch (sampling.batch_size) or the ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cca_ds.config.recipes import (
    ConfigError,
    RunConfig,
    add_recipe_arguments,
    recipe_from_arguments,
    resolve_path,
)

# what is slow to import is imported where it is used, so that --help answers at once
if TYPE_CHECKING:
    from cca_ds.cluster.launch import Ranks
    from cca_ds.sampling.image_folder import SampleFolder
    from cca_ds.sampling.sampler import Sampler, Source

WAIT_SECONDS = 24 * 3600.0  # ranks that are done wait for those that have more left to draw


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    parser.set_defaults(recipe=None)  # of a run's folder: its own
    add = parser.add_argument
    add("--weights", type=Path, help="weights file, or a run's folder (default: the recipe's model.weights)")
    add("--checkpoint", type=Path, help="of the run's checkpoints, another than the newest")
    add("--ema", action="store_true", help="of a run's folder: the moving average of its policy")
    add("--output", type=Path, required=True, help="folder to fill; settings go into its sampling.json")
    add("--guidance_scale", type=float, help="the paper's s, c + s (c - u); 0 is guidance-free")
    add(
        "--cfg_scale",
        "--cfg-scale",
        "--cfg",
        type=float,
        help="the same as the family's own number: LlamaGen's s + 1",
    )
    add("--classes", type=int, nargs="+", help="draw these classes only (default: all)")
    add(
        "--resize",
        type=int,
        metavar="SIDE",
        help="resize to this side before saving, bicubic (LlamaGen's 384 to 256)",
    )
    add("--npz", action="store_true", help="also write samples.npz for ADM's evaluator")
    add("--grid", action="store_true", help="also write grid.png")
    add("--no_cuda_graphs", action="store_true", help="on a GPU: decode without CUDA graphs")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher gives it
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 with one clear line for bad input, 1 for a failure of the system, 130 when interrupted."""
    arguments = parse(argv)
    try:
        run = recipe_of(arguments)
        sample(run, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"sample: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    except KeyboardInterrupt:
        print("sample: stopped; finished images are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def recipe_of(arguments: argparse.Namespace) -> RunConfig:
    """The recipe named, else that of the run's folder, else the digits'; with guidance as asked for.

    Raises:
        ConfigError: with every problem found.
    """
    folder = arguments.weights
    if arguments.recipe is None:
        own = folder is not None and (folder / "config.yaml").is_file()
        arguments.recipe = str(folder / "config.yaml") if own else "digits"
    if arguments.guidance_scale is not None and arguments.cfg_scale is not None:
        raise ConfigError(["--guidance_scale and --cfg_scale say the same in two ways; give one"])
    run = recipe_from_arguments(arguments)
    scale = arguments.guidance_scale
    if arguments.cfg_scale is not None:
        from cca_ds.sampling.guidance import paper_scale
        from cca_ds.sampling.sampler import family_of

        scale = paper_scale(family_of(run), arguments.cfg_scale)
    if scale is not None and not 0.0 <= scale < float("inf"):
        raise ConfigError([f"guidance s = {scale:g} must be finite and at least 0 (0 is guidance-free)"])
    if arguments.resize is not None and arguments.resize < 1:
        raise ConfigError([f"--resize {arguments.resize}: give the side in pixels, e.g. 256"])
    if scale is not None:
        run.sampling.guidance_scale = scale
    return run


def source_of(run: RunConfig, arguments: argparse.Namespace) -> Source:
    """Where the weights come from. Raises ConfigError when nothing names them."""
    from cca_ds.sampling.sampler import Source

    path = arguments.weights or (run.model.weights and resolve_path(run.model.weights))
    if path is None:
        raise ConfigError([f"--weights is missing: recipe {run.name} names no model.weights to draw from"])
    return Source(Path(path).expanduser(), arguments.checkpoint, arguments.ema)


def sample(run: RunConfig, arguments: argparse.Namespace) -> None:
    """Draw what is missing of this rank's share; then, on rank 0, write the archive and the grid."""
    import torch

    from cca_ds.cluster.launch import find_ranks, initialize, shutdown
    from cca_ds.config.deepspeed_file import resolve_precision
    from cca_ds.sampling.image_folder import SampleFolder, wanted_images
    from cca_ds.sampling.sampler import draw_missing, load_sampler, on_first

    ranks, source = find_ranks(os.environ), source_of(run, arguments)
    precision = resolve_precision({}, run, ranks.device.startswith("cuda"))
    try:
        if ranks.world_size > 1:
            ranks = initialize(ranks, WAIT_SECONDS)
        sampler = load_sampler(run, source, ranks, precision)
        classes = sampler.model.num_classes
        folder = SampleFolder(arguments.output.expanduser(), classes)
        wanted = wanted_images(run.sampling.images_per_class, classes, arguments.classes)
        settings = describe_settings(run, arguments, source, sampler, precision)
        on_first(ranks, lambda: folder.claim(settings))
        announce(run, ranks, len(wanted), len(wanted) - len(folder.missing(wanted)), precision)
        started = time.perf_counter()
        draw_missing(run, sampler, folder, wanted, ranks, arguments.resize, not arguments.no_cuda_graphs)
        if ranks.world_size > 1:
            torch.distributed.barrier()
        if ranks.rank == 0:
            write_products(run, arguments, folder, wanted, time.perf_counter() - started)
    finally:
        shutdown()


def describe_settings(
    run: RunConfig, arguments: argparse.Namespace, source: Source, sampler: Sampler, precision: str
) -> dict[str, Any]:
    """What shapes the images, for sampling.json and the evaluation's report."""
    import torch

    import cca_ds
    from cca_ds.sampling.guidance import family_scale

    drawing = run.sampling.model_dump(mode="json", by_alias=True, exclude={"batch_size"})
    if not run.model.lambda_conditioning:
        drawing["lambda"] = None
    elif drawing["lambda"] is None:
        drawing["lambda"] = run.loss.lambda_
    return {
        "recipe": run.name,
        "model": run.model.preset,
        "weights": str(source.path),
        "weights_sha256": sampler.weights_sha256,
        "tokenizer": run.tokenizer.name,
        "tokenizer_hash": sampler.tokenizer_hash,
        **drawing,
        "guidance_of_family": family_scale(sampler.model.family, run.sampling.guidance_scale),
        "precision": precision,
        "resize": arguments.resize and f"bicubic to {arguments.resize}",
        "versions": {"cca_ds": cca_ds.__version__, "torch": torch.__version__},
    }


def announce(run: RunConfig, ranks: Ranks, images: int, there: int, precision: str) -> None:
    """One line on rank 0: how many images, with which guidance in both conventions."""
    if ranks.rank:
        return
    from cca_ds.console import say
    from cca_ds.sampling.guidance import describe_guidance
    from cca_ds.sampling.sampler import family_of

    settings = run.sampling
    say(
        f"{run.model.preset}: {images} images, {there} of them there already; "
        f"{describe_guidance(family_of(run), settings.guidance_scale)}, {settings.guidance_schedule}; "
        f"temperature {settings.temperature:g}, top-k {settings.top_k}, top-p {settings.top_p:g}, "
        f"seed {settings.seed}; {precision}, {ranks.world_size} rank(s) on {ranks.device.partition(':')[0]}"
    )


def write_products(
    run: RunConfig, arguments: argparse.Namespace, folder: SampleFolder, wanted: list[int], seconds: float
) -> None:
    """The mark that all images are there, the archive and the grid, and the paths of each."""
    from cca_ds.console import progress, say

    folder.finish(len(wanted))
    say(f"{len(wanted)} images in {seconds:.1f} s: {folder.folder / 'images'}")
    if arguments.npz:
        show = run.logging.progress
        say(f"archive: {folder.write_npz(wanted, lambda items: progress(items, 'npz', len(wanted), show))}")
    if arguments.grid:
        say(f"grid: {folder.write_grid(wanted)}")


if __name__ == "__main__":
    sys.exit(main())
