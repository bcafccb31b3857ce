"""Line charts as inline SVG, with no script and no library: what a page that opens from disk can hold."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 28
MOST_POINTS = 400  # of a line; more cannot be seen
TICKS = 4

Series = list[tuple[int, float]]


def line_chart(lines: dict[str, Series]) -> str:
    """An `<svg>` of lines over steps, one colour a name, in the order given; empty lines are left out.

    Values have to be finite. Returns an empty string when there is no point at all.
    """
    drawn = {name: thinned(points) for name, points in lines.items() if points}
    if not drawn:
        return ""
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    if math.isclose(min(values), max(values), rel_tol=1e-9):  # means of equal values differ in the last digit
        values += [0.0]  # a constant is seen against nought
    x_ticks, y_ticks = ticks(min(steps), max(steps)), ticks(min(values), max(values))
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    y_low, y_high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(drawn))}">']
    for value in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(number(value))}</text>'
        )
    for value in x_ticks:
        if x_low <= value <= x_high:
            parts.append(
                f'<text x="{x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(value)}</text>'
            )
    parts.append(f'<text x="{LEFT - 6}" y="{HEIGHT - 8}" text-anchor="end">step</text>')
    for index, points in enumerate(drawn.values()):
        corners = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        if len(points) == 1:
            step, value = points[0]
            parts.append(f'<circle class="line{index % 6}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
        else:
            parts.append(f'<polyline class="line{index % 6}" points="{corners}"/>')
    return "".join([*parts, "</svg>"])


def legend(names: list[str]) -> str:
    """The names in the colours of their lines."""
    return " ".join(
        f'<span class="key line{index % 6}">{escape(name)}</span>' for index, name in enumerate(names)
    )


def thinned(points: Series) -> Series:
    """At most `MOST_POINTS` points: means of equal runs of neighbours, and the last point as it is."""
    if len(points) <= MOST_POINTS:
        return points
    run = -(-len(points) // (MOST_POINTS - 1))
    means = []
    for start in range(0, len(points), run):
        part = points[start : start + run]
        means.append((part[len(part) // 2][0], sum(value for _, value in part) / len(part)))
    return [*means[:-1], points[-1]]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers around the range, at most `TICKS` + 2 of them, of step 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else abs(high) or 1.0
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """As short as it can be read: 0, 0.25, 1500, 2e-05."""
    return f"{value:.4g}"
