"""The report of one evaluation: as JSON, as one line, as a Markdown table."""

from __future__ import annotations

import json
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import cca_ds
from cca_ds.files import write_atomic
from cca_ds.metrics.extraction import Extractor
from cca_ds.metrics.image_sets import Images
from cca_ds.metrics.precision_recall import NEIGHBOURS
from cca_ds.metrics.scores import SPLIT, Scores
from cca_ds.untrusted import read_json

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
    images: Images,
    extractor: Extractor,
    scores: Scores,
    reference: str,
    recipe: str,
    sampling: dict[str, Any],
    paper: dict[str, Any],
) -> dict[str, Any]:
    """Scores with all that is needed to compare them with others': protocol, sampler settings, seed, versions.

    Args:
        images: the samples.
        extractor: the network.
        scores: of the samples.
        reference: path or name of the real images.
        recipe: its name.
        sampling: the recipe's sampler settings, for samples without a record of their own.
        paper: the paper's results for this model.
    """
    height, width, _ = images.shape
    sampler, origin = sampler_settings(images.path, recipe, sampling)
    return {
        "recipe": recipe,
        "metrics": scores.values,
        "notes": [*scores.notes, *network_notes(extractor)],
        "samples": {"path": str(images.path), "images": images.count, "height": height, "width": width},
        "reference": reference,
        "protocol": protocol(extractor),
        "sampler": sampler,
        "sampler_origin": origin,
        "seed": sampler.get("seed"),
        "paper": paper,
        "versions": versions(),
    }


def network_notes(extractor: Extractor) -> list[str]:
    """A note where the FID network has other weights than the published scores are computed with."""
    if extractor.published is not False:
        return []
    return ["the FID network's weights are not the published ones: scores are not comparable with published scores"]


def output_in_run(samples: Path) -> Path | None:
    """Where the scores of samples in a run's folder go, for its report; None for samples elsewhere.

    NAME.scores.json in the run's folder, NAME being the samples' own there (scores.json where that is "samples").
    """
    parents = list(samples.absolute().parents)[:3]
    run = next((folder for folder in parents if (folder / "config.yaml").is_file()), None)
    if run is None:
        return None
    name = "-".join(samples.absolute().relative_to(run).with_suffix("").parts)
    return run / ("scores.json" if name == "samples" else f"{name}.scores.json")


def protocol(extractor: Extractor) -> dict[str, Any]:
    """How the metrics are computed."""
    return {
        "evaluator": "OpenAI's ADM evaluator (guided-diffusion), reimplemented",
        "network": extractor.name,
        "network_identity": extractor.identity,
        "published_weights": extractor.published,
        "pool_features": extractor.width,
        "spatial_features": extractor.spatial,
        "resize": extractor.resize,
        "inception_score_splits_of": SPLIT,
        "neighbours": NEIGHBOURS,
        "distances": "float32 (the original rounds them to float16)",
    }


def sampler_settings(images: Path, recipe: str, sampling: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings that the images were sampled with, and where they come from.

    Args:
        images: archive or folder; settings are read from NAME.json or sampling.json beside or inside it.
        recipe: its name.
        sampling: the recipe's settings, used when no such file is there.
    """
    beside = [images.with_suffix(".json"), images / "sampling.json", images.parent / "sampling.json"]
    for path in beside:
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and "metrics" not in found:
            return found, path.name
    return sampling, f"assumed from recipe {recipe}"


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that compute the metrics."""
    found = {"cca_ds": cca_ds.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_json(report: dict[str, Any]) -> str:
    """The whole report as JSON. Raises ValueError for NaN, which JSON has no word for."""
    return json.dumps(report, indent=1, allow_nan=False)


def as_line(report: dict[str, Any]) -> str:
    """`FID 2.690  IS 276.80 ... (50000 images of samples.npz, s = 0, top-k 0, ..., against reference.npz)`; notes."""
    numbers = "  ".join(f"{TITLES[name]} {text}" for name, text in _numbers(report).items())
    samples, reference = report["samples"], Path(report["reference"]).name
    drawn = settings_phrase(report["sampler"])
    of = ", ".join([f"{samples['images']} images of {Path(samples['path']).name}", *([drawn] if drawn else [])])
    line = f"{numbers}  ({of}, against {reference})"
    return "\n".join([line, *(f"note: {note}" for note in report["notes"])])


def as_markdown(report: dict[str, Any]) -> str:
    """A table of the metrics with the paper's below, if the recipe has them, then the protocol and settings."""
    numbers = _numbers(report)
    rows = [["", *(TITLES[name] for name in numbers), "sampled with"], ["---"] * (len(numbers) + 2)]
    rows.append([report["recipe"], *numbers.values(), settings_phrase(report["sampler"]) or "-"])
    for name, values in paper_rows(report["paper"]):
        cells = (_number(key, values.get(key)) for key in numbers)
        rows.append([f"paper, {name}", *cells, str(values.get("sampled", "-"))])
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    facts = {"samples": report["samples"], "reference": report["reference"], "sampler": report["sampler"],
             "sampler's settings": report["sampler_origin"], "protocol": report["protocol"],
             "versions": report["versions"]}  # fmt: skip
    lines = [f"- {name}: {_cell(flat(value))}" for name, value in facts.items()]
    lines += [f"- note: {_cell(note)}" for note in report["notes"]]
    return "\n".join([table, "", *lines])


STYLES = {"line": as_line, "json": as_json, "markdown": as_markdown}


def check_output(path: Path, suffix: str) -> None:
    """Raise ValueError for an --output that could not be written, before images are scored."""
    if path.suffix != suffix:
        beside = "; the Markdown table goes beside it" if suffix == ".json" else ""
        raise ValueError(f"--output {path}: give a name that ends in {suffix}{beside}")
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; give the name of a {suffix} file in it")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"--output {path}: {there} cannot be written ({error.strerror}); choose another") from None


def write_report_files(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON to `path` and as Markdown beside it (.md), atomically; folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_json(report) + "\n")
    write_atomic(path.with_suffix(".md"), as_markdown(report) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """A report that `write_report_files` wrote. Raises ValueError."""
    try:
        report = read_json(path)
        numbers = report["metrics"].items()
        report["metrics"] = {name: float(value) for name, value in numbers if value is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a report that evaluate --output wrote ({error})") from None
    return report


def settings_phrase(sampler: Any) -> str:
    """`s = 0, top-k 900, top-p 0.96, temperature 1`: how codes were drawn, as far as a record says."""
    if not isinstance(sampler, dict):
        return ""
    titles = {"guidance_scale": "s =", "gft_beta": "GFT's beta", "top_k": "top-k", "top_p": "top-p",
              "temperature": "temperature", "lambda": "lambda", "resize": "resized:"}  # fmt: skip
    given = ((title, sampler.get(key)) for key, title in titles.items())
    return ", ".join(f"{title} {_plain(value)}" for title, value in given if value is not None)


def card_scores(report: dict[str, Any]) -> str:
    """Markdown for a model card: the scores, and the settings without which they mean nothing; no paths.

    Args:
        report: of `read_report`; what it lacks is left out.
    """
    numbers, notes = _numbers(report), report.get("notes")
    table = ["| metric | value |", "| --- | --: |", *(f"| {TITLES[name]} | {text} |" for name, text in numbers.items())]
    samples, protocol = (part if isinstance(part, dict) else {} for part in map(report.get, ("samples", "protocol")))
    size = f" of {samples.get('width')} x {samples.get('height')} px" if "width" in samples else ""
    published = {True: "published", False: "other than the published"}.get(protocol.get("published_weights"))
    facts = {
        "Samples": f"{samples['images']:,} images{size}" if isinstance(samples.get("images"), int) else "",
        "Sampled with": settings_phrase(report.get("sampler")),
        "Reference": f"`{Path(str(report['reference'])).name}`" if report.get("reference") else "",
        "Scored by": ", ".join(str(protocol[key]) for key in ("evaluator", "network") if protocol.get(key)),
        "Network's weights": published or "",
        "Notes": "; ".join(map(str, notes)) if isinstance(notes, list) else "",
    }
    return "\n".join([*table, "", *(f"- {name}: {_cell(text)}" for name, text in facts.items() if text)])


def paper_rows(paper: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The paper's results of a recipe: its nested ones by name, else the one for the model itself.

    `sampled` among the values says in words with which settings they were reached.
    """
    nested = [(name, values) for name, values in paper.items() if isinstance(values, dict)]
    flat = {name: value for name, value in paper.items() if name in TITLES}
    return nested or ([("CCA", flat)] if flat else [])


def _numbers(report: dict[str, Any]) -> dict[str, str]:
    return {name: _number(name, report["metrics"][name]) for name in TITLES if name in report["metrics"]}


def _number(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.{DECIMALS[name]}f}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(value: Any) -> str:
    """`a 1, b (c 2)` of {"a": 1, "b": {"c": 2}}; None is left out."""
    if not isinstance(value, dict):
        return str(value)
    parts = ((name, f"({flat(item)})" if isinstance(item, dict) else item) for name, item in value.items())
    return ", ".join(f"{name} {item}" for name, item in parts if item is not None)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
