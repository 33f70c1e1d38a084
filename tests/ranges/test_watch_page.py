"""The report is one document: whole, escaped, the same to the byte, and true to its rows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import mixprec
from mixprec import formats
from mixprec.binades import BINS, Binades, count
from mixprec.ranges.page import SHOWN, page
from mixprec.ranges.rows import Judge, Row, advice
from mixprec.ranges.watch import Watch

VOID = {"meta"}


class Outline(HTMLParser):
    """Elements in order, what is written in each kind, and whether all that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.opened, f"left open: {self.opened}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.opened and self.opened.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.opened[-1] if self.opened else "", []).append(data.strip())


def row(
    layer: str, size: float = 1.0, role: str = "input", format: formats.Format | None = formats.E4M3
) -> Row:
    counts = torch.zeros(BINS, dtype=torch.int64)
    count(size * torch.randn(4096, generator=torch.Generator().manual_seed(0)), counts)
    return Row(layer, "Linear", role, ("float32",), Judge(format), Binades(counts.tolist()))


def report() -> Watch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    with mixprec.watch(model) as watched:
        model(1000 * torch.randn(256, 64)).sum().backward()
    return watched


def test_a_page_holds_sentences_a_summary_and_a_strip_a_tensor() -> None:
    rows = [row("a.down", 300.0), row("b", 1e-6), row("c"), row("d", role="weight")]
    outline = Outline(page(rows, advice(rows)))
    assert outline.texts["h2"] == [
        "What to do",
        "All tensors in each format",
        "Each tensor, worst first",
    ]
    assert outline.texts["li"] == [f"{r.name}: {r.fault}" for r in rows[:2]]
    assert outline.texts["h3"] == [r.name for r in rows]
    assert outline.tags.count("svg") == outline.tags.count("section") == 4
    assert outline.tags.count("table") == 1 + 4
    # Open where there is a loss, folded elsewhere; the sound ones share a fold of their own.
    assert outline.tags.count("details") == 4 + 1
    assert outline.attributes.count(("open", "")) == 2
    assert "2 that fit" in outline.texts["summary"]


def test_the_summary_counts_tensors_by_what_helps_them() -> None:
    counts = torch.zeros(BINS, dtype=torch.int64)
    count(2.0 ** torch.linspace(-60, 60, 1000), counts)
    wide = Row("wide", "Linear", "input", ("float32",), Judge(None), Binades(counts.tolist()))
    text = page([row("a", 300.0), row("b", 1e-6), row("c"), wide], [])
    cells = re.findall(r"<tr><td>(\w+)</td><td>(\d)</td><td>(\d)</td><td>(\d)</td></tr>", text)
    # In E5M2 300 fits, and 1e-6 is less than half of the smallest value for nearly all.
    assert cells == [
        ("fp32", "4", "0", "0"),
        ("bf16", "4", "0", "0"),
        ("fp16", "3", "0", "1"),
        ("e4m3", "1", "2", "1"),
        ("e5m2", "2", "1", "1"),
    ]


def test_the_table_of_a_tensor_has_every_formats_losses_before_and_after() -> None:
    r = row("a", 300.0)
    text = page([r], [])
    (line,) = re.findall(r'<tr class="judged">(.*?)</tr>', text)
    cells = re.findall(r"<td>(.*?)</td>", line)
    assert r.fix is not None and r.window is not None
    losses = [f"{100 * share:.2g} %" if share else "0" for share in r.binades.rates(formats.E4M3)]
    assert cells[:4] == ["e4m3", "13 %", *losses[1:]]
    assert cells[4] == "-4" and cells[5] == "0" and cells[-1] == "-14 to -2"
    assert text.count("<td>fp16</td>") == 2  # in the summary and in the table


def test_names_are_escaped_everywhere() -> None:
    evil = "<script>alert('&\"')</script>"
    rows = [row(evil, 300.0), row(evil, role="weight")]
    text = page(rows, advice(rows))
    assert "<script" not in text and "alert(&#x27;&amp;&quot;&#x27;)" in text
    outline = Outline(text)
    assert "script" not in outline.tags
    assert outline.texts["h3"] == [f"{evil} input", f"{evil} weight"]


def test_a_name_with_control_characters_leaves_the_pictures_well_formed() -> None:
    odd = row("a\x00b\x1bc\ud800", 300.0)
    outline = Outline(page([odd], advice([odd])))
    assert outline.texts["h3"] == ["a\\x00b\\x1bc\\ud800 input"]
    (picture,) = re.findall(r"<svg.*?</svg>", page([odd], []), re.DOTALL)
    assert ElementTree.fromstring(picture).attrib["aria-label"] == "a\\x00b\\x1bc\\ud800 input"


def test_the_page_refers_to_nothing_outside_and_runs_nothing() -> None:
    text = report().html()
    outline = Outline(text)
    assert not {"script", "link", "img", "iframe", "object", "a", "use", "image"} & set(
        outline.tags
    )
    assert not {"src", "href", "xlink:href", "style"} & {name for name, _ in outline.attributes}
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert text.startswith("<!DOCTYPE html>\n") and text.endswith("</html>\n")


def test_every_picture_is_well_formed_and_stays_within_its_frame() -> None:
    rows = [row("tiny", 1e-30), row("huge", 1e30), row("one", 300.0)]
    pictures = re.findall(r"<svg.*?</svg>", page(rows, []), re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        bars = [r for r in root.iter("rect") if r.attrib["class"] != "moved"]
        assert bars
        for rect in root.iter("rect"):
            x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert 0 <= x and x + w <= width and 0 <= y and y + h <= height and w > 0 and h > 0
        shares = [bar.findtext("title") for bar in bars]
        assert all(shares)


def test_bars_are_coloured_by_what_becomes_of_them() -> None:
    def classes(r: Row) -> list[str]:
        return re.findall(r'<rect class="(\w+)"', page([r], []))

    assert set(classes(row("a", 3e3))) == {"kept", "saturated", "moved"}
    assert set(classes(row("a", 2.0**-30))) == {"flushed", "moved"}
    assert {"kept", "subnormal", "flushed"} == set(classes(row("a", 2.0**-4)))
    assert set(classes(row("a", 2.0**-30, format=None))) == {"kept"}


def test_the_same_rows_make_the_same_bytes() -> None:
    assert report().html() == report().html()


def test_nothing_to_do_is_said() -> None:
    outline = Outline(page([row("a")], []))
    assert outline.texts["p"][0].startswith("Nothing: no tensor has more than 0.01 % of its values")
    assert "li" not in outline.texts
    Outline(page([], []))


def test_a_large_model_is_folded_after_the_worst() -> None:
    rows = [row(f"layer{i}", 300.0) for i in range(SHOWN + 5)]
    outline = Outline(page(rows, advice(rows)))
    assert (
        outline.texts["summary"][:1] == ["5 more"]
        and "5 more with losses" in outline.texts["summary"]
    )
    assert outline.tags.count("svg") == len(outline.texts["li"]) == SHOWN + 5


@pytest.mark.parametrize("convert", [str, Path])
def test_save_writes_the_page(tmp_path: Path, convert: type[str] | type[Path]) -> None:
    watched = report()
    watched.save(convert(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text("utf-8") == watched.html()
    with pytest.raises(FileNotFoundError):
        watched.save(tmp_path / "missing" / "report.html")


def test_what_is_cast_already_is_drawn_as_it_is_cast() -> None:
    plain = row("a", 2.0**12)
    cast = Row("a", "Linear", "input", ("bfloat16",), Judge(formats.E4M3, -8), plain.binades)
    text = page([cast], [])
    assert '<rect class="saturated"' in page([plain], [])
    assert set(re.findall(r'<rect class="(\w+)"', text)) <= {"kept", "subnormal", "flushed"}
    (line,) = re.findall(r'<tr class="judged">(.*?)</tr>', text)
    cells = re.findall(r"<td>(.*?)</td>", line)
    assert cells[1] == "0" and cells[4] == "-8"  # nothing saturates, and the best is what is
    start = r'judged range" stroke-width="5" d="M([\d.]+)'
    (drawn,), (unmoved,) = re.findall(start, text), re.findall(start, page([plain], []))
    assert float(drawn) > float(unmoved)


def test_the_page_says_what_was_watched_and_when() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with mixprec.watch(model) as report:
        model(torch.ones(1, 4))
    about = re.findall(r'<p class="quiet">(Sequential.*?)</p>', report.html())
    (said,) = about
    assert re.fullmatch(
        rf"Sequential, 2 layers, watched from \d{{4}}-\d\d-\d\d \d\d:\d\d on with mixprec "
        rf"{re.escape(mixprec.__version__)} and torch {re.escape(torch.__version__)}",
        said,
    )
    assert report.html() == report.html()
    assert "<script>" not in page([], [], "<script>")


def test_what_a_phone_has_no_room_for_scrolls_in_place() -> None:
    text = page([row("a", 300.0)], [])
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in text
    assert ".wide{overflow-x:auto}" in text and "overflow-wrap:anywhere" in text
    for tag in ("table", "svg"):
        assert text.count(f"<{tag}") == text.count(f'<div class="wide"><{tag}') > 0
        assert text.count(f"</{tag}>") == text.count(f"</{tag}></div>")
