"""Sphinx settings: `sphinx-build -W -b html docs docs/_build`.

The pages are plain Markdown, to be read in the repository too. So the site's navigation is no
directive in a page: it is the order of the links in index.md.
"""

from __future__ import annotations

import re
from importlib.metadata import version as version_of

from sphinx.application import Sphinx

project = "mixprec"
author = "the mixprec authors"
version = release = version_of(project)
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
# Links to headings, by the names that GitHub gives them.
myst_heading_anchors = 3


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "index":
        pages = dict.fromkeys(re.findall(r"\]\(([\w/-]+)\.md\)", source[0]))
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", "", *pages, "```", ""])


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
