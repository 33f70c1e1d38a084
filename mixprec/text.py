"""Plain text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Container, Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> str:
    """A line for each of `rows`, two spaces between columns; those in `right` end together.

    >>> print(aligned([("", "bits", ""), ("fp16", "16", "half")], right={1}))
          bits
    fp16    16  half
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if place in right else str.ljust for place in range(len(widths))]
    lines = (
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
