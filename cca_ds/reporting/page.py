"""One self-contained HTML page for a run: opens from disk, holds no script, fetches nothing, trusts nothing.

Every string that came from the run goes through `html.escape`; pictures are PNGs that decode, as data URIs; a
content security policy forbids the rest.
"""

from __future__ import annotations

import base64
import io
import statistics
from html import escape
from pathlib import Path
from typing import Any

from cca_ds.reporting.charts import legend, line_chart
from cca_ds.reporting.run_folder import RunFolder, read_run
from cca_ds.reporting.scores import DECIMALS, TITLES, paper_rows, versions
from cca_ds.telemetry import write_atomic

CHARTS = (
    ("Loss", ("loss",)),
    ("Rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("Reward accuracy", ("rewards/accuracies",)),
    ("Log-ratio to the reference, nats", ("logps/chosen", "logps/rejected")),
    ("Reward of masked pairs", ("rewards/unconditional",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Throughput, images a second", ("throughput/images_per_second",)),
    ("Model FLOPs utilisation", ("throughput/mfu",)),
    ("Peak memory, GiB", ("memory/peak_gib",)),
)
STYLE = (Path(__file__).parent / "page.css").read_text()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all, and return its path."""
    path = folder / "report.html"
    write_atomic(path, render(read_run(folder)))
    return path


def render(run: RunFolder) -> str:
    """The page's HTML."""
    name = str(run.config.get("name") or run.path.resolve().name)
    sections = {
        "Results": results(run),
        "Comparison": _figure([_image(run.comparison)], "samples.png") if run.comparison else "",
        "Samples": samples(run),
        "Curves": curves(run),
        "Throughput and memory": resources(run),
        "Summary": table(["", ""], flattened(run.summary)) if run.summary else "",
        "Versions": version_table(run),
        "Configuration": f"<pre>{escape(run.config_text)}</pre>" if run.config_text else "",
        "Missing or unreadable": "".join(f"<p>{escape(problem)}</p>" for problem in run.problems),
    }
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{escape(name)}</h1>{subtitle(run)}</header>{body}</body></html>\n"
    )


def subtitle(run: RunFolder) -> str:
    """Model, loss and how far the run got, in one line."""
    model, loss = _section(run.config, "model"), _section(run.config, "loss")
    last = max((points[-1][0] for points in run.series.values()), default=0)
    facts = [
        str(model.get("preset", "")),
        " ".join(str(part) for part in (loss.get("name", ""),) if part),
        *(f"{key} {loss[key]}" for key in ("beta", "lambda") if key in loss),
        f"{last} steps" if last else "",
    ]
    return f"<p>{escape(' · '.join(fact for fact in facts if fact))}</p>"


def results(run: RunFolder) -> str:
    """Scores of the run's evaluations, with the paper's numbers below them where the recipe has them."""
    paper = _section(run.config, "paper")
    rows = [(name, report["metrics"]) for name, report in run.evaluations]
    references = [(f"paper, {name}", values) for name, values in paper_rows(paper)]
    shown = [key for key in TITLES if any(key in values for _, values in rows + references)]
    if not shown:
        return ""
    cells = [[name, *(_score(key, values.get(key)) for key in shown)] for name, values in rows + references]
    notes = [f"{name}: {note}" for name, report in run.evaluations for note in _list(report.get("notes"))]
    for name, report in run.evaluations:
        protocol = flattened(
            {key: report.get(key) for key in ("protocol", "sampler", "sampler_origin", "samples")}
        )
        notes += [f"{name}: " + ", ".join(f"{key} {value}" for key, value in protocol)] if protocol else []
    small = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return table(["", *(TITLES[key] for key in shown)], cells) + small


def samples(run: RunFolder) -> str:
    """The first and the last grid: a column of each a class, side by side, or the grids whole."""
    if not run.grids:
        return ""
    classes = _classes(run.config)
    bounds = (10, classes, _section(run.config, "logging").get("samples_per_grid"))
    columns = max(1, min(bound for bound in bounds if isinstance(bound, int)))
    names = " and ".join(name for name, _ in run.grids)
    strips = [columns_of(data, columns) for _, data in run.grids]
    if len(strips) < 2 or any(len(strip) != len(strips[0]) for strip in strips):
        figures = [_figure([_image(data)], name) for name, data in run.grids]
        return f'<div class="grids">{"".join(figures)}</div>'
    pairs = zip(*strips, strict=True)
    figures = [
        _figure([_image(part) for part in pair], f"class {column * (classes // columns)}")
        for column, pair in enumerate(pairs)
    ]
    return f'<p>{escape(names)}, side by side.</p><div class="grids">{"".join(figures)}</div>'


def columns_of(png: bytes, columns: int) -> list[bytes]:
    """A grid cut into its columns, as PNGs; the whole grid where its width does not divide."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as grid:
        if grid.width % columns:
            return [png]
        width, parts = grid.width // columns, []
        for column in range(columns):
            part = io.BytesIO()
            grid.crop((column * width, 0, (column + 1) * width, grid.height)).save(part, format="PNG")
            parts.append(part.getvalue())
    return parts


def curves(run: RunFolder) -> str:
    """One chart a group of tags, then one for every tag that no group knows."""
    known = {tag for _, tags in CHARTS for tag in tags}
    groups = [*CHARTS, *((tag, (tag,)) for tag in sorted(run.series) if tag not in known)]
    figures = []
    for title, tags in groups:
        lines = {tag: run.series[tag] for tag in tags if run.series.get(tag)}
        if lines:
            keys = legend([tag.rpartition("/")[2] for tag in lines]) if len(lines) > 1 else ""
            figures.append(
                f"<figure><figcaption>{escape(title)} {keys}</figcaption>{line_chart(lines)}</figure>"
            )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def resources(run: RunFolder) -> str:
    """Median throughput, without the first steps that warm up, and the highest memory."""
    rows = []
    for title, tag, reduce in (
        ("median images a second", "throughput/images_per_second", statistics.median),
        ("median model FLOPs utilisation", "throughput/mfu", statistics.median),
        ("peak memory of a rank, GiB", "memory/peak_gib", max),
    ):
        values = [value for _, value in run.series.get(tag, [])]
        if values:
            rows.append([title, f"{reduce(values[len(values) // 10 :]):.4g}"])
    return table(["", ""], rows) if rows else ""


def version_table(run: RunFolder) -> str:
    """The run's versions where it wrote them, and those of the program that writes this page."""
    kept = run.summary.get("versions")
    if isinstance(kept, dict):
        return table(["", "run"], flattened(kept))
    return table(["", "at the time of this page"], [list(item) for item in versions().items()])


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table; every cell is escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f"<table>{header}<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"


def flattened(tree: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested values as rows of `a.b` and text."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += flattened(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append([f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else str(value)])
    return rows


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _classes(config: dict[str, Any]) -> int:
    """Of the model: the recipe's, else the digits' 10 or ImageNet's 1,000."""
    model = _section(config, "model")
    given = _section(model, "overrides").get("num_classes")
    if isinstance(given, int) and given > 0:
        return given
    return 10 if model.get("preset") == "digits" else 1000


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _score(key: str, value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.{DECIMALS[key]}f}" if number else "-"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figure(images: list[str], caption: str) -> str:
    return f"<figure>{''.join(images)}<figcaption>{escape(caption)}</figcaption></figure>"
