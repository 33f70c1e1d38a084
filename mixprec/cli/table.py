"""Plain text tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mixprec.text_table import aligned

__all__ = ["table"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` with aligned columns: the first and the last to the left, those between to the right.

    >>> from mixprec.cli.table import table
    >>> print(table([("", "bits", ""), ("fp16", "16", "half")]))
          bits
    fp16    16  half
    """
    return aligned(rows, right=range(1, len(rows[0]) - 1))
