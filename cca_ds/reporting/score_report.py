"""The report of one evaluation: as JSON, as one line, as a Markdown table."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cca_ds

if TYPE_CHECKING:
    from cca_ds.config.schema import RunConfig
    from cca_ds.metrics.extraction import Extractor
    from cca_ds.metrics.images import Images
    from cca_ds.metrics.scores import Scores

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}
DECIMALS = {"fid": 3, "sfid": 3, "inception_score": 2, "precision": 3, "recall": 3, "class_accuracy": 3}
PACKAGES = ("torch", "numpy", "pillow", "scikit-learn")


def build_report(
    run: RunConfig, images: Images, extractor: Extractor, scores: Scores, reference: str | None
) -> dict[str, Any]:
    """Everything a reader needs to compare the numbers with others: protocol, sampler, seeds, versions."""
    height, width, _ = images.shape
    sampler, origin = sampler_settings(run, images.path)
    return {
        "recipe": run.name,
        "metrics": scores.values,
        "notes": scores.notes,
        "samples": {"path": str(images.path), "images": images.count, "height": height, "width": width},
        "reference": reference or "scikit-learn's 1,797 digits",
        "protocol": protocol(extractor),
        "sampler": sampler,
        "sampler_origin": origin,
        "seed": sampler.get("seed"),
        "paper": run.paper,
        "versions": versions(),
    }


def protocol(extractor: Extractor) -> dict[str, Any]:
    """How the numbers are made, so that others can be compared with them."""
    inception = extractor.width == 2048
    return {
        "evaluator": "OpenAI's ADM evaluator (guided-diffusion), reimplemented",
        "network": extractor.name,
        "network_identity": extractor.identity,
        "published_weights": getattr(extractor, "published", None),
        "pool_features": extractor.width,
        "spatial_features": "mixed_6/conv, 7 channels x 17 x 17 = 2023, NHWC" if inception else None,
        "resize": "TensorFlow 1 bilinear to 299 x 299" if inception else None,
        "inception_score_splits_of": 5000,
        "neighbours": 3,
        "distances": "float32 (the original rounds them to float16)",
    }


def sampler_settings(run: RunConfig, images: Path) -> tuple[dict[str, Any], str]:
    """Settings the images were drawn with, from JSON beside them, else the recipe's; and which it was."""
    beside = [images.with_suffix(".json"), images / "sampling.json", images.parent / "sampling.json"]
    for path in beside:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and "metrics" not in found:
            return found, path.name
    return run.sampling.model_dump(mode="json", by_alias=True), f"assumed from recipe {run.name}"


def versions() -> dict[str, str]:
    """Of this package, Python, and what computes the numbers."""
    found = {"cca_ds": cca_ds.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_json(report: dict[str, Any]) -> str:
    """The whole report; NaN cannot occur."""
    return json.dumps(report, indent=1, allow_nan=False)


def as_line(report: dict[str, Any]) -> str:
    """`FID 2.690  IS 276.80 ... (50000 images of samples.npz against reference.npz)`, and a line a note."""
    numbers = "  ".join(f"{TITLES[name]} {text}" for name, text in _numbers(report).items())
    samples, reference = report["samples"], Path(report["reference"]).name
    line = f"{numbers}  ({samples['images']} images of {Path(samples['path']).name} against {reference})"
    return "\n".join([line, *(f"note: {note}" for note in report["notes"])])


def as_markdown(report: dict[str, Any]) -> str:
    """A table of the metrics, the paper's below where the recipe has them, then how they were made."""
    numbers = _numbers(report)
    rows = [["", *(TITLES[name] for name in numbers)], ["---"] * (len(numbers) + 1)]
    rows.append([report["recipe"], *numbers.values()])
    for name, values in paper_rows(report["paper"]):
        rows.append([f"paper, {name}", *(_number(key, values.get(key)) for key in numbers)])
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    facts = {"samples": report["samples"], "reference": report["reference"], "sampler": report["sampler"],
             "sampler's settings": report["sampler_origin"], "protocol": report["protocol"],
             "versions": report["versions"]}  # fmt: skip
    lines = [f"- {name}: {_cell(_flat(value))}" for name, value in facts.items()]
    lines += [f"- note: {_cell(note)}" for note in report["notes"]]
    return "\n".join([table, "", *lines])


def paper_rows(paper: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The paper's results of a recipe: its nested ones by name, else the one for the model itself."""
    nested = [(name, values) for name, values in paper.items() if isinstance(values, dict)]
    flat = {name: value for name, value in paper.items() if name in TITLES}
    return nested or ([("CCA", flat)] if flat else [])


def _numbers(report: dict[str, Any]) -> dict[str, str]:
    return {name: _number(name, report["metrics"][name]) for name in TITLES if name in report["metrics"]}


def _number(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.{DECIMALS[name]}f}"


def _flat(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = ((name, f"({_flat(item)})" if isinstance(item, dict) else item) for name, item in value.items())
    return ", ".join(f"{name} {item}" for name, item in parts if item is not None)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
