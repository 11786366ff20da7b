"""Plots as inline SVG without style attributes, which the pages' policy would not allow: colours
are classes of base.css, and follow its light and dark scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .page import number, visible

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 40
_MOST_POINTS = 400  # of a line: more would not be seen
_DOTS = 12  # points of a line that are marked one by one


@dataclass(frozen=True)
class Series:
    """A line: its name, points, and the class that colours it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Frame:
    """A plot's axes: data ranges and where they lie in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT

    def at_x(self, value: float) -> float:
        low, high = self.x
        inside = self.width - LEFT - RIGHT
        return round(LEFT + (value - low) / ((high - low) or 1) * inside, 2)

    def at_y(self, value: float) -> float:
        low, high = self.y
        bottom = self.height - BOTTOM
        return round(bottom - (value - low) / ((high - low) or 1) * (bottom - TOP), 2)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float], int]:
    """Few enough finite points to draw: means of groups of so many neighbours."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    group = max(1, math.ceil(len(kept) / _MOST_POINTS))
    parts = [kept[at : at + group] for at in range(0, len(kept), group)]
    means = [[sum(point[axis] for point in part) / len(part) for part in parts] for axis in (0, 1)]
    return means[0], means[1], group


def line_chart(series: Sequence[Series], x_label: str, y_label: str, zero: bool = False) -> Markup:
    """Lines over a common x axis; zero: the y axis begins there. Empty if there is no point."""
    drawn = [(line, *thin(line.x, line.y)) for line in series]
    drawn = [entry for entry in drawn if entry[1]]
    if not drawn:
        return Markup("")
    all_x = [value for entry in drawn for value in entry[1]]
    all_y = [value for entry in drawn for value in entry[2]]
    low, high = min([*all_y, *([0.0] if zero else [])]), max(all_y)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    frame = Frame(
        (min(all_x), max(all_x)), (low if zero and low == 0 else low - margin, high + margin)
    )
    parts = [_axes(frame, x_label, y_label)]
    for line, x, y, _ in drawn:
        points = " ".join(f"{frame.at_x(a)},{frame.at_y(b)}" for a, b in zip(x, y, strict=True))
        title = f"{line.name}: {number(y[0])} at {number(x[0])}, {number(y[-1])} at {number(x[-1])}"
        shape = Markup('<circle cx="{}" cy="{}" r="3" class="dot {}">{}</circle>')
        if len(x) <= _DOTS:
            for a, b in zip(x, y, strict=True):
                said = _title(f"{line.name}: {number(b)} at {number(a)}")
                parts.append(shape.format(frame.at_x(a), frame.at_y(b), line.colour, said))
        shape = Markup('<polyline points="{}" class="line {}">{}</polyline>')
        parts.append(shape.format(points, line.colour, _title(title)))
    return figure(series, svg(parts, f"{y_label} over {x_label}"), _grouped(drawn))


def _grouped(drawn: Sequence[tuple[Series, list[float], list[float], int]]) -> str:
    group = max(entry[3] for entry in drawn)
    return f"each point the mean of {group} records" if group > 1 else ""


def area_chart(series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Shares of 1 stacked over a common x axis. Empty if there is no point."""
    drawn = [(line, *thin(line.x, line.y)) for line in series]
    length = min((len(entry[1]) for entry in drawn), default=0)
    if not length:
        return Markup("")
    x = drawn[0][1][:length]
    frame = Frame((x[0], x[-1]), (0.0, 1.0))
    below, parts = [0.0] * length, []
    for line, _, y, _ in drawn:
        above = [min(b + v, 1.0) for b, v in zip(below, y[:length], strict=True)]
        there = [(frame.at_x(a), frame.at_y(b)) for a, b in zip(x, above, strict=True)]
        back = [(frame.at_x(a), frame.at_y(b)) for a, b in zip(x, below, strict=True)][::-1]
        if length == 1:  # one step: a bar
            there, back = (
                [(LEFT, there[0][1]), (WIDTH - RIGHT, there[0][1])],
                [
                    (WIDTH - RIGHT, back[0][1]),
                    (LEFT, back[0][1]),
                ],
            )
        points = " ".join(f"{a},{b}" for a, b in [*there, *back])
        title = f"{line.name}: {y[0]:.1%} at {number(x[0])}, {y[-1]:.1%} at {number(x[-1])}"
        shape = Markup('<polygon points="{}" class="area {}">{}</polygon>')
        parts.append(shape.format(points, line.colour, _title(title)))
        below = above
    parts.append(_axes(frame, x_label, y_label, as_percent=True))
    return figure(series, svg(parts, f"{y_label} over {x_label}"), _grouped(drawn))


def histogram(
    edges: Sequence[float],
    stacks: Mapping[tuple[str, str], Sequence[float]],
    x_label: str,
    y_label: str,
    name: str,
) -> Markup:
    """Bars of shares, stacked: (name, colour) -> share of 1 in each bin.

    The bars of a stack are rect elements in a group with data-stack, in order of the bins, so that
    a script can move them; the svg carries data-most, the share at the top of its axis.
    """
    totals = [sum(values) for values in zip(*stacks.values(), strict=True)]
    most = max([*totals, 1e-9]) * 1.05
    frame = Frame((edges[0], edges[-1]), (0.0, most))
    parts = [_axes(frame, x_label, y_label, as_percent=True)]
    below = [0.0] * len(totals)
    for (label, colour), values in stacks.items():
        bars = []
        for at, value in enumerate(values):
            left, right = frame.at_x(edges[at]), frame.at_x(edges[at + 1])
            top, bottom = frame.at_y(below[at] + value), frame.at_y(below[at])
            shape = Markup('<rect x="{}" width="{}" y="{}" height="{}"/>')
            bars.append(
                shape.format(
                    round(left + 0.5, 2), round(right - left - 1, 2), top, round(bottom - top, 2)
                )
            )
            below[at] += value
        group = Markup('<g class="fill {}" data-stack="{}">{}</g>')
        parts.append(group.format(colour, _text(label), Markup("").join(bars)))
    drawing = svg(parts, f"{y_label} by {x_label}", f'id="{name}" data-most="{most:.6g}"')
    return figure([Series(label, (), (), colour) for label, colour in stacks], drawing)


def interval(score: float, low: float | None, high: float | None, threshold: float) -> Markup:
    """A gate in one line: its score, confidence interval and threshold, on an axis just wide enough
    for them."""
    width, middle = 220, 14
    shown = [score, threshold, *(end for end in (low, high) if end is not None)]
    margin = 0.15 * (max(shown) - min(shown)) or 0.1
    first, last = min(shown) - margin, max(shown) + margin

    def at(value: float) -> float:
        return round(6 + (value - first) / (last - first) * (width - 12), 2)

    line = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="{}"/>')
    parts = [line.format(6, width - 6, middle, middle, "axis")]
    text = f"score {number(score)}, threshold {number(threshold)}"
    if low is not None and high is not None:
        parts.append(line.format(at(low), max(at(high), at(low) + 0.5), middle, middle, "interval"))
        text += f", interval {number(low)} to {number(high)}"
    parts.append(line.format(at(threshold), at(threshold), 3, 25, "threshold"))
    parts.append(
        Markup('<circle cx="{}" cy="{}" r="4.5" class="score"/>').format(at(score), middle)
    )
    return svg(parts, text, 'class="glyph"', width, 28)


def figure(series: Sequence[Series], drawing: Markup, note: str = "") -> Markup:
    """A drawing under the legend of its series, if there are several."""
    entry = Markup(
        '<span class="key"><svg class="swatch" viewBox="0 0 10 10">'
        '<rect width="10" height="10" rx="2" class="fill {}"/></svg>{}</span>'
    )
    several = series if len(series) > 1 else ()
    keys = Markup("").join(entry.format(line.colour, _text(line.name)) for line in several)
    if note:
        keys += Markup('<span class="key note">{}</span>').format(note)
    return Markup('<p class="legend">{}</p>{}').format(keys, drawing) if keys else drawing


def svg(
    parts: Sequence[Markup],
    label: str,
    attributes: str = 'class="plot"',
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Markup:
    """An svg element with a text for those who cannot see it. attributes: our own text."""
    if "class=" not in attributes:
        attributes += ' class="plot"'
    start = f'<svg viewBox="0 0 {width} {height}" role="img" {attributes} '
    return Markup(start) + Markup('aria-label="{}">{}</svg>').format(
        _text(label), Markup("").join(parts)
    )


def _axes(frame: Frame, x_label: str, y_label: str, as_percent: bool = False) -> Markup:
    parts = []
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    y_ticks = ticks(*frame.y, most=5)
    for value in y_ticks:
        y = frame.at_y(value)
        text = (
            _tick(100 * value, 100 * (y_ticks[-1] - y_ticks[0])) + "%"
            if as_percent
            else _tick(value, y_ticks[-1] - y_ticks[0])
        )
        parts.append(
            Markup(
                '<line x1="{}" x2="{}" y1="{}" y2="{}" class="grid"/>'
                '<text x="{}" y="{}" class="tick end">{}</text>'
            ).format(LEFT, right, y, y, LEFT - 7, y + 4, text)
        )
    x_ticks = ticks(*frame.x)
    for value in x_ticks:
        parts.append(
            Markup('<text x="{}" y="{}" class="tick middle">{}</text>').format(
                frame.at_x(value), bottom + 16, _tick(value, x_ticks[-1] - x_ticks[0])
            )
        )
    parts.append(
        Markup(
            '<line x1="{}" x2="{}" y1="{}" y2="{}" class="axis"/>'
            '<text x="{}" y="{}" class="label middle">{}</text>'
            '<text x="0" y="14" class="label">{}</text>'
        ).format(
            LEFT,
            right,
            bottom,
            bottom,
            (LEFT + right) / 2,
            frame.height - 5,
            _text(x_label),
            _text(y_label),
        )
    )
    return Markup("").join(parts)


def _tick(value: float, span: float) -> str:
    """A tick's number with as many decimals as tell it from its neighbours."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or (span and span < 2e-3):
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        if not exponent:
            mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    decimals = 0 if span >= 5 or (span == 0 and value == int(value)) else 1 if span >= 0.5 else 2
    if span < 0.05:
        decimals = 1 - math.floor(math.log10(span or abs(value)))
    return f"{value:,.{max(decimals, 0)}f}"


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(_text(text))


def _text(text: str) -> Markup:
    return escape(visible(text))
