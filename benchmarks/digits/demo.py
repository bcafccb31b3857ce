"""Base model against its CCA fine-tuning on the digits: one table, one picture. The last step of `make demo`.

    python benchmarks/digits/demo.py --run runs/demo
    python benchmarks/digits/demo.py --run runs/demo --record      # also into benchmarks/results and docs/images

Both models sample 1,800 images with the same labels and seeds. The base model is guided at the scale whose
class accuracy equals the fine-tuned model's without guidance; FID and time are compared there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lab import sampled, scores
from provenance import REPOSITORY, RESULTS, origin, processor

from cca_ds.config.recipes import load_recipe, resolve_path
from cca_ds.console import progress
from cca_ds.data.image_grid import image_grid
from cca_ds.files import write_atomic
from cca_ds.models import create_model
from cca_ds.models.weights import load_weights
from cca_ds.vq import create_tokenizer

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


def scale_of_accuracy(rows: list[dict[str, float]], accuracy: float) -> float:
    """The guidance scale at which the base model reaches `accuracy`, between the two measured ones around it."""
    for low, high in itertools.pairwise(rows):
        if low["accuracy"] <= accuracy <= high["accuracy"]:
            share = (accuracy - low["accuracy"]) / max(high["accuracy"] - low["accuracy"], 1e-9)
            return low["s"] + share * (high["s"] - low["s"])
    return rows[0]["s"] if accuracy < rows[0]["accuracy"] else rows[-1]["s"]


def compare(base: torch.nn.Module, tuned: torch.nn.Module, images: int) -> list[dict]:
    """Rows of the table: the base over guidance scales, at equal accuracy, and the tuned model without guidance."""
    labels_B = torch.arange(images) % 10

    def row(name: str, model: torch.nn.Module, scale: float) -> dict:
        codes_BL, seconds = sampled(model, labels_B, scale)
        codes = codes_BL.numpy()
        return {"name": name, "s": scale, "seconds": seconds, "codes": codes, **scores(codes, labels_B.numpy())}

    ours = row("CCA, one epoch", tuned, 0.0)
    rows: list[dict] = []
    for scale in progress(SCALES, "base model over guidance scales"):
        rows.append(row("base", base, scale))
        if scale and rows[-1]["accuracy"] >= ours["accuracy"]:
            break
    matched = row("base at equal accuracy", base, scale_of_accuracy(rows, ours["accuracy"]))
    ours["seconds"] = sampled(tuned, labels_B)[1]  # both sides of the ratio measured next to each other
    return [*rows, matched, ours]


def table(rows: list[dict]) -> str:
    """Markdown, sampling time relative to the guidance-free base model's."""
    unit = rows[0]["seconds"]
    lines = [
        "| model | guidance s | FID | IS | class accuracy | sampling time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['s']:.2f} | {r['fid']:.3f} | {r['inception_score']:.2f} | {r['accuracy']:.3f} "
            f"| {r['seconds'] / unit:.2f}x ({r['seconds']:.1f} s) |"
        )
    return "\n".join(lines)


def claims(rows: list[dict]) -> dict[str, bool]:
    """The paper's claims about CCA, checked on the numbers of the table."""
    *_, matched, ours = rows
    return {
        f"accuracy {ours['accuracy']:.3f} >= {matched['accuracy']:.3f} of the guided base model (within 0.01)": ours[
            "accuracy"
        ]
        >= matched["accuracy"] - 0.01,
        f"FID {ours['fid']:.3f} <= {matched['fid']:.3f} of the guided base model": ours["fid"] <= matched["fid"],
        f"sampling time {ours['seconds'] / matched['seconds']:.2f} <= 0.60 of the guided base model's": ours["seconds"]
        <= 0.6 * matched["seconds"],
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
        axis.set_title(f"{r['name']}, s = {r['s']:.2f}\naccuracy {r['accuracy']:.3f}, FID {r['fid']:.3f}")
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
    parser.add_argument("--run", type=Path, required=True, help="folder with config.yaml and policy.safetensors")
    parser.add_argument("--images", type=int, default=1800)
    parser.add_argument("--record", action="store_true", help="write the results that the README shows")
    arguments = parser.parse_args()
    recipe = load_recipe(str(arguments.run / "config.yaml"))
    models = []
    for weights in (resolve_path(recipe.model.weights), arguments.run / "policy.safetensors"):
        model = create_model(recipe.model.preset, **recipe.model.overrides)
        load_weights(model, weights)
        models.append(model.to("cuda" if torch.cuda.is_available() else "cpu").eval())
    rows = compare(*models, images=arguments.images)
    picture(rows, arguments.run / "samples.png")
    results = [{key: value for key, value in row.items() if key != "codes"} for row in rows]
    checked = claims(rows)
    threads = f"{processor()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    body = {**origin("make demo", device), "images": arguments.images, "rows": results, "claims": checked}
    write_atomic(arguments.run / "demo.json", json.dumps(body, indent=1) + "\n")
    if arguments.record:
        record(arguments.run)
    print("\n" + table(rows) + "\n")
    for claim, holds in checked.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    print(f"\nsamples      {arguments.run / 'samples.png'}")
    print(f"TensorBoard  tensorboard --logdir {arguments.run / 'tensorboard'}")
    return 0 if all(checked.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
