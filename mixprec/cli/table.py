"""Plain text tables for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mixprec.text import aligned

__all__ = ["table", "wrapped"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` with aligned columns: the first and the last to the left, those between to the right.

    >>> from mixprec.cli.table import table
    >>> print(table([("", "bits", ""), ("fp16", "16", "half")]))
          bits
    fp16    16  half
    """
    return aligned(rows, right=range(1, len(rows[0]) - 1))


def wrapped(text: str, width: int = 80) -> list[str]:
    """`text` in lines that a terminal of 80 columns does not break, least of all within a word.

    >>> wrapped("bf16 multiplies as fast", 15)
    ['bf16 multiplies', 'as fast']
    """
    return [
        line
        for each in text.splitlines()
        for line in textwrap.wrap(each, width, break_long_words=False, break_on_hyphens=False)
    ]
