"""Line charts of a run's metrics, drawn by matplotlib as PNG."""

from __future__ import annotations

import io
import math
import warnings

Series = list[tuple[int, float]]

WIDTH, HEIGHT, DPI = 4.4, 2.6, 160  # inches, and pixels per inch: sharp on a display of two pixels per point
COLOURS = ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#b08800", "#0c8599")
LARGEST = 1e300  # values beyond it are drawn at it: the axis' arithmetic must not overflow
STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "grid.alpha": 0.3,
    "agg.path.chunksize": 10_000,  # a line of 100,000 noisy points overflows the rasteriser otherwise
    "text.parse_math": False,  # a tag may hold a dollar sign
}


def line_chart(lines: dict[str, Series], unit: str) -> bytes:
    """Draw lines over training steps, with a legend when there are several.

    Args:
        lines: (step, value) in order, by the name that the legend shows; empty lines are left out. Values must be
            finite.
        unit: label of the value axis.

    Returns:
        A PNG on white; empty when no line has a point.
    """
    drawn = {name: points for name, points in lines.items() if points}
    if not drawn:
        return b""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tag's letters may be missing in the font
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(drawn.items()):
            steps = [step for step, _ in points]
            values = [min(max(value, -LARGEST), LARGEST) for _, value in points]
            marker = "o" if len(points) == 1 else ""
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(*value_range([value for points in drawn.values() for _, value in points]))
        if len(drawn) > 1:
            axes.legend(frameon=False, fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    return picture.getvalue()


def value_range(values: list[float]) -> tuple[float, float]:
    """Limits of the value axis: the values with a margin of 5%; for a constant from 0, so that its size is seen."""
    low, high = max(min(values), -LARGEST), min(max(values), LARGEST)
    if math.isclose(low, high, rel_tol=1e-9):
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            high = 1.0
    margin = 0.05 * (high - low)
    return low - margin, high + margin
