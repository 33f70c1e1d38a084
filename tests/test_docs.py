"""The README and the docs hold what they say: code runs, output is as shown, links lead somewhere.

How a page is read. Its Python blocks run in order in one namespace, in an empty directory:

    ```python   runs; a `text` block right below it has to be what it printed (under the Python
                that is named, as in ```text python3.11, where it depends on that)
    ```pycon    runs, and every shown result is compared, as in a doctest
    ```console  each `mixprec ...` command has to parse; a `text` block right below it has to be
                what `mixprec formats` prints; others take minutes or speak of the machine
    ```diff    runs as it was and as it is, each without what stands above it on the page
    ```text and everything else is for reading

    <!-- test: x = stand_in() -->   runs before the block below; no reader sees it on the page
"""

from __future__ import annotations

import doctest
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from inspect import getdoc
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

import mixprec
from mixprec.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("benchmarks/*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


@dataclass(frozen=True)
class Block:
    """Code of a page and the line that it begins in, counted from 1."""

    language: str
    code: str
    line: int
    shows: str | None = None
    """What the `text` block right below says that this block prints."""


_BLOCK = re.compile(
    r"^<!-- test:[ ]*(?P<setup>.*?)-->"
    r"|^(?P<marks>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=marks)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page and its hidden test code (as language "setup"), in order."""
    matches = list(_BLOCK.finditer(text))
    for match, following in zip_longest(matches, matches[1:]):
        part = "code" if match["setup"] is None else "setup"
        line = text.count("\n", 0, match.start(part)) + 1
        shown = following if following and _is_output(following["language"] or "") else None
        below = shown and text[match.end() : shown.start()].isspace()
        yield Block(
            language=(match["language"] or "setup").strip(),
            code=match[part],
            line=line,
            shows=shown["code"] if shown and below else None,
        )


def prose(text: str) -> str:
    """The page without its code, line for line."""
    bare = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    return re.sub(r"`[^`\n]*`", "``", bare)


def _is_output(language: str) -> bool:
    """Whether a block is output to compare: `text`, or that of one Python, `text python3.11`."""
    kind, _, version = language.strip().partition(" python")
    return kind == "text" and version in ("", "{}.{}".format(*sys.version_info))


class Wrong(AssertionError):
    """What is wrong on a page, and where."""


def run(page: Path) -> None:
    """Run the page's Python; raises `Wrong`, with the line."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text("utf-8")):
        if block.language == "pycon":
            _run_session(page, block, namespace)
        elif block.language in ("python", "setup"):
            _run_code(page, block, namespace)
        elif block.language == "diff":
            for side in ("-", "+"):
                _run_code(page, replace(block, code=one_side(block.code, side)), {})


def one_side(diff: str, side: str) -> str:
    """The code before ("-") or after ("+") a change, line for line."""
    lines = diff.splitlines()
    return "\n".join(line[2:] if line[:1] in ("", " ", side) else "" for line in lines)


def _run_code(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    # Behind that many empty lines, tracebacks have the page's own line numbers.
    code = "\n" * (block.line - 1) + block.code
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
    except Exception as error:
        line = _line_of(error, page)
        text = page.read_text("utf-8").splitlines()[line - 1].strip()
        raise Wrong(f"{page}:{line}: {text}\n{type(error).__name__}: {error}") from error
    if block.shows is not None and printed.getvalue() and printed.getvalue() != block.shows:
        raise Wrong(f"{page}:{block.line}: prints\n{printed.getvalue()}and not\n{block.shows}")


def _line_of(error: Exception, page: Path) -> int:
    """The last line of the page that was reached."""
    if isinstance(error, SyntaxError) and error.filename == str(page):
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    return next(f.lineno or 1 for f in reversed(frames) if f.filename == str(page))


def _run_session(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, {}, page.name, str(page), block.line - 1)
    test.globs = namespace
    report = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(test, out=report.write, clear_globs=False)
    if report.getvalue():
        raise Wrong(report.getvalue())


def test_the_readme_has_no_code_that_its_reader_does_not_see() -> None:
    readme = list(blocks((ROOT / "README.md").read_text("utf-8")))
    assert "setup" not in {block.language for block in readme}
    for block in readme:
        if block.language == "python":
            with torch.random.fork_rng(devices=[]):
                _run_code(ROOT / "README.md", block, {"__name__": "__main__"})


@every_page
def test_what_the_page_prints_is_shown_below_and_compared(page: Path) -> None:
    text = page.read_text("utf-8")
    for block in blocks(re.sub(r"^```text python[\d.]+$", "```text", text, flags=re.MULTILINE)):
        prints = block.language == "python" and "print(" in block.code
        assert not prints or block.shows, f"{page}:{block.line}: prints what no page shows"


@every_page
def test_code_of_the_page_runs_and_prints_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run(page)


# ------------------------------------------------------------------ commands


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """The shell commands of a console block with their lines: what `$ ` begins, else every line."""
    lines = list(enumerate(block.code.splitlines(), block.line))
    prompted = [(line, text[2:]) for line, text in lines if text.startswith("$ ")]
    yield from prompted or lines


def parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the `mixprec` commands of the page's console blocks; raises `Wrong`, with the line."""
    for name in COMMANDS:
        monkeypatch.setattr(importlib.import_module(f"mixprec.cli.{name}"), "run", lambda _: 0)
    for block in blocks(page.read_text("utf-8")):
        for line, text in commands(block) if block.language == "console" else ():
            program, *arguments = shlex.split(text, comments=True) or [""]
            try:
                status = main(arguments) if program == "mixprec" else 0
            except SystemExit as stop:
                status = stop.code
            if status:
                raise Wrong(f"{page}:{line}: {text}: exit status {status}")


@every_page
def test_formats_prints_what_the_page_shows(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page.read_text("utf-8")):
        if block.language == "console" and block.shows is not None:
            ((line, command),) = commands(block)
            program, name, *arguments = shlex.split(command)
            if (program, name) == ("mixprec", "formats"):
                assert main([name, *arguments]) == 0
                assert capsys.readouterr().out == block.shows, f"{page}:{line}: {command}"


@every_page
def test_commands_of_the_page_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(page, monkeypatch)


# ------------------------------------------------------------------ links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and Sphinx give to the page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?) *$", _BLOCK.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def links(text: str) -> Iterator[tuple[int, str]]:
    """Targets of the page's links and pictures with their lines."""
    pattern = r"\]\(\s*([^)\s]+)[^)]*\)|^\[[^]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\""
    bare = prose(text)
    for match in re.finditer(pattern, bare, re.MULTILINE):
        yield bare.count("\n", 0, match.start()) + 1, next(filter(None, match.groups()))


def follow(page: Path) -> None:
    """Look up every link that stays in the project; raises `Wrong`, with the line."""
    text = page.read_text("utf-8")
    for line, link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            raise Wrong(f"{page}:{line}: {link}: there is no {target.name}")
        if anchor and target.suffix == ".md" and anchor not in anchors(target.read_text("utf-8")):
            raise Wrong(f"{page}:{line}: {link}: {target.name} has no such heading")


@every_page
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    follow(page)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """conf.py makes it of the links in index.md, and Sphinx refuses a page that is in none."""
    index = (DOCS / "index.md").read_text("utf-8")
    linked = {(DOCS / link).resolve() for _, link in links(index)}
    assert {page for page in PAGES if DOCS in page.parents} - linked == {DOCS / "index.md"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_test_command_builds_the_site() -> None:
    made = subprocess.run(
        ["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "-e '.[docs]'" in made or (ROOT / ".venv" / ".docs").exists()
    assert re.search(r"sphinx-build\b.* -W .* docs ", made)


# ------------------------------------------------------------------ what is said


@pytest.mark.parametrize("name", [name for name in mixprec.__all__ if name != "__version__"])
def test_public_name_has_a_docstring_and_is_on_a_page(name: str) -> None:
    assert getdoc(getattr(mixprec, name))
    pattern = re.compile(rf"\b(?:mixprec\.|from mixprec import [\w, ]*){name}\b")
    assert any(pattern.search(page.read_text("utf-8")) for page in PAGES)


@every_page
def test_page_names_no_path_of_one_machine(page: Path) -> None:
    pattern = re.compile(r"(?<![\w.>)])/(?:home|root|tmp|work|mnt|opt|var|Users)/|\b[A-Z]:\\")
    for line, text in enumerate(page.read_text("utf-8").splitlines(), 1):
        assert not pattern.search(text), f"{page}:{line}: {text}"


# ------------------------------------------------------------------ a page that is wrong is found


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("Title\n\n```python\nx = 1\nassert x == 2\n```\n", ":5: assert x == 2\nAssertionError"),
        ("```python\nx = 1\n```\n```python\ny = x\nx = (\n```\n", ":6: x = (\nSyntaxError"),
        ("<!-- test: x = 1 -->\n```python\nprint(x)\n```\n\n```text\n2\n```\n", ":3: prints\n1\n"),
        ("<!-- test:\nx = 1\n-->\n\n```python\nx / 0\n```\n", ":6: x / 0\nZeroDivisionError"),
        ("```python\nx = 1\n```\n\n```pycon\n>>> x\n2\n```\n", "line 6, in"),
        ("```python\nimport warnings\nwarnings.warn('no')\n```\n", ":3: warnings.warn"),
        ("```python\nx = 1\n```\n```diff\n- y = x\n+ y = 1\n```\n", ":5: - y = x\nNameError"),
        ("```diff\n  y = 0\n- y / 1\n+ y / y\n```\n", ":4: + y / y\nZeroDivisionError"),
    ],
)
def test_fault_in_code_is_found_with_its_line(text: str, where: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Wrong) as wrong:
        run(page)
    assert where in str(wrong.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("One [two](\nthree.md).\n", ":1: three.md: there is no three.md"),
        (
            "# A `b` c\n\n[x](#a-b-c)\n[y](page.md#b)\n",
            ":4: page.md#b: page.md has no such heading",
        ),
        ("![picture](demo.svg)\n", ":1: demo.svg: there is no demo.svg"),
    ],
)
def test_link_into_nothing_is_found_with_its_line(text: str, where: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Wrong) as wrong:
        follow(page)
    assert where in str(wrong.value)


def test_links_in_code_are_no_links(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`a[0](nothing.md)`\n\n```text\n[x](nothing.md)\n```\n[out](https://nowhere)\n")
    follow(page)


def test_command_that_does_not_parse_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ mixprec doctor\nmixprec 0\n$ mixprec formats ten\n```\n")
    with pytest.raises(Wrong, match=r"page\.md:4: mixprec formats ten: exit status 2"):
        parse(page, monkeypatch)
