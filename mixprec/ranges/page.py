"""The report of a watch as one HTML document: histograms as inline SVG, no script, no other file.

Each tensor is a strip over binades. Bars are its values, coloured by what its format does with them
as it is cast, or would be at exponent 0; lines below are the ranges of the formats, thin where
subnormals are; a dashed frame is the format's range moved to where the proposed exponent puts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mixprec import formats
from mixprec.binades import MAX_FLUSHED, MAX_SATURATED, Binades, percent, signed
from mixprec.formats import E4M3, E5M2, FP16, Format
from mixprec.markup import escaped
from mixprec.ranges.rows import Row

__all__ = ["page"]

LEFT, WIDTH, TOP, BASE, LINE = 44, 640, 8, 76, 13
HEIGHT = BASE + 4 * LINE + 8
LOWEST_SHARE = 1e-6
"""Share of values at which a bar has no height; each factor of ten adds a sixth."""
SHOWN = 30
"""Sentences and strips that are unfolded at first."""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_STYLE = """
:root{--ground:#fff;--text:#1f2328;--quiet:#59636e;--line:#d8dee4;--kept:#0072b2;--subnormal:#56b4e9;
--saturated:#d55e00;--flushed:#cc79a7}
@media (prefers-color-scheme:dark){:root{--ground:#14181d;--text:#f0f3f6;--quiet:#a3adb8;
--line:#39424d;--kept:#2a86c0}}
body{margin:2rem auto;max-width:760px;padding:0 1rem;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif}
h1{font-size:23px} h2{font-size:18px;margin-top:2.2rem} h3{font-size:15px;margin:1.6rem 0 .2rem}
h3 small,.quiet{color:var(--quiet);font-weight:400;font-size:13px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:.4rem 0}
th,td{padding:.1rem .6rem;white-space:nowrap;text-align:right;font-weight:400;
border-bottom:1px solid var(--line)}
th{color:var(--quiet)} th:first-child,td:first-child{text-align:left} tr.judged td{font-weight:600}
summary{cursor:pointer;color:var(--quiet);font-size:13px} p{margin:.3rem 0} li{margin:.3rem 0}
h1,h3,p,li{overflow-wrap:anywhere} .wide{overflow-x:auto}
svg{display:block;width:100%;min-width:560px;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--quiet)}
.kept{fill:var(--kept)} .subnormal{fill:var(--subnormal)} .saturated{fill:var(--saturated)}
.flushed{fill:var(--flushed)} .axis{stroke:var(--line)} .range{stroke:var(--quiet)}
.judged.range{stroke:var(--kept)} .moved{fill:none;stroke:var(--quiet);stroke-dasharray:4 3}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
.key.kept{background:var(--kept)} .key.subnormal{background:var(--subnormal)}
.key.saturated{background:var(--saturated)} .key.flushed{background:var(--flushed)}
"""


def page(rows: Sequence[Row], sentences: Sequence[str], about: str = "") -> str:
    """An HTML document about `rows`, in their order, below `sentences` on what to do.

    Tables and pictures that a phone has no room for scroll in place. The same rows give the same
    text, to the byte.

    Args:
        about: a line below the title, on what was watched.
    """
    scale = _Scale.around(rows)
    faulty = [row for row in rows if row.fault]
    sound = [row for row in rows if not row.fault]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Where the values are</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        "<h1>Where the values are, and which formats hold them</h1>",
        *([f'<p class="quiet">{escaped(about)}</p>'] if about else []),
        *_advice(sentences),
        *_summary(rows),
        *_legend(),
        *(_block(row, scale) for row in faulty[:SHOWN]),
        *_folded(f"{len(faulty[SHOWN:])} more with losses", faulty[SHOWN:], scale),
        *_folded(f"{len(sound)} that fit", sound, scale),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


class _Scale:
    """Where a binade is on the x axis, one for the whole page."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    @classmethod
    def around(cls, rows: Sequence[Row]) -> _Scale:
        """All values, the range of FP16, and ranges where a proposed exponent puts them.

        What lies outside 2^-44 to 2^40 heaps up at the edge.
        """
        ends = [-26, 18]
        for row in rows:
            ends += [end for binade in row.binades.histogram for end in (binade, binade + 1)]
            ends += _moved(row)
        return cls(max(math.floor(min(ends)), -44), min(math.ceil(max(ends)), 40))

    def __call__(self, exponent: float) -> float:
        inside = min(max(exponent, self.low), self.high)
        return LEFT + (inside - self.low) / (self.high - self.low) * (WIDTH - LEFT - 8)


def _advice(sentences: Sequence[str]) -> Iterator[str]:
    yield "<h2>What to do</h2>"
    if not sentences:
        yield (
            f"<p>Nothing: no tensor has more than {percent(MAX_SATURATED)} of its values above its "
            f"format's largest, or more than {percent(MAX_FLUSHED)} that become 0 in it.</p>"
        )
    items = [f"<li>{escaped(sentence)}</li>" for sentence in sentences]
    if items:
        yield "<ol>" + "\n".join(items[:SHOWN]) + "</ol>"
    if items[SHOWN:]:
        rest = "\n".join(items[SHOWN:])
        yield f"<details><summary>{len(items[SHOWN:])} more</summary>\n"
        yield f'<ol start="{SHOWN + 1}">{rest}</ol></details>'


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    """For each format, how many of the tensors it would hold."""
    yield '<h2>All tensors in each format</h2>\n<div class="wide"><table>'
    yield "<tr><th>format</th><th>fit as they are</th><th>fit at another exponent</th>"
    yield "<th>fit at none</th></tr>"
    for format in formats.ALL:
        windows = [row.binades.window(format) for row in rows]
        fit = sum(window is None or 0 in window for window in windows)
        never = sum(window is not None and window.low > window.high for window in windows)
        cells = (format.name, fit, len(rows) - fit - never, never)
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


def _legend() -> Iterator[str]:
    keys = ("kept", "subnormal", "saturated", "flushed")
    words = ("kept", "kept with fewer digits", "above the largest", "become 0")
    yield "<h2>Each tensor, worst first</h2>"
    yield (
        '<p class="quiet">Bars: the share of values in each binade, on a logarithmic scale from '
        "one in a million up. Colours: what the format in blue below does with them. "
        "Dashed: its range at the exponent proposed. FP32 and BF16 hold all that is shown.</p>"
    )
    yield (
        '<p class="quiet">'
        + "".join(
            f'<span class="key {key}"></span>{word}' for key, word in zip(keys, words, strict=True)
        )
        + "</p>"
    )


def _folded(title: str, rows: Sequence[Row], scale: _Scale) -> Iterator[str]:
    if rows:
        yield f"<details><summary>{title}</summary>"
        yield from (_block(row, scale) for row in rows)
        yield "</details>"


def _block(row: Row, scale: _Scale) -> str:
    at = f" at exponent {signed(row.exponent)}" if row.exponent else ""
    judged = f", judged as {row.format.name}{at}" if row.format else ""
    shared = f", shared with {', '.join(row.also)}" if row.also else ""
    about = f"{row.kind}, {'+'.join(row.dtypes)}{judged}{shared}"
    fault = [f"<p>{escaped(row.fault)}</p>"] if row.fault else []
    opened = " open" if row.fault else ""
    return "\n".join(
        [
            f"<section>\n<h3>{escaped(row.name)} <small>{escaped(about)}</small></h3>",
            *fault,
            _strip(row, scale),
            f"<details{opened}><summary>{_counted(row.binades)}</summary>",
            *_rates(row),
            "</details>\n</section>",
        ]
    )


def _counted(binades: Binades) -> str:
    parts = [f"{binades.values} values", f"{percent(binades.zeros / binades.values)} zeros"]
    parts += [f"{binades.infs} inf"] * bool(binades.infs)
    parts += [f"{binades.nans} NaN"] * bool(binades.nans)
    return ", ".join(parts)


def _rates(row: Row) -> Iterator[str]:
    """What every format loses, as it is and at its best exponent."""
    losses = "<th>above</th><th>subnormal</th><th>to zero</th>"
    yield '<div class="wide"><table>\n<tr><th></th><th colspan="3">as it is</th>'
    yield '<th colspan="4">at the best exponent</th><th></th></tr>'
    yield f"<tr><th>format</th>{losses}<th>exponent</th>{losses}<th>all that fit</th></tr>"
    for format in formats.ALL:
        window = row.binades.window(format)
        now = row.exponent if format == row.format else 0
        best = row.best(format)
        plain, mended = row.binades.rates(format, now), row.binades.rates(format, best)
        cells = [format.name, *map(percent, plain), signed(best), *map(percent, mended)]
        fit = "all" if window is None else f"{signed(window.low)} to {signed(window.high)}"
        cells.append("none" if window is not None and window.low > window.high else fit)
        marked = ' class="judged"' if format == row.format else ""
        yield f"<tr{marked}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


def _strip(row: Row, scale: _Scale) -> str:
    parts = [
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escaped(row.name)}">',
        *_axis(scale),
        *_bars(row, scale),
    ]
    for place, format in enumerate((E4M3, E5M2, FP16)):
        y, shift = BASE + 22 + place * LINE, row.exponent if format == row.format else 0
        parts.extend(_range(format, y, scale, shift, judged=format == row.format))
    start, end = map(scale, _moved(row) or (0.0, 0.0))
    if start < end:
        parts.append(
            f'<rect class="moved" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
            f'height="{BASE - TOP}"/>'
        )
    return "\n".join([*parts, "</svg></div>"])


def _moved(row: Row) -> list[float]:
    """The ends of the values that the format holds at the proposed exponent, as powers of two."""
    if row.fix is None or row.format is None:
        return []
    ends = (row.format.smallest_subnormal, row.format.max)
    return [math.log2(end) - row.fix for end in ends]


def _axis(scale: _Scale) -> Iterator[str]:
    yield f'<path class="axis" d="M{LEFT} {BASE}H{WIDTH - 8}"/>'
    for exponent in range(-40, 41, 8):
        if scale.low <= exponent <= scale.high:
            x = scale(exponent)
            yield f'<path class="axis" d="M{x:.1f} {BASE}v3"/>'
            yield (
                f'<text x="{x:.1f}" y="{BASE + 13}" text-anchor="middle">2'
                f'<tspan dy="-4" font-size="8">{exponent}</tspan></text>'
            )


def _bars(row: Row, scale: _Scale) -> Iterator[str]:
    heaps: dict[tuple[int, str], int] = {}
    for binade, number in row.binades.histogram.items():
        place = min(max(binade, scale.low), scale.high - 1)
        heap = (place, _fate(binade + row.exponent, row.format))
        heaps[heap] = heaps.get(heap, 0) + number
    for (place, fate), number in heaps.items():
        share = number / row.binades.values
        height = (BASE - TOP) * max(0.02, 1 - math.log10(share) / math.log10(LOWEST_SHARE))
        x, width = scale(place) + 0.5, scale(place + 1) - scale(place) - 1
        yield (
            f'<rect class="{fate}" x="{x:.1f}" y="{BASE - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"><title>2^{place}: {percent(share)}</title></rect>'
        )


def _fate(binade: int, format: Format | None) -> str:
    """What becomes of most values of a binade."""
    if format is None:
        return "kept"
    if 2.0**binade > format.max:
        return "saturated"
    if 2.0**binade < format.smallest_subnormal / 2:
        return "flushed"
    return "subnormal" if 2.0**binade < format.smallest_normal else "kept"


def _range(format: Format, y: int, scale: _Scale, exponent: int, *, judged: bool) -> Iterator[str]:
    kind = "judged range" if judged else "range"
    low, normal, high = (
        scale(math.log2(value) - exponent)
        for value in (format.smallest_subnormal, format.smallest_normal, format.max)
    )
    yield f'<text x="0" y="{y + 4}">{format.name}</text>'
    yield f'<path class="{kind}" stroke-width="1.5" d="M{low:.1f} {y}H{normal:.1f}"/>'
    yield f'<path class="{kind}" stroke-width="5" d="M{normal:.1f} {y}H{high:.1f}"/>'
