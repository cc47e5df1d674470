"""Line plots as SVG: no library and no script; colours come from the page, so that a dark page has a dark plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 34, 46
COLOURS = 8
"""Series that can be told apart by colour; more begin again, with dashes."""


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: What the legend calls it.
        xs: Rising, positive where the axis is logarithmic.
        ys: As many; not finite ones are left out.
        number: Which colour it has, the same in all plots of a page.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    number: int


def line_plot(title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = True) -> str:
    """A plot of several lines with axes, ticks and points; the legend is the page's.

    Args:
        title: Above the plot, and read out in its place.
        x_label: Below the horizontal axis.
        y_label: Beside the vertical axis.
        series: The lines; those without points are left out.
        log_x: Whether the horizontal axis is logarithmic.

    Returns:
        An ``svg`` element; an empty text if there is nothing to show.
    """
    lines = [_finite(each) for each in series]
    points = [point for line in lines for point in zip(line.xs, line.ys, strict=True)]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    across = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, log_x)
    up = _Axis(*_padded(min(ys), max(ys)), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>',
        *(_gridline(up, tick) for tick in up.ticks()),
        *(_mark(across, tick) for tick in across.ticks()),
        f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 8}">{escape(x_label)}</text>',
        f'<text class="label" transform="translate(13 {HEIGHT / 2:.0f}) rotate(-90)">{escape(y_label)}</text>',
        *(_line(line, across, up) for line in lines if line.xs),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True)
class _Axis:
    """From numbers to places."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, at = (math.log(each) if self.logarithmic else each for each in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the axis; its ends if there are fewer than two."""
        found = _decades(self.low, self.high) if self.logarithmic else _steps(self.low, self.high)
        return found if len(found) > 1 else sorted({self.low, self.high})


def _finite(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Series(series.name, [x for x, _ in kept], [y for _, y in kept], series.number)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room above and below; some for a flat line too."""
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _steps(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of two for a short axis, of ten for a long one."""
    base = 2.0 if high / low <= 4096 else 10.0
    exponents = range(math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9) + 1)
    return [base**exponent for exponent in exponents]


def _gridline(axis: _Axis, tick: float) -> str:
    y = axis.place(tick)
    line = f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{tick:.4g}</text>'


def _mark(axis: _Axis, tick: float) -> str:
    x, bottom = axis.place(tick), HEIGHT - _BOTTOM
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
    return f'{line}<text class="tick" x="{x:.1f}" y="{bottom + 18}">{tick:.4g}</text>'


def _line(series: Series, across: _Axis, up: _Axis) -> str:
    places = [(across.place(x), up.place(y)) for x, y in zip(series.xs, series.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in places)
    dashes = ' stroke-dasharray="6 4"' if series.number >= COLOURS else ""
    name = f"<title>{escape(series.name)}</title>"
    return f'<g class="line c{series.number % COLOURS}">{name}<polyline points="{path}"{dashes}/>{dots}</g>'
