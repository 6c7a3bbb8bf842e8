"""Charts as inline SVG.  They need no script; page.js adds the values under the pointer, read from the `data-`
attributes.  Colours are CSS classes: s0, s1, ... of runs, p0, ... of parts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike

WIDTH, HEIGHT = 440, 216
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36
PLOT_W, PLOT_H = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


@dataclass
class Line:
    """One run's curve: x (n,), y (n,), and for a binned one the minimum and maximum of each bin."""

    name: str
    run: int  # its colour
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @property
    def range(self) -> tuple[float, float]:
        low, high = (self.y if part is None else part for part in (self.low, self.high))
        return float(low.min()), float(high.max())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        text = f"{value:.2g}"
        mantissa, _, power = text.partition("e")
        return f"{mantissa}e{int(power)}" if power else text
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def limits(arrays: list[np.ndarray]) -> tuple[float, float, float | None]:
    """(low, high, cut): the range of the axis; `cut` is the largest value where the axis leaves out a few outliers."""
    y = np.concatenate(arrays)
    low, high = float(y.min()), float(y.max())
    cut = None
    if len(y) >= 20:
        p2, p98 = np.percentile(y, [2, 98])
        if high - p98 > 3 * (p98 - p2) > 0:
            high, cut = float(p98 + 0.3 * (p98 - p2)), high
    if high == low:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    pad = 0.05 * (high - low)
    if low >= 0 and low < 0.6 * high:
        return 0.0, high + pad, cut
    return low - pad, high + pad, cut


class Frame:
    """The axes, and the pixels of values."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y = y

    def px(self, x: ArrayLike) -> np.ndarray:
        return LEFT + (np.asarray(x, float) - self.x[0]) / (self.x[1] - self.x[0]) * PLOT_W

    def py(self, y: ArrayLike) -> np.ndarray:
        y = np.clip(np.asarray(y, float), self.y[0], self.y[1])
        return TOP + (self.y[1] - y) / (self.y[1] - self.y[0]) * PLOT_H

    def axes(self, x_label: str) -> str:
        parts = []
        for value in ticks(*self.y):
            at = float(self.py(value))
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{label(value)}</text>'
            )
        for value in ticks(*self.x, 6):
            at = float(self.px(value))
            parts.append(
                f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP + PLOT_H}" y2="{TOP + PLOT_H + 4}"/>'
                f'<text x="{at:.1f}" y="{TOP + PLOT_H + 17}" text-anchor="middle">{label(value)}</text>'
            )
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{TOP + PLOT_H}" y2="{TOP + PLOT_H}"/>'
            f'<text class="xlabel" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}'
            "</text>"
        )
        return "".join(parts)

    def data(self, x_label: str, unit: str, series: list[dict]) -> str:
        box = {"box": [LEFT, TOP, PLOT_W, PLOT_H], "x": self.x, "y": self.y, "xl": x_label, "u": unit, "s": series}
        return escape(json.dumps(box, allow_nan=False, separators=(",", ":")))


def line_chart(title: str, lines: list[Line], *, x_label: str, unit: str = "", text: str = "") -> str:
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return figure(title, note("nothing logged"), text)
    low, high, cut = limits([line.y for line in lines])
    frame = Frame((min(line.x.min() for line in lines), max(line.x.max() for line in lines)), (low, high))
    shapes = [_band(frame, line) + _curve(frame, line) for line in lines]
    series = [
        {"n": line.name, "c": f"s{line.run}", "r": line.run, "x": _round(line.x), "y": _round(line.y)} for line in lines
    ]
    if cut is not None:
        text += f"{' ' if text else ''}Some values are beyond the axis, up to {label(cut)}."
    ends = [[label(float(value)) for value in (line.y[0], line.x[0], line.y[-1], line.x[-1])] for line in lines]
    texts = [f"{line.name}: {a} at {x_label} {b}, {c} at {d}" for line, (a, b, c, d) in zip(lines, ends)]
    data = frame.data(x_label, unit, series)
    return figure(title, svg(f"{title}. {'; '.join(texts)}", frame.axes(x_label) + "".join(shapes), data), text, unit)


def _curve(frame: Frame, line: Line) -> str:
    xs, ys = frame.px(line.x), frame.py(line.y)
    out = f'<path class="line s{line.run} r{line.run}" d="M{_path(xs, ys)}"/>'
    if len(xs) <= 40:
        out += f'<path class="dots s{line.run} r{line.run}" d="{_dots(xs, ys)}"/>'
    return out


def _band(frame: Frame, line: Line) -> str:
    if line.low is None or line.high is None or not (line.high > line.low).any():
        return ""
    return _area(frame, line.x, line.low, line.high, f"band s{line.run} r{line.run}")


def _area(frame: Frame, x: np.ndarray, low: np.ndarray, high: np.ndarray, kind: str) -> str:
    xs, ys = frame.px(np.r_[x, x[::-1]]), frame.py(np.r_[high, low[::-1]])
    return f'<path class="{kind}" d="M{_path(xs, ys)}Z"/>'


def _dots(xs: np.ndarray, ys: np.ndarray) -> str:
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(xs, ys))


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys))


def stacked_chart(
    title: str, run: int, x: np.ndarray, percent: np.ndarray, names: tuple[str, ...], *, x_label: str
) -> str:
    """Stacked areas: percent (n, parts), each row adding up to 100."""
    if len(x) == 1:
        x, percent = np.array([x[0], x[0] + 1]), np.repeat(percent, 2, 0)
    frame = Frame((x.min(), x.max()), (0.0, 100.0))
    upper = percent.cumsum(1)
    lower = upper - percent
    shapes = [_area(frame, x, lower[:, part], upper[:, part], f"area p{part}") for part in range(len(names))]
    series = [{"n": name, "c": f"p{i}", "x": _round(x), "y": _round(percent[:, i])} for i, name in enumerate(names)]
    label_text = ", ".join(f"{name} {percent[:, i].mean():.0f} %" for i, name in enumerate(names))
    inside, data = "".join(shapes) + frame.axes(x_label), frame.data(x_label, "%", series)
    return figure(title, svg(f"{title}. On average: {label_text}", inside, data), unit="%", run=run)


def scatter(title: str, xy: np.ndarray, groups: list[tuple[str, str, np.ndarray]], text: str = "") -> str:
    """Points (n, 2) in a square; groups: (name, colour, indices or mask of its points)."""
    side = 440
    low, span = xy.min(0), max(float((xy.max(0) - xy.min(0)).max()), 1e-12)
    offset = (1 - (xy.max(0) - low) / span) / 2  # centre the shorter side
    at = 12 + (side - 24) * ((xy - low) / span + offset)
    at[:, 1] = side - at[:, 1]
    size = 7 if len(xy) <= 500 else 5 if len(xy) <= 2000 else 3
    shapes = [
        f'<path class="points" stroke="{colour}" stroke-width="{size}" d="{_dots(*at[points].T)}"/>'
        for _, colour, points in reversed(groups)
    ]
    group_of = np.zeros(len(xy), int)
    for i, (_, _, points) in enumerate(groups):
        group_of[points] = i
    data = {
        "names": [name for name, _, _ in groups],
        "colours": [colour for _, colour, _ in groups],
        "p": [[round(float(x), 1), round(float(y), 1), int(g)] for (x, y), g in zip(at, group_of)],
    }
    body = (
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}" class="map" '
        f'data-points="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(shapes)}'
        f'<circle class="ring" r="{size}" visibility="hidden"/></svg>'
    )
    return figure(title, body, text)


def svg(label_text: str, inside: str, data: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(label_text)}" '
        f'data-lines="{data}">{inside}<line class="cursor" y1="{TOP}" y2="{TOP + PLOT_H}" visibility="hidden"/></svg>'
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def about(text: str) -> str:
    return f'<p class="about">{escape(text)}</p>'


def figure(title: str, body: str, text: str = "", unit: str = "", run: int | None = None) -> str:
    unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    owner = f' class="r{run}"' if run is not None else ""
    return f"<figure{owner}><figcaption>{escape(title)}{unit}</figcaption>{body}{about(text) if text else ''}</figure>"


def legend(items: list[tuple[str, str]]) -> str:
    """items: (class s0, ... or p0, ..., or a colour; name)."""
    entries = "".join(f"<li>{_key(key)}{escape(name)}</li>" for key, name in items)
    return f'<ul class="legend">{entries}</ul>'


def _key(key: str) -> str:
    if key.startswith("#"):
        return f'<i style="background:{escape(key)}"></i>'
    if key.startswith("s"):  # a line, as in the run's curves
        return f'<svg class="key" viewBox="0 0 34 10" aria-hidden="true"><path class="line {key}" d="M1 5h32"/></svg>'
    return f'<i class="{key}"></i>'


def _round(values: np.ndarray) -> list[float]:
    """Five digits, which halve the size of the page and are enough for the values under the pointer."""
    return [float(f"{v:.5g}") for v in values]
