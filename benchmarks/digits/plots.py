"""Figures of the results of `paper.py`, for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Rows = list[dict[str, Any]]


def draw(found: dict[str, Rows], folder: Path) -> None:
    """digits_frontier.png (Figures 1, 4, 5) and digits_training.png (Figures 9, 10, Table 5)."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6))
    _frontier(axes[0], found)
    _combined(axes[1], found)
    _save(figure, folder / "digits_frontier.png")
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4))
    _curves(axes[0], found["curves"])
    _over(axes[1], found["beta"], "beta", "Figure 9: over beta (lambda 10)")
    _over(axes[2], found["conditioned"], "lambda", "Table 5: one model, lambda chosen at sampling")
    _save(figure, folder / "digits_training.png")


def draw_successors(found: dict[str, Rows], folder: Path) -> None:
    """digits_successors.png: guidance, CCA, GFT and DDO in the plane of FID and class accuracy, at equal compute.

    FID is cut off at three times the unguided model's: DDO with a large lambda lies far above.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, cca in zip(axes, ("CCA, one epoch", "CCA, three epochs"), strict=True):
        compute = found[cca][0]["compute"]
        _path(axis, found["guidance"], "guidance over s (2x time)", "s", "o-", "accuracy")
        _path(axis, found[cca], f"{cca}, over lambda", "lambda", "s-", "accuracy")
        gft = [row for row in found["gft"] if row["compute"] == compute]
        _path(axis, gft, f"{gft[0]['name']}, over beta", "beta", "^-", "accuracy")
        for name in dict.fromkeys(row["name"] for row in found["ddo"] if abs(row["compute"] - compute) < 1):
            ddo = [row for row in found["ddo"] if row["name"] == name]
            _path(axis, ddo, f"{name}, over lambda", "lambda", "v:", "accuracy")
        axis.set_ylim(0.0, 3 * found["guidance"][0]["fid"]["mean"])
        _label(axis, f"{compute:g} forwards an image", "class accuracy", "FID")
    _save(figure, folder / "digits_successors.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _path(axis: Axes, rows: Rows, label: str, by: str, style: str, over: str = "inception_score") -> None:
    x = [row[over]["mean"] for row in rows]
    y = [row["fid"]["mean"] for row in rows]
    errors = {"xerr": [row[over]["spread"] for row in rows], "yerr": [row["fid"]["spread"] for row in rows]}
    axis.errorbar(x, y, **errors, fmt=style, label=label, capsize=2)
    for row, a, b in zip(rows, x, y, strict=True):
        axis.annotate(f"{row[by]:g}", (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)


def _frontier(axis: Axes, found: dict[str, Rows]) -> None:
    _path(axis, found["guidance"], "guidance over s (2x time)", "s", "o-")
    _path(axis, found["frontier"], "CCA over lambda (1x time)", "lambda", "s-")
    _label(axis, "Figure 4: FID and IS", "inception score", "FID")


def _combined(axis: Axes, found: dict[str, Rows]) -> None:
    _path(axis, found["guidance"], "guidance alone", "s", "o-")
    for value in sorted({row["lambda"] for row in found["combined"]}):
        rows = [row for row in found["combined"] if row["lambda"] == value]
        _path(axis, rows, f"CCA (lambda {value:g}) + guidance over s", "s", "^-")
    _label(axis, "Figures 5, 6: CCA with guidance", "inception score", "FID")


def _curves(axis: Axes, rows: Rows) -> None:
    steps = [row["step"] for row in rows]
    for tag, label in (("logps/chosen", "positives"), ("logps/rejected", "negatives")):
        axis.plot(steps, [row[tag]["mean"] for row in rows], label=label)
    _label(axis, "Figure 10: log p_policy - log p_reference", "step", "nats an image")


def _over(axis: Axes, rows: Rows, name: str, title: str) -> None:
    x, twin = [row[name] for row in rows], axis.twinx()
    for plot, value, style in ((axis, "accuracy", "C0o-"), (twin, "fid", "C3s--")):
        means, spreads = ([row[value][part] for row in rows] for part in ("mean", "spread"))
        plot.errorbar(x, means, spreads, fmt=style, capsize=2, label={"accuracy": "class accuracy"}.get(value))
    twin.set_ylabel("FID", color="tab:red")
    axis.set_xscale("log")
    _label(axis, title, name, "class accuracy")


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
