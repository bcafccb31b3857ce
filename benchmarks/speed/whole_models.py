"""Trains and samples whole models with random weights, through the same entry points as a user's run.

    python benchmarks/speed/whole_models.py --output benchmarks/results        # LlamaGen-3B and VAR-d30 on a GPU
    python benchmarks/speed/whole_models.py --recipes llamagen-b --pairs 4 --steps 3 --images 2

For each recipe: a few steps of `cca_ds/train.py` under ZeRO-3 on random codes, with its first loss checked to be that
of a policy that equals its reference; the same without compiled blocks ("uncompiled"); then guidance-free images, for
LlamaGen with CUDA graphs and without. The first step, which warms up, is left out of the median. Weights are drawn on
the device, once. Results are written whenever there is one more: what a time limit cuts off loses nothing that was
measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from provenance import REPOSITORY, cpu, origin

from cca_ds.config.recipes import load_recipe
from cca_ds.data.table_files import write_codes
from cca_ds.files import save_safetensors
from cca_ds.models import create_model, model_config
from cca_ds.sampling import generate
from cca_ds.vq import create_tokenizer

TOKENIZER = {"channels": 32}  # only the codebook and the residual convolutions are used
PARTS = ("training", "uncompiled", "sampling")
QUIET = (
    "logging.every_steps=1", "logging.sample_every_steps=null", "logging.tensorboard=false", "logging.progress=false",
    "baseline.nll_band=null", "checkpoint.every_steps=1000000", "checkpoint.every_minutes=null",
    "checkpoint.final=false", "data.workers=0",
)  # fmt: skip


def random_codes(folder: Path, recipe: str, overrides: list[str], images: int) -> Path:
    """A table of random codes that fits the recipe's model; the one that is there already."""
    if (folder / "codes").is_dir():
        return folder / "codes"
    model = load_recipe(recipe, overrides).model
    config = model_config(model.preset, **model.overrides)
    draw = np.random.default_rng(0)
    write_codes(
        folder / "codes",
        draw.integers(0, config.vocab_size, (images, 1, config.sequence_length)),
        draw.integers(0, config.num_classes, images),
        vocab_size=config.vocab_size,
        classes=config.num_classes,
        family=recipe.split("-")[0],
        tokenizer="random",
        tokenizer_hash="",
    )
    return folder / "codes"


def tokenizer_settings(folder: Path, scales: tuple[int, ...], vocab_size: int) -> list[str]:
    """Settings that name a VAR's tokenizer of random weights."""
    options = {**TOKENIZER, "scales": list(scales), "codebook_size": vocab_size}
    torch.manual_seed(0)
    torch.save(create_tokenizer("var-vqvae", **options).state_dict(), folder / "tokenizer.pth")
    return [f"tokenizer.weights={folder / 'tokenizer.pth'}", f"tokenizer.options={json.dumps(options)}"]


def random_weights(folder: Path, recipe: str, overrides: list[str], tokenizer_options: dict[str, Any] | None) -> Path:
    """A file of weights drawn at random on the device (on a CPU, 3 B take a minute); the one that is there already."""
    if (folder / "weights.safetensors").is_file():
        return folder / "weights.safetensors"
    model = load_recipe(recipe, overrides).model
    tokenizer = create_tokenizer("var-vqvae", **tokenizer_options) if tokenizer_options else None
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        state = create_model(model.preset, tokenizer, **model.shape).state_dict()
    save_safetensors({name: value.contiguous() for name, value in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def train(
    recipe: str, arguments: argparse.Namespace, folder: Path, part: str, keep: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """A few steps of training: time, rate, memory and losses from the run's log.

    Args:
        part: "training", or "uncompiled".
        keep: gets the part and what there is so far, after every step.
    """
    codes = random_codes(folder, recipe, arguments.set, arguments.pairs * arguments.steps)
    settings = [*QUIET, f"data.codes={codes}", f"batch.global_size={arguments.pairs}", *arguments.set]
    run = load_recipe(recipe, arguments.set)
    settings.append(f"batch.max_steps={arguments.steps}")
    if run.batch.micro_size != "auto":
        settings.append(f"batch.micro_size={min(run.batch.micro_size, arguments.pairs)}")
    options = None
    if recipe.startswith("var"):
        config = model_config(run.model.preset, **run.model.overrides)
        settings += tokenizer_settings(folder, config.scales, config.vocab_size)
        options = {**TOKENIZER, "scales": list(config.scales), "codebook_size": config.vocab_size}
    settings.append(f"model.weights={random_weights(folder, recipe, arguments.set, options)}")
    settings += ["model.compile=false"] if part == "uncompiled" else []
    command = [sys.executable, "cca_ds/train.py", "--ds_config", arguments.ds_config, "--recipe", recipe]
    command += ["--output", str(folder / part), "--set", *settings]
    started = time.perf_counter()
    metrics = folder / part / "metrics.jsonl"
    with open(folder / f"{part}.console", "w+") as console:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=console, stderr=console)
        try:
            steps = 0
            while process.poll() is None:
                time.sleep(0.2)
                if len(lines := logged(metrics)) > max(steps, 1):
                    steps = len(lines)
                    keep(part, summary(lines, arguments.pairs) | {"steps so far": steps})
        finally:
            process.kill()  # where this process is ended by a time limit
        console.seek(0)
        if process.returncode:
            raise RuntimeError(f"{recipe}: training failed: {console.read()[-2000:]}")
    return summary(logged(metrics), arguments.pairs) | {"seconds with start": round(time.perf_counter() - started, 1)}


def logged(metrics: Path) -> list[dict[str, float]]:
    """The whole lines of a run's log so far."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(lines: list[dict[str, float]], pairs: int) -> dict[str, Any]:
    """Medians over all steps but the first."""
    rate = statistics.median(line["throughput/images_per_second"] for line in lines[1:])
    kept = ("throughput/mfu", "memory/peak_gib", "loss", "grad_norm")
    return {
        "pairs": pairs,
        "step_seconds": round(pairs / rate, 3),
        "images_per_second": round(rate, 3),
        **{f"last {name}": lines[-1][name] for name in kept if name in lines[-1]},
        "first loss": lines[0]["loss"],
    }


def sample(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Codes per second of guidance-free sampling with the recipe's top-k and top-p, bf16 on a GPU."""
    run = load_recipe(recipe, arguments.set)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    config = model_config(run.model.preset, **run.model.overrides)
    tokenizer = None
    if recipe.startswith("var"):
        tokenizer = create_tokenizer("var-vqvae", scales=config.scales, codebook_size=config.vocab_size, **TOKENIZER)
    with torch.device(device):
        model = create_model(run.model.preset, tokenizer, **run.model.overrides).to(dtype).to(device).eval()
    labels_B = torch.arange(arguments.images) % config.num_classes
    found: dict[str, Any] = {"images": arguments.images, "dtype": str(dtype).removeprefix("torch.")}
    ways = {"eager": False, "CUDA graphs": True} if gpu and model.family == "llamagen" else {"eager": False}
    codes = {}
    for way, graphs in ways.items():
        seconds = []
        for _ in range(2):  # the first warms up and is left out
            started = time.perf_counter()
            codes[way] = generate(
                model, labels_B, top_k=run.sampling.top_k, top_p=run.sampling.top_p, cuda_graphs=graphs
            ).cpu()
            seconds.append(time.perf_counter() - started)
        found[f"codes per second, {way}"] = round(codes[way].numel() / seconds[-1], 1)
    if len(codes) == 2:
        found["equal codes"] = round(float((codes["eager"] == codes["CUDA graphs"]).float().mean()), 4)
    if gpu:
        found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def table(models: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| model | | |", "|---|---|--:|"]
    for recipe, parts in models.items():
        for part, found in parts.items():
            for name, value in found.items():
                shown = f"{value:.4g}" if isinstance(value, float) else value
                lines.append(f"| {recipe} | {part}: {name} | {shown} |")
    return "\n".join(lines) + "\n"


def measure(recipe: str, arguments: argparse.Namespace, keep: Callable[[str, dict[str, Any]], None]) -> None:
    """One recipe's results, each into `keep`; a part that fails has its error there, and the other parts run."""
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            try:
                if part == "sampling":
                    found = sample(recipe, arguments)
                else:
                    found = train(recipe, arguments, Path(folder), part, keep)
            except (RuntimeError, ValueError, OSError) as error:
                found = {"failed": str(error)}
            keep(part, found)
            print(f"{recipe} {part}: {found}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, write both files whenever there is more, print the table; exit code 1 when a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["llamagen-3b", "var-d30"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--ds_config", default="ds_configs/zero3.json")
    parser.add_argument("--pairs", type=int, default=32, help="per step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--images", type=int, default=48, help="sampled at once")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, key.path=value")
    parser.add_argument("--output", type=Path, help="folder for whole_models.json and .md")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
    where = origin(" ".join(["python", "benchmarks/speed/whole_models.py", *sys.argv[1:]]), device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit: what was begun is ended as well
    models: dict[str, dict[str, Any]] = {}

    def keep(recipe: str, part: str, found: dict[str, Any]) -> None:
        models.setdefault(recipe, {})[part] = found
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            path = arguments.output / "whole_models.json"
            body = {"whole_models": models, "whole_models_origin": where}
            path.write_text(json.dumps(body, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(models))

    for recipe in arguments.recipes:
        measure(recipe, arguments, lambda part, found, recipe=recipe: keep(recipe, part, found))
    print(table(models))
    return int(any("failed" in part for parts in models.values() for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
