"""Draw images: PNG files by class, a grid, and the archive that ADM's evaluator reads.

    python -m cca_ds.sample --weights runs/digits --output samples --npz --grid
    python -m cca_ds.sample --recipe digits --output samples/guided --guidance_scale 0.5
    python -m cca_ds.sample --weights runs/llamagen-3b-gft --output samples/gft --gft_beta 0.7
    torchrun --nproc_per_node 8 -m cca_ds.sample --recipe llamagen-3b --weights policy.safetensors \\
        --set tokenizer.weights=vq_ds16_c2i.pt --output samples/3b --resize 256 --npz
    torchrun --nproc_per_node 8 -m cca_ds.sample --recipe var-d16 --weights var_d16.pth --output generated --codes \\
        --set tokenizer.weights=vae_ch160v4096z32.pth sampling.images_per_class=1300
    python -m cca_ds.sample --recipe var-d30 --weights runs/var-d30 --output dogs --classes 207 --grid \\
        --set tokenizer.weights=vae_ch160v4096z32.pth sampling.images_per_class=8

The same command again, on any number of ranks, draws what is missing. An image depends on sampling.seed and its own
index, never on the batch (sampling.batch_size) or the ranks.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import SUPPRESS, Namespace

from cca_ds.cluster.failures import INTERRUPTED, run_command
from cca_ds.config.recipes import ConfigError, add_recipe_arguments, recipe_from_arguments
from cca_ds.config.schema import RunConfig
from cca_ds.console import command_parser, path, say

WAIT_SECONDS = 24 * 3600.0  # ranks that are done wait for those that have more left to draw


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = command_parser("sample", __doc__)
    add_recipe_arguments(parser, reads=("model.weights", "loss.lambda"))
    add = parser.add_argument
    add(
        "--weights",
        "--ckpt_path",
        "--gpt-ckpt",
        type=path,
        help="weights file, or a run's folder (default: the recipe's model.weights)",
    )
    add("--checkpoint", type=path, help="of the run's checkpoints, another than the newest")
    add("--ema", action="store_true", help="of a run's folder: the moving average of its policy")
    add(
        "--output",
        "--sample_dir",
        "--sample-dir",
        type=path,
        default="samples",
        help="folder to fill; settings go into its sampling.json (default: samples)",
    )
    add("--guidance_scale", type=float, help="the paper's s, c + s (c - u); 0 is guidance-free")
    add("--cfg_scale", "--cfg-scale", "--cfg", type=float, help="the family's own number: LlamaGen's s + 1")
    add("--gft_beta", type=float, help="of a model trained by GFT: like s = (1 - beta) / beta, at no cost")
    add("--classes", nargs="+", help="draw these classes only, by number or name (default: all)")
    add("--resize", "--image-size-eval", type=int, metavar="SIDE",
        help="resize to this side before saving, bicubic (LlamaGen's 384 to 256)")  # fmt: skip
    add("--codes", action="store_true", help="write a table of codes, undecoded, for data.generated of loss.name=ddo")
    add("--npz", action="store_true", help="also write samples.npz for ADM's evaluator")
    add("--grid", action="store_true", help="also write grid.png")
    add("--no_cuda_graphs", action="store_true", help="on a GPU: decode without CUDA graphs")
    add("--local_rank", "--local-rank", type=int, help=SUPPRESS)  # set by deepspeed's launcher
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 with one line for bad input, 1 for a failure of the system, 130 when interrupted."""
    return run_command("sample", lambda: sample(parse(argv)))


def read_recipe(arguments: Namespace) -> RunConfig:
    """The named recipe, else that of the run's folder or of the weights file, else the digits', with the flags'
    guidance.
    """
    from cca_ds.checkpoints.run_weights import is_run_folder, recipe_text
    from cca_ds.config.original_names import is_published
    from cca_ds.data.generated import require_plain
    from cca_ds.models import family_of  # slow to import: after the parser, so that --help answers at once
    from cca_ds.sampling import drawing, guidance
    from cca_ds.training.checks import recipe_problems

    text, weights = None, arguments.weights
    if arguments.recipe is None and weights is not None and not arguments.gpt_model and arguments.depth is None:
        if is_run_folder(weights):
            arguments.recipe = str(weights / "config.yaml")
        elif not weights.is_dir() and (text := recipe_text(weights)):
            arguments.recipe = str(weights)
        elif is_published(weights.name) and not arguments.original_vq_ckpt:
            raise ConfigError([f"--weights {weights}: name its model with --recipe, docs/weights.md says which"])
    run = recipe_from_arguments(arguments, recipe_problems, text)
    family, of = family_of(run.model.preset), run.sampling
    of.guidance_scale = guidance.chosen_scale(family, arguments.guidance_scale, arguments.cfg_scale, of.guidance_scale)
    of.gft_beta = guidance.chosen_gft_beta(arguments.gft_beta, of.gft_beta, bool(run.model.gft_conditioning))
    drawing.check_side(arguments.resize)
    if arguments.codes:
        if odd := [flag for flag in ("npz", "grid", "resize") if getattr(arguments, flag)]:
            raise ConfigError([f"--{odd[0]} needs images, and --codes decodes none: leave one of them out"])
        require_plain(of.model_dump(), "--codes: would draw with")
    return run


def sample(arguments: Namespace) -> int | None:
    """Draw this rank's share of the missing images; then, on rank 0, write the archive and the grid."""
    run = read_recipe(arguments)
    from cca_ds.checkpoints.load_model import find_source, load_model
    from cca_ds.checkpoints.run_weights import class_names
    from cca_ds.cluster.collectives import barrier, on_first
    from cca_ds.cluster.launch import find_ranks, initialize, shutdown
    from cca_ds.config.deepspeed_file import resolve_precision
    from cca_ds.models import family_of
    from cca_ds.sampling import drawing
    from cca_ds.sampling.code_table import draw_code_table
    from cca_ds.sampling.image_folder import SampleFolder, chosen_classes, image_indices

    source = find_source(arguments.weights, arguments.checkpoint, arguments.ema, run.model, run.name)
    ranks, family, show = find_ranks(os.environ), family_of(run.model.preset), run.logging.progress
    precision = resolve_precision({}, run, ranks.device.startswith("cuda"))
    lambda_ = drawing.sampling_lambda(run.sampling, run.loss.lambda_, run.model.lambda_conditioning)
    folder: SampleFolder | None = None
    made_by = {"recipe": run.name, "model": run.model.preset, "tokenizer": run.tokenizer.name}
    settings = drawing.draw_settings(run.sampling, lambda_)
    how = drawing.describe_settings(run.sampling, family, lambda_, precision, arguments.resize)
    try:
        if ranks.world_size > 1:
            ranks = initialize(ranks, WAIT_SECONDS, run.distributed.rendezvous_seconds)
        loaded = load_model(run.model, run.tokenizer, source, ranks, precision, decodes=not arguments.codes)
        folder = SampleFolder(arguments.output, loaded.model.num_classes)
        names = class_names(run, source.path) if arguments.classes or arguments.codes else ()
        chosen = chosen_classes(arguments.classes or (), names, folder.classes)
        indices = image_indices(run.sampling.images_per_class, folder.classes, chosen or None)
        if arguments.codes:
            drawn = {**made_by, **loaded.identity(), **how}
            draw_code_table(
                arguments.output, loaded.model, run.tokenizer.name, indices, settings, run.sampling.batch_size, drawn,
                names, rank=ranks.rank, world_size=ranks.world_size, cuda_graphs=not arguments.no_cuda_graphs,
            )  # fmt: skip
            barrier(ranks)
            return None
        on_first(ranks, lambda: folder.claim({**made_by, **loaded.identity(), **how}))
        if ranks.rank == 0:
            say(f"{run.model.preset}: {drawing.describe_draw(run.sampling, family, folder, indices)}; {precision}, "
                f"{ranks.world_size} rank(s) on {ranks.device.partition(':')[0]}")  # fmt: skip
        started = time.perf_counter()
        drawing.draw_missing(
            loaded.model, loaded.tokenizer, folder, indices[ranks.rank :: ranks.world_size],
            settings, run.sampling.batch_size, side=arguments.resize,
            cuda_graphs=not arguments.no_cuda_graphs, show=show and ranks.rank == 0,
        )  # fmt: skip
        barrier(ranks)
        if ranks.rank == 0:
            say(f"{len(indices)} images in {time.perf_counter() - started:.1f} s: {folder.folder / 'images'}")
            for line in folder.finish(indices, npz=arguments.npz, grid=arguments.grid, show=show):
                say(line)
    except KeyboardInterrupt:
        print("sample: stopped; finished images are kept, the same command draws the rest", file=sys.stderr)
        return INTERRUPTED
    finally:
        if folder is not None:
            folder.release()
        shutdown()


if __name__ == "__main__":
    sys.exit(main())
