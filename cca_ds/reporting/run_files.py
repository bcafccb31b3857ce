"""What a run left in its folder, read without trusting it: any part may be missing, torn or strange."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MARKS = ("config.yaml", "metrics.jsonl", "summary.json")
LARGEST_IMAGE = 32 * 2**20  # bytes of a grid that is still put into a page


@dataclass
class RunFolder:
    """The parts of one run that could be read; `problems` says what could not."""

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # tag -> (step, value) in order
    summary: dict[str, Any] = field(default_factory=dict)
    grids: list[tuple[str, bytes]] = field(default_factory=list)  # (name, PNG), first and last
    comparison: bytes | None = None  # samples.png, models side by side, as the digits' demo draws it
    evaluations: list[tuple[str, dict[str, Any]]] = field(
        default_factory=list
    )  # (name, report of cca_ds.evaluate)
    problems: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunFolder:
    """Read a run's folder. ValueError when nothing in it is a run's."""
    if not path.is_dir():
        raise ValueError(
            f"--report {path}: no such folder; give the folder that train.py wrote (its --output)"
        )
    if not any((path / mark).is_file() for mark in MARKS):
        raise ValueError(f"--report {path}: no run in this folder; it has none of {', '.join(MARKS)}")
    run = RunFolder(path)
    run.config_text = _text(run, "config.yaml")
    run.config = _config(run)
    run.summary = _json(run, path / "summary.json") or {}
    run.series = _series(run)
    run.grids = _pictures(run, sorted((path / "samples").glob("*.png")))
    run.comparison = next((data for _, data in _pictures(run, [*path.glob("samples.png")])), None)
    for file in sorted([*path.glob("*.json"), *path.glob("evaluation/*.json")]):
        report = _json(run, file) if file.name != "summary.json" else None
        if report and isinstance(report.get("metrics"), dict):
            run.evaluations.append((file.relative_to(path).with_suffix("").as_posix(), report))
        elif report and isinstance(report.get("rows"), list):
            run.evaluations += _rows(report["rows"])
    return run


def _rows(rows: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """A comparison of models, as the digits' demo leaves it: a row a model, its scores beside its name."""
    found = []
    for row in rows:
        if isinstance(row, dict) and "fid" in row:
            scale = f", s = {row['s']:.2f}" if isinstance(row.get("s"), int | float) else ""
            metrics = {("class_accuracy" if key == "accuracy" else key): value for key, value in row.items()}
            found.append((f"{row.get('name', '')}{scale}", {"metrics": metrics}))
    return found


def _text(run: RunFolder, name: str) -> str:
    try:
        return (run.path / name).read_text(errors="replace")
    except OSError:
        run.problems.append(f"{name} is missing")
        return ""


def _config(run: RunFolder) -> dict[str, Any]:
    try:
        config = yaml.safe_load(run.config_text)
    except yaml.YAMLError:
        run.problems.append("config.yaml is not YAML")
        return {}
    return config if isinstance(config, dict) else {}


def _json(run: RunFolder, file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except OSError:
        run.problems.append(f"{file.name} is missing")
        return None
    except ValueError:
        run.problems.append(f"{file.name} is not JSON")
        return None
    return content if isinstance(content, dict) else None


def _series(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Numbers by tag; of a step that stands twice, as after a resume, the later line counts."""
    values: dict[str, dict[int, float]] = {}
    torn = 0
    for line in _text(run, "metrics.jsonl").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            torn += 1
            continue
        for tag, value in record.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and tag not in ("step", "time"):
                values.setdefault(tag, {})[step] = float(value)
    if torn:
        run.problems.append(f"metrics.jsonl: {torn} lines could not be read")
    return {tag: sorted(by_step.items()) for tag, by_step in values.items()}


def _pictures(run: RunFolder, files: list[Path]) -> list[tuple[str, bytes]]:
    """The first and the last of the files, by name, where they decode as PNG."""
    grids = []
    for file in dict.fromkeys([*files[:1], *files[-1:]]):
        data = file.read_bytes()
        if len(data) <= LARGEST_IMAGE and _is_png(data):
            grids.append((file.stem, data))
        else:
            run.problems.append(f"{file.relative_to(run.path)} is not a picture")
    return grids


def _is_png(data: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.format == "PNG"
    except (OSError, ValueError, SyntaxError):
        return False
