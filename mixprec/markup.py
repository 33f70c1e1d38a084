"""Text in XML and HTML, whatever is in it.

A name may hold anything, and XML has no way to write most control characters, escaped or not: one
of them, and no viewer shows the picture. They are shown as Python writes them.
"""

from __future__ import annotations

import re
from html import escape

__all__ = ["escaped"]

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escaped(text: str) -> str:
    r"""The text as it may stand between tags and in an attribute.

    >>> print(escaped("a < b\x00"))
    a &lt; b\x00
    """
    return escape(_NO_XML.sub(lambda found: ascii(found.group())[1:-1], text))
