"""Loss curves as a picture: an SVG file made without any library, or braille dots in a terminal.

Lines are named where they end, not in a legend, so nothing hangs on telling colours apart; the
colours are Okabe and Ito's and Tol's, which colour-blind readers can tell apart too. Curves that
coincide are drawn one inside the other. Light and dark follow the reader's own setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mixprec.markup import escaped

__all__ = ["FAULTY", "SOUND", "Curve", "Picture", "Stroke", "draw_svg", "draw_text"]

WIDTH, HEIGHT = 960, 566
LEFT, RIGHT, TOP, BOTTOM = 60, 606, 120, 446  # edges of the area that curves are drawn in
LABEL_SPACING = 24  # between the baselines of two names; a note under a name needs 17 more
NOTE_SPACING = 17
LOWEST = BOTTOM + 44


class Stroke(NamedTuple):
    """How a curve is drawn: colour on light and on dark ground, width, dashes."""

    light: str
    dark: str
    width: float
    dashes: str = "none"


# In drawing order, widest first, so that the ones below stay visible under those on top.
SOUND = (
    Stroke("#b4bac3", "#6b7480", 9),
    Stroke("#56b4e9", "#2a86c0", 5),
    Stroke("#005083", "#d9eefb", 1.8, "7 4"),
    Stroke("#009e73", "#5fd3b0", 1.8, "2 5"),
)
FAULTY = (
    Stroke("#aa3377", "#e58cc0", 3),
    Stroke("#d55e00", "#ff9a4d", 3),
    Stroke("#8a6d00", "#e0c04d", 3),
)


@dataclass(frozen=True)
class Curve:
    """One line: its points, what is written where it ends, and how it is drawn."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    stroke: Stroke
    value: str = ""
    note: str = ""

    def points(self) -> list[tuple[float, float]]:
        """Those that can be drawn: a diverged run ends where its loss does."""
        pairs = zip(self.xs, self.ys, strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(y)]


@dataclass(frozen=True)
class Picture:
    """What is written around the curves."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    caption: Sequence[str]


class Axis(NamedTuple):
    """Maps `low..high` linearly to `start..end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int, decimals: int = 0) -> list[tuple[float, str]]:
        """At most `count` round numbers inside, and how to write them; `decimals` at least.

        >>> Axis(2.7, 4.6, 0, 1).ticks(5)
        [(3.0, '3.0'), (3.5, '3.5'), (4.0, '4.0'), (4.5, '4.5')]
        """
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        decimals = max(decimals, -math.floor(math.log10(step) + 1e-9))
        return [(i * step, f"{i * step:.{decimals}f}") for i in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _axes(
    curves: Sequence[Curve], left: float, right: float, top: float, bottom: float
) -> tuple[Axis, Axis]:
    """Axes for all curves, without the upper third of the losses.

    On its way down from the first value, the logarithm of the number of classes, every run looks
    the same; shown in full it would take most of the height.
    """
    points = [point for curve in curves for point in curve.points()] or [(0.0, 0.0)]
    last = max(1.0, *(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = max(high - low, 1e-3)
    return Axis(0.0, last, left, right), Axis(low - 0.08 * span, low + 0.64 * span, bottom, top)


def draw_svg(curves: Sequence[Curve], picture: Picture) -> str:
    """The picture as a complete SVG document, 960 x 566, curves in drawing order."""
    x_axis, y_axis = _axes(curves, LEFT, RIGHT, TOP, BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="title description">',
        f'<title id="title">{escaped(picture.title)}</title>',
        f'<desc id="description">{escaped(_description(curves, picture))}</desc>',
        _style(curves),
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        _text(28, 44, picture.title, "heading"),
        _text(28, 68, picture.subtitle, "quiet"),
        *_frame(x_axis, y_axis, picture),
        f'<clipPath id="area"><rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT + 8}" '
        f'height="{BOTTOM - TOP}"/></clipPath>',
        '<g clip-path="url(#area)">',
        *(_line(i, curve, x_axis, y_axis) for i, curve in enumerate(curves)),
        "</g>",
        *_labels(curves, x_axis, y_axis),
        *(_text(28, 510 + 17 * i, line, "small") for i, line in enumerate(picture.caption)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _description(curves: Sequence[Curve], picture: Picture) -> str:
    ends = "; ".join(f"{curve.name} {curve.value}" for curve in curves)
    return f"{picture.subtitle} {picture.y_label} by {picture.x_label}. At the end: {ends}."


def _style(curves: Sequence[Curve]) -> str:
    def rules(ground: str, ink: str, quiet: str, grid: str, colours: Sequence[str]) -> str:
        lines = [
            f".ground{{fill:{ground}}} text{{fill:{ink}}} .quiet,.small,.tick{{fill:{quiet}}}",
            f".grid{{stroke:{grid}}} .axis,.leader{{stroke:{quiet}}}",
            *(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(colours)),
        ]
        return "\n".join(lines)

    light = rules("#ffffff", "#1f2328", "#59636e", "#e4e8ed", [c.stroke.light for c in curves])
    dark = rules("#14181d", "#f0f3f6", "#a3adb8", "#2c333c", [c.stroke.dark for c in curves])
    return (
        "<style>\n"
        "text{font:14px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif}\n"
        ".heading{font-size:23px;font-weight:700} .name{font-weight:600}\n"
        ".small,.tick{font-size:12px} .tick{font-variant-numeric:tabular-nums}\n"
        ".curve{fill:none;stroke-linecap:round;stroke-linejoin:round} .leader{fill:none}\n"
        f"{light}\n@media (prefers-color-scheme:dark){{\n{dark}\n}}\n</style>"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escaped(text)}</text>'


def _frame(x_axis: Axis, y_axis: Axis, picture: Picture) -> list[str]:
    parts = [_text(28, TOP - 16, picture.y_label, "tick")]
    for value, text in y_axis.ticks(5, decimals=1):
        y = y_axis(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 8, round(y + 4, 1), text, "tick", "end"))
    for value, text in x_axis.ticks(6):
        parts.append(_text(round(x_axis(value), 1), BOTTOM + 20, text, "tick", "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts.append(_text(RIGHT, BOTTOM + 38, picture.x_label, "tick", "end"))
    return parts


def _line(index: int, curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    points = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in curve.points())
    stroke = curve.stroke
    return (
        f'<polyline class="curve c{index}" stroke-width="{stroke.width:g}" '
        f'stroke-dasharray="{stroke.dashes}" points="{points}"/>'
    )


def _labels(curves: Sequence[Curve], x_axis: Axis, y_axis: Axis) -> list[str]:
    ends = [(i, curve, curve.points()[-1]) for i, curve in enumerate(curves) if curve.points()]
    ends.sort(key=lambda end: -round(end[2][1], 2))  # those that coincide stay in drawing order
    wanted = [min(max(y_axis(y), TOP), BOTTOM) for _, _, (_, y) in ends]
    heights = [LABEL_SPACING + NOTE_SPACING * bool(curve.note) for _, curve, _ in ends]
    parts: list[str] = []
    places = _spread(wanted, heights, LOWEST)
    for (i, curve, (x, _)), y, place in zip(ends, wanted, places, strict=True):
        start, left = x_axis(x) + 7, RIGHT + 28
        stroke = curve.stroke
        parts += [
            f'<path class="leader" d="M{start:.1f} {y:.1f}L{left - 4} {place:.1f}"/>',
            f'<path class="curve c{i}" stroke-width="{stroke.width:g}" '
            f'stroke-dasharray="{stroke.dashes}" d="M{left + 4} {place:.1f}h22"/>',
            f'<text x="{left + 38}" y="{place + 5:.1f}"><tspan class="name">{escaped(curve.name)}'
            f'</tspan><tspan class="quiet" dx="8">{escaped(curve.value)}</tspan></text>',
        ]
        if curve.note:
            parts.append(_text(left + 38, round(place + 5 + NOTE_SPACING, 1), curve.note, "small"))
    return parts


def _spread(wanted: Sequence[float], heights: Sequence[float], limit: float) -> list[float]:
    """Places for labels of these heights, none overlapping and none below `limit`.

    `wanted` goes from top to bottom; labels are pushed down to make room, then up from the limit.

    >>> _spread([10, 90, 90], [20, 20, 20], 120)
    [10, 80, 100]
    """
    places = list(wanted[:1])
    for want, height in zip(wanted[1:], heights, strict=False):
        places.append(max(want, places[-1] + height))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit - heights[i])
        limit = places[i]
    return places


# The dots of a braille character from top to bottom, left column and right column.
_BRAILLE_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw_text(curves: Sequence[Curve], *, columns: int = 48, rows: int = 14) -> str:
    """The same curves in braille dots, two across and four down a character, named at their ends.

    With names of 25 letters a line has 80 columns.

    >>> print(draw_text([Curve("sgd", [0, 1, 2, 3], [4, 2, 1.4, 1], SOUND[0])], columns=8, rows=3))
      2.5  ⠘⡄
      2.0   ⠘⠢⣀
      1.0      ⠉⠒⠢ sgd
    """
    x_axis, y_axis = _axes(curves, 0, 2 * columns - 1, 0, 4 * rows - 1)
    cells = [[0] * columns for _ in range(rows)]
    for curve in curves:
        for x, y in _dots(curve, x_axis, y_axis):
            if 0 <= y < 4 * rows:
                cells[y // 4][x // 2] |= _BRAILLE_DOTS[x % 2][y % 4]
    names = _names_by_row(curves, y_axis, rows)
    marks = {round(y_axis(value)) // 4: text for value, text in y_axis.ticks(5, decimals=1)}
    drawn = ["".join(chr(0x2800 + cell) if cell else " " for cell in line) for line in cells]
    lines = [f"{marks.get(row, ''):>5} {drawn[row]} {names[row]}".rstrip() for row in range(rows)]
    return "\n".join(lines).rstrip()


def _dots(curve: Curve, x_axis: Axis, y_axis: Axis) -> Iterator[tuple[int, int]]:
    """Every dot of the line through the curve's points, one or more for each column passed."""
    for (x0, y0), (x1, y1) in pairwise((x_axis(x), y_axis(y)) for x, y in curve.points()):
        steps = math.ceil(max(abs(x1 - x0), abs(y1 - y0), 1))
        for i in range(steps + 1):
            share = i / steps
            yield round(x0 + share * (x1 - x0)), round(y0 + share * (y1 - y0))


def _names_by_row(curves: Sequence[Curve], y_axis: Axis, rows: int) -> list[str]:
    """Each name on the row where its curve ends, or on the nearest that is free."""
    names = [""] * rows
    for curve in curves:
        for _, y in curve.points()[-1:]:
            end = min(max(round(y_axis(y)) // 4, 0), rows - 1)
            nearest = sorted(range(rows), key=lambda row, end=end: abs(row - end))
            row = next((row for row in nearest if not names[row]), end)
            names[row] = ", ".join(filter(None, (names[row], curve.name)))
    return names
