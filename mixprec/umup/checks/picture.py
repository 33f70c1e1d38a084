"""Lines over a logarithmic axis as an SVG document, made without any library.

Lines are named where they end and told apart by colours of Okabe and Ito, which colour-blind
readers can tell apart too. Light and dark follow the reader's own setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixprec.markup import escaped

__all__ = ["Line", "draw"]

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 600, 84, 420
SPACING = 15
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")


@dataclass(frozen=True)
class Line:
    """A line through points; one of them may be marked."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    mark: float | None = None
    """Place on the x axis that gets a dot."""


def draw(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    caption: str = "",
) -> str:
    """An SVG document; x on a binary logarithmic axis, y on one too if asked for.

    Points that are not finite (or not positive, on a logarithmic axis) end a line's part.

    >>> from mixprec.umup.checks.picture import Line, draw
    >>> draw([Line("a", [1, 2], [3, 4])], title="t", x_label="x", y_label="y").count("polyline")
    1
    """
    points = [
        [_place(x, y, log_y) for x, y in zip(line.xs, line.ys, strict=True)] for line in lines
    ]
    known = [p for line in points for p in line if p is not None] or [(0.0, 0.0)]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    low, high = _padded(min(ys), max(ys), 1.0 if log_y else 0.0)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        span = max(max(xs) - min(xs), 1e-9)
        x = LEFT + (point[0] - min(xs)) / span * (RIGHT - LEFT)
        return x, BOTTOM - (point[1] - low) / (high - low) * (BOTTOM - TOP)

    parts = [_head(title), *_axes(sorted(set(xs)), low, high, at, x_label, y_label, log_y)]
    ends: list[tuple[float, int]] = []
    for index, line in enumerate(points):
        colour = COLOURS[index % len(COLOURS)]
        for run in _runs(line):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, run))
            parts.append(
                f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>'
            )
        mark = lines[index].mark
        for point in line:
            if point is not None and mark is not None and point[0] == math.log2(mark):
                x, y = at(point)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
        last = next((p for p in reversed(line) if p is not None), None)
        if last is not None:
            ends.append((at(last)[1], index))
    for (_, index), y in zip(sorted(ends), _spread([y for y, _ in sorted(ends)]), strict=True):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_text(RIGHT + 14, y + 4, lines[index].name, f'style="fill:{colour}"'))
    parts.append(_text(LEFT, HEIGHT - 12, caption, 'class="quiet"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(x: float, y: float, log_y: bool) -> tuple[float, float] | None:
    if not math.isfinite(y) or (log_y and y <= 0):
        return None
    return math.log2(x), math.log2(y) if log_y else y


def _padded(low: float, high: float, least: float) -> tuple[float, float]:
    room = max(0.06 * (high - low), (least - (high - low)) / 2, 1e-6)
    return low - room, high + room


def _runs(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _spread(wanted: Sequence[float]) -> list[float]:
    """Baselines of names, from the top, moved down until none overlaps the one above."""
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + SPACING) if places else y)
    over = max(0.0, places[-1] - (HEIGHT - 40)) if places else 0.0
    return [y - over for y in places]


def _head(title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"<title>{escaped(title)}</title>\n"
        "<style>text{font:12px system-ui,sans-serif;fill:#1f2328} .title{font-size:17px;"
        "font-weight:700} .quiet{fill:#59636e} .grid{stroke:#e4e8ed} .ground{fill:#fff}"
        "@media (prefers-color-scheme:dark){text{fill:#f0f3f6} .quiet{fill:#a3adb8}"
        ".grid{stroke:#2c333c} .ground{fill:#14181d}}</style>\n"
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n'
    ) + _text(24, 34, title, 'class="title"')


def _axes(
    xs: Sequence[float],
    low: float,
    high: float,
    at: Callable[[tuple[float, float]], tuple[float, float]],
    x_label: str,
    y_label: str,
    log_y: bool,
) -> list[str]:
    parts = [_text(24, TOP - 18, y_label, 'class="quiet"')]
    for value in _ticks(low, high, whole=log_y):
        _, y = at((xs[0], value))
        text = _power(value) if log_y else f"{value:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, text, 'class="quiet" text-anchor="end"'))
    every = -(-len(xs) // 10)
    for value in xs[::every]:
        x, _ = at((value, low))
        parts.append(_text(x, BOTTOM + 20, _power(value), 'class="quiet" text-anchor="middle"'))
    parts.append(_text(RIGHT, BOTTOM + 40, x_label, 'class="quiet" text-anchor="end"'))
    return parts


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * m for m in (1, 2, 5, 10) if step * m * 6 >= high - low)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _power(exponent: float) -> str:
    """2^exponent: as a number where that is short."""
    if exponent == round(exponent) and 0 <= exponent < 15:
        return str(2 ** round(exponent))
    return f"2^{exponent:g}"


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escaped(text)}</text>'
