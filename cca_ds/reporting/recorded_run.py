"""A run's folder read for its report: any file may be missing, cut short or hold unexpected values."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cca_ds.data.manifest import class_names_of
from cca_ds.untrusted import PlainYaml, decoding, parse_json, read_json, reason_of, regular_file

MARKS = ("config.yaml", "metrics.jsonl", "summary.json")
LARGEST_IMAGE = 32 * 2**20  # bytes of a picture; larger ones are left out
LARGEST_TEXT = 2**30  # bytes of config.yaml and metrics.jsonl: a million steps take 0.5 GB
LARGEST_STEP = 2**53  # steps are drawn as float64


@dataclass
class RecordedRun:
    """The readable parts of one run; `problems` names the others."""

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # tag -> (step, value) in order
    summary: dict[str, Any] = field(default_factory=dict)
    grids: list[tuple[str, bytes]] = field(default_factory=list)  # (name, PNG), first and last
    comparison: bytes | None = None  # samples.png of `make demo`: models side by side
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (name, cca_ds.evaluate's report)
    class_names: tuple[str, ...] = ()  # of the table of codes, where it is still there
    problems: list[str] = field(default_factory=list)


def read_run(path: Path) -> RecordedRun:
    """Read a run's folder. Raises ValueError when it has none of MARKS."""
    if not path.is_dir():
        raise ValueError(f"--report {path}: no such folder; give the folder that train.py wrote (its --output)")
    if not any((path / mark).is_file() for mark in MARKS):
        raise ValueError(f"--report {path}: no run in this folder; it has none of {', '.join(MARKS)}")
    run = RecordedRun(path)
    run.config_text = _text(run, "config.yaml")
    run.config = _config(run)
    run.class_names = _class_names(path, run.config)
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


def _class_names(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes, from the run or from the table of codes that its configuration names; else none."""
    data = config.get("data")
    codes = data.get("codes") if isinstance(data, dict) else None
    try:
        names = class_names_of(codes, folder) if isinstance(codes, str) else ()
    except (OSError, ValueError):
        return ()
    return tuple(str(name) for name in names)


def _rows(rows: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of `make demo`'s comparison, one per model, as evaluations."""
    found = []
    for row in rows:
        if isinstance(row, dict) and "fid" in row:
            scale = f", s = {row['s']:.2f}" if isinstance(row.get("s"), int | float) else ""
            metrics = {("class_accuracy" if key == "accuracy" else key): _mean(value) for key, value in row.items()}
            found.append((f"{row.get('name', '')}{scale}", {"metrics": metrics}))
    return found


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, dict) else value


def _text(run: RecordedRun, name: str) -> str:
    try:
        return regular_file(run.path / name, largest=LARGEST_TEXT).read_text(errors="replace")
    except (OSError, ValueError) as error:
        missing = not (run.path / name).is_symlink() and not (run.path / name).exists()
        run.problems.append(f"{name} is missing" if missing else f"{name} cannot be read: {reason_of(error)}")
        return ""


def _config(run: RecordedRun) -> dict[str, Any]:
    try:
        with decoding("config.yaml"):
            config = yaml.load(run.config_text, PlainYaml)
    except ValueError:
        run.problems.append("config.yaml is not YAML")
        return {}
    return config if isinstance(config, dict) else {}


def _json(run: RecordedRun, file: Path) -> dict[str, Any] | None:
    if not file.is_symlink() and not file.exists():
        run.problems.append(f"{file.name} is missing")
        return None
    try:
        content = read_json(file, odd_numbers=True)
    except (ValueError, OSError):
        run.problems.append(f"{file.name} is not JSON")
        return None
    return content if isinstance(content, dict) else None


def _series(run: RecordedRun) -> dict[str, list[tuple[int, float]]]:
    """Finite numbers by tag; of a step logged twice, as after a resume, the later line counts."""
    values: dict[str, dict[int, float]] = {}
    unreadable = 0
    for line in _text(run, "metrics.jsonl").splitlines():
        try:
            record = parse_json(line, odd_numbers=True)
            step = int(record["step"])
            tags = record.items()
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
            unreadable += 1
            continue
        if abs(step) > LARGEST_STEP:
            unreadable += 1
            continue
        for tag, value in tags:
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and tag not in ("step", "time"):
                values.setdefault(tag, {})[step] = float(value)
    if unreadable:
        run.problems.append(f"metrics.jsonl: {unreadable} lines could not be read")
    return {tag: sorted(by_step.items()) for tag, by_step in values.items()}


def _pictures(run: RecordedRun, files: list[Path]) -> list[tuple[str, bytes]]:
    """The first and the last of the files, as (name, bytes), if they decode as PNG."""
    grids = []
    for file in dict.fromkeys([*files[:1], *files[-1:]]):
        try:
            data = regular_file(file, largest=LARGEST_IMAGE).read_bytes()
        except (OSError, ValueError):
            data = b""
        if _is_png(data):
            grids.append((file.stem, data))
        else:
            run.problems.append(f"{file.relative_to(run.path)} is not a picture")
    return grids


def _is_png(data: bytes) -> bool:
    from PIL import Image

    with warnings.catch_warnings(), contextlib.suppress(ValueError), decoding("a picture"):
        warnings.simplefilter("error")  # of many pixels
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.format == "PNG"
    return False
