"""Base model against its CCA fine-tuning on the digits: one table, one picture. The last step of `make demo`.

    python benchmarks/digits/demo.py runs/demo/seed0 runs/demo/seed1 runs/demo/seed2
    python benchmarks/digits/demo.py runs/demo/seed* --record      # also into benchmarks/results and docs/images

Every run's policy samples 1,800 images with labels and a seed of its own, the base model with the same; the table
shows means and half-ranges. The base model is guided up to the scale whose class accuracy equals the fine-tuned
model's without guidance; FID and time are compared there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from lab import BATCH, average, sampling_seconds, scores
from provenance import REPOSITORY, RESULTS, origin, processor
from torch import Tensor, nn

from cca_ds.config.recipes import load_recipe, resolve_path
from cca_ds.console import progress
from cca_ds.data.image_grid import image_grid
from cca_ds.files import write_atomic
from cca_ds.models import create_model
from cca_ds.models.weights import load_weights
from cca_ds.reporting.results_table import models_table
from cca_ds.sampling import generate
from cca_ds.vq import create_tokenizer

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


def compare(base: nn.Module, tuned: list[nn.Module], images: int) -> list[dict]:
    """Rows of the table: the base over guidance scales, at equal accuracy, and the tuned models without guidance.

    Returns:
        Rows of `name`, `s`, `fid`, `inception_score` and `accuracy` (mean and spread over seeds), `seconds` for 450
        images, and `codes` [images, L] of seed 0.
    """
    labels_B = torch.arange(images) % 10

    def row(name: str, models: list[nn.Module], scale: float) -> dict:
        codes = [draw(model, labels_B, scale, seed) for seed, model in enumerate(models)]
        means = average([scores(drawn, labels_B.numpy()) for drawn in codes])
        return {"name": name, "s": scale, "codes": codes[0], **means}

    ours = row("CCA, one epoch", tuned, 0.0)
    rows: list[dict] = []
    for scale in progress(SCALES, "base model over guidance scales"):
        rows.append(row("base", [base] * len(tuned), scale))
        if scale and rows[-1]["accuracy"]["mean"] >= ours["accuracy"]["mean"]:
            break
    equal = scale_of_accuracy(rows, ours["accuracy"]["mean"])
    rows += [row("base at equal accuracy", [base] * len(tuned), equal), ours]
    free, guided, our_own = sampling_seconds([(base, 0.0), (base, equal or SCALES[1]), (tuned[0], 0.0)])
    for one in rows:
        one["seconds"] = our_own if one is ours else guided if one["s"] else free
    return rows


def draw(model: nn.Module, labels_B: Tensor, scale: float, seed: int) -> np.ndarray:
    """Codes [B, L] under the labels."""
    parts = [
        generate(model, part_B, guidance_scale=scale, seed=seed, image_indices_B=range(first, first + len(part_B)))
        for first, part_B in zip(range(0, len(labels_B), BATCH), labels_B.split(BATCH), strict=True)
    ]
    return torch.cat(parts).cpu().numpy()


def scale_of_accuracy(rows: list[dict], accuracy: float) -> float:
    """The guidance scale at which the base model reaches `accuracy`, between the two measured ones around it."""
    points = [(row["accuracy"]["mean"], row["s"]) for row in rows]
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= accuracy <= high:
            return below + (accuracy - low) / max(high - low, 1e-9) * (above - below)
    return points[0][1] if accuracy < points[0][0] else points[-1][1]


def claims(rows: list[dict]) -> dict[str, bool]:
    """The paper's claims about CCA, checked on the means of the table."""
    base, *_, guided, ours = rows
    fid, accuracy = ([row[name]["mean"] for row in (base, guided, ours)] for name in ("fid", "accuracy"))
    time = ours["seconds"] / guided["seconds"]
    return {
        f"without guidance, CCA's accuracy {accuracy[2]:.3f} is far above the base model's {accuracy[0]:.3f}": (
            accuracy[2] >= accuracy[0] + 0.05
        ),
        f"and its FID {fid[2]:.3f} is no worse than the base model's {fid[0]:.3f}": fid[2] <= fid[0],
        f"the guided base model of accuracy {accuracy[1]:.3f} has FID {fid[1]:.3f}, more than CCA's": fid[2] <= fid[1],
        f"CCA samples in {time:.2f} of the guided base model's time (at most 0.60)": time <= 0.6,
    }


def picture(rows: list[dict], path: Path) -> None:
    """Ten rows of ten classes for three samplers side by side: base, guided base, CCA."""
    tokenizer = create_tokenizer("digits")
    chosen = [rows[0], rows[-2], rows[-1]]
    sheets = [image_grid(tokenizer.decode(torch.from_numpy(r["codes"][:100])), columns=10) for r in chosen]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    for axis, sheet, r in zip(axes, sheets, chosen, strict=True):
        axis.imshow(sheet.squeeze(-1), cmap="gray_r", vmin=0, vmax=255)
        axis.set_axis_off()
        fid, accuracy = r["fid"]["mean"], r["accuracy"]["mean"]
        axis.set_title(f"{r['name']}, s = {r['s']:.2f}\naccuracy {accuracy:.3f}, FID {fid:.3f}")
    figure.savefig(path, dpi=80)


def record(run: Path) -> None:
    """Copy the results and the picture to benchmarks/results and docs/images, where the README reads them."""
    pictures = REPOSITORY / "docs" / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / "demo.json", (run / "demo.json").read_bytes())
    write_atomic(pictures / "demo_samples.png", (run / "samples.png").read_bytes())


def main() -> int:
    """Exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with config.yaml and policy.safetensors")
    parser.add_argument("--images", type=int, default=1800, help="of every run")
    parser.add_argument("--record", action="store_true", help="write the results that the README shows")
    arguments = parser.parse_args()
    first = arguments.runs[0]
    recipe = load_recipe(str(first / "config.yaml"))
    models = []
    for weights in (resolve_path(recipe.model.weights), *(run / "policy.safetensors" for run in arguments.runs)):
        model = create_model(recipe.model.preset, **recipe.model.overrides)
        load_weights(model, weights)
        models.append(model.to("cuda" if torch.cuda.is_available() else "cpu").eval())
    rows = compare(models[0], models[1:], arguments.images)
    checked = claims(rows)
    picture(rows, first / "samples.png")
    results = [{key: value for key, value in row.items() if key != "codes"} for row in rows]
    threads = f"{processor()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    body = {
        **origin("make demo", device), "images": arguments.images, "repeats": len(arguments.runs), "rows": results,
        "claims": checked,
    }  # fmt: skip
    write_atomic(first / "demo.json", json.dumps(body, indent=1) + "\n")
    if arguments.record:
        record(first)
    print(f"\n{models_table(rows)}\n")
    for claim, holds in checked.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    print(f"\nsamples      {first / 'samples.png'}")
    print(f"TensorBoard  tensorboard --logdir {first.parent}")
    return 0 if all(checked.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
