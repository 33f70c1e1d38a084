"""Plain text tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` with aligned columns: the first and the last to the left, those between to the right.

    >>> from mixprec.cli.table import table
    >>> print(table([("", "bits", ""), ("fp16", "16", "half")]))
          bits
    fp16    16  half
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line[0], line[-1] = row[0].ljust(widths[0]), row[-1].ljust(widths[-1])
    return "\n".join("  ".join(line).rstrip() for line in lines)
