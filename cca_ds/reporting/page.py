"""One self-contained HTML page for a run: opens from disk, without scripts and without addresses.

The run's files are not trusted: every string from them goes through `html.escape`, pictures are PNGs that decode, as
data URIs, and a content security policy forbids everything else.
"""

from __future__ import annotations

import base64
import io
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from cca_ds.files import write_atomic
from cca_ds.models import model_config
from cca_ds.reporting.charts import line_chart
from cca_ds.reporting.evaluation_report import DECIMALS, TITLES, flat, paper_rows, settings_phrase, versions
from cca_ds.reporting.recorded_run import RecordedRun, read_run

CHARTS = (  # title, unit, tags
    ("Loss", "loss", ("loss",)),
    ("Negative log-likelihood", "nats per code", ("nll_per_code", "nll_per_code/unconditional", "nll_per_code/mixed")),
    ("Rewards", "reward", ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/unconditional")),
    ("Reward accuracy", "share of pairs", ("rewards/accuracies",)),
    ("Log-ratio to the reference", "nats per image", ("logps/chosen", "logps/rejected")),
    ("Learning rate", "learning rate", ("lr",)),
    ("Gradient norm", "norm before clipping", ("grad_norm",)),
    ("Throughput", "images per second", ("throughput/images_per_second",)),
    ("Model FLOPs utilisation", "share of the peak", ("throughput/mfu",)),
    ("Peak memory", "GiB", ("memory/peak_gib",)),
)
COLUMNS = {**TITLES, "seconds": "sampling, s"}  # of the results; `make demo` also times sampling
SMALL = 64  # grid columns up to so many pixels are enlarged
STYLE = (Path(__file__).parent / "page.css").read_text()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, atomically, and return its path. Raises ValueError without a run."""
    path = folder / "report.html"
    write_atomic(path, render(read_run(folder)))
    return path


def render(run: RecordedRun) -> str:
    """The page's HTML."""
    name = str(run.config.get("name") or run.path.resolve().name)
    sections = {
        "Results": results(run),
        "Comparison": f"<figure>{_image(run.comparison, 'comparison')}</figure>" if run.comparison else "",
        "Samples": samples(run),
        "Curves": curves(run),
        "Run": facts(run),
        "Configuration": f"<pre>{escape(run.config_text)}</pre>" if run.config_text else "",
        "Missing or unreadable": "".join(f"<p>{escape(problem)}</p>" for problem in run.problems),
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{escape(name)}</h1>{subtitle(run)}</header>{body}</body></html>\n"
    )


def subtitle(run: RecordedRun) -> str:
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


def results(run: RecordedRun) -> str:
    """Scores of the run's evaluations and their sampling settings, above the paper's from the recipe; notes."""
    paper = _section(run.config, "paper")
    rows = [(name, report["metrics"]) for name, report in run.evaluations]
    references = [(f"paper, {name}", values) for name, values in paper_rows(paper)]
    shown = [key for key in COLUMNS if any(key in values for _, values in rows + references)]
    if not shown:
        return ""
    drawn = [settings_phrase(report.get("sampler")) for _, report in run.evaluations]
    drawn += [str(values.get("sampled", "")) for _, values in references]
    last = [[text] if any(drawn) else [] for text in drawn]
    cells = [
        [name, *(_score(key, values.get(key)) for key in shown), *text]
        for (name, values), text in zip(rows + references, last, strict=True)
    ]
    head = ["", *(COLUMNS[key] for key in shown), *(["sampled with"] if any(drawn) else [])]
    of_notes: dict[str, list[str]] = {}  # note -> the evaluations that it is of
    for name, report in run.evaluations:
        settings = {key: report.get(key) for key in ("protocol", "sampler", "sampler_origin", "samples")}
        own = [str(note) for note in _list(report.get("notes"))]
        own += [f"{key} {flat(value)}" for key, value in settings.items() if value is not None]
        for note in own:
            of_notes.setdefault(note, []).append(name)
    listed = "".join(f"<li>{escape(', '.join(names))}: {escape(note)}</li>" for note, names in of_notes.items())
    scores = table(head, cells, of_paper=len(references))
    return f'<div class="wide">{scores}</div>' + (f'<ul class="note">{listed}</ul>' if listed else "")


def samples(run: RecordedRun) -> str:
    """The first and the last grid, column by column (one class each) side by side; whole if they do not match."""
    if not run.grids:
        return ""
    classes = _classes(run.config)
    bounds = (10, classes, _section(run.config, "logging").get("samples_per_grid"))
    columns = max(1, min(bound for bound in bounds if isinstance(bound, int)))
    names = [escape(_step_name(name)) for name, _ in run.grids]
    strips = [columns_of(data, columns) for _, data in run.grids]
    if len(strips) < 2 or any(len(strip) != len(strips[0]) for strip in strips):
        figures = [_figure(name, _image(data)) for name, (_, data) in zip(names, run.grids, strict=True)]
        return f'<div class="pairs">{"".join(figures)}</div>'
    figures = [
        _figure(
            escape(class_title(column * (classes // columns), run.class_names)),
            f"{_image(before)}{_image(after)}<span>before</span><span>after</span>",
            "pair",
        )
        for column, (before, after) in enumerate(zip(*strips, strict=True))
    ]
    size = " small" if _width(strips[0][0]) <= SMALL else ""
    scale = _section(run.config, "sampling").get("guidance_scale")
    guidance = f"guidance s = {scale:g}" if isinstance(scale, int | float) and scale else "without guidance"
    note = f"Before ({names[0]}, left) and after ({names[1]}, right), {guidance}."
    return f'<p class="note">{note}</p><div class="pairs{size}">{"".join(figures)}</div>'


def class_title(label: int, names: Sequence[str]) -> str:
    """`class 3: beagle`; without the name where it is not known, or is the number."""
    known = names[label] if label < len(names) else str(label)
    return f"class {label}" if known == str(label) else f"class {label}: {known}"


def columns_of(png: bytes, columns: int) -> list[bytes]:
    """The columns of a grid, as PNGs; the whole grid when its width is not a multiple of `columns`."""
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


def curves(run: RecordedRun) -> str:
    """One chart per entry of CHARTS, then one per tag that is in none of them."""
    known = {tag for *_, tags in CHARTS for tag in tags}
    others = [(tag, tag.rpartition("/")[2], (tag,)) for tag in sorted(run.series) if tag not in known]
    figures = []
    for title, unit, tags in (*CHARTS, *others):
        lines = {tag.rpartition("/")[2]: run.series[tag] for tag in tags if run.series.get(tag)}
        if lines:
            figures.append(_figure(escape(title), _image(line_chart(lines, unit), "chart", title)))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def facts(run: RecordedRun) -> str:
    """Small tables: the summary, throughput and memory, versions, the last step's values."""
    kept = run.summary.get("versions")
    final = _section(run.summary, "final") or {tag: points[-1][1] for tag, points in run.series.items() if points}
    of_versions = ("Versions", kept) if isinstance(kept, dict) else ("Versions, of this page", versions())
    own_table = ("versions", "final")
    summary = {key: value for key, value in run.summary.items() if not (key in own_table and isinstance(value, dict))}
    cards = {
        "Summary": flattened(summary),
        "Throughput and memory": resources(run),
        of_versions[0]: flattened(of_versions[1]),
        "Last step": flattened(final),
    }
    shown = (f'<div class="card"><h3>{title}</h3>{table([], rows)}</div>' for title, rows in cards.items() if rows)
    return f'<div class="cards">{"".join(shown)}</div>'


def resources(run: RecordedRun) -> list[list[str]]:
    """Median throughput without the first tenth of the steps (warm-up), and peak memory."""
    rows = []
    for title, tag, reduce in (
        ("median images per second", "throughput/images_per_second", statistics.median),
        ("median model FLOPs utilisation", "throughput/mfu", statistics.median),
        ("peak memory of a rank, GiB", "memory/peak_gib", max),
    ):
        values = [value for _, value in run.series.get(tag, [])]
        if values:
            rows.append([title, f"{reduce(values[len(values) // 10 :]):.4g}"])
    return rows


def table(head: list[str], rows: list[list[str]], of_paper: int = 0) -> str:
    """An HTML table, its last `of_paper` rows in the style of the paper's; every cell is escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    own, paper = lines[: len(lines) - of_paper], lines[len(lines) - of_paper :]
    body = "".join([f"<tr>{line}</tr>" for line in own] + [f'<tr class="paper">{line}</tr>' for line in paper])
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def flattened(tree: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested values as rows of (dotted key, text); None is left out."""
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
    """Number of the model's classes, by the recipe and its preset; ImageNet's 1,000 when they do not say."""
    model = _section(config, "model")
    given = _section(model, "overrides").get("num_classes")
    if isinstance(given, int) and given > 0:
        return given
    try:
        return model_config(str(model.get("preset"))).num_classes
    except ValueError:
        return 1000


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _score(key: str, value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.{DECIMALS.get(key, 1)}f}" if number else "-"


def _step_name(name: str) -> str:
    """`step_000056` -> step 56; other names unchanged."""
    found = re.fullmatch(r"step_(\d+)", name)
    return f"step {int(found[1])}" if found else name


def _width(png: bytes) -> int:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        return picture.width


def _image(png: bytes, style: str = "", title: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<img alt="{escape(title)}"{kind} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figure(caption: str, content: str, style: str = "") -> str:
    """Caption and content are HTML."""
    kind = f' class="{style}"' if style else ""
    return f"<figure{kind}><figcaption>{caption}</figcaption>{content}</figure>"
