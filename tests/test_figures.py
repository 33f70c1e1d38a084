"""Measured figures on the pages are what the result files of the benchmarks give."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mixprec.float8.weight import CachedWeight

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks"


def load(name: str) -> ModuleType:
    """A script of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


tables: Any = load("tables")
record: Any = load("record")
FILES = sorted((BENCHMARKS / "results").glob("*.json"))
IDS = [str(page.relative_to(ROOT)) for page in tables.PAGES]


@pytest.mark.parametrize("page", tables.PAGES, ids=IDS)
def test_page_says_what_the_files_give(page: Path) -> None:
    assert tables.rendered(page) == page.read_text("utf-8"), (
        "run `python docs/benchmarks/tables.py --write`"
    )


def test_every_figure_stands_on_one_page() -> None:
    text = "\n".join(page.read_text("utf-8") for page in tables.PAGES)
    names = [match["name"] for match in tables.MARKS.finditer(text)]
    assert sorted(names) == sorted(tables.FIGURES)
    assert text.count("<!-- figures:") == text.count("<!-- end -->") == len(names)


def test_every_result_file_is_used_and_there() -> None:
    tables.READ.clear()
    for figure in tables.FIGURES.values():
        figure()
    assert tables.READ == {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_result_says_when_where_and_by_what_it_was_measured(path: Path) -> None:
    seen: set[str] = set()
    for run in json.loads(path.read_text("utf-8")):
        assert date(2026, 1, 1) < date.fromisoformat(run["date"])
        assert run["hardware"] and re.fullmatch(r"2\.\d+\.\d+\+\w+", run["versions"]["torch"])
        script = re.search(r"docs/benchmarks/\w+\.py", run["command"])
        assert script and (ROOT / script[0]).exists()
        assert run["numbers"] and not seen & run["numbers"].keys(), "a number has two sources"
        seen |= run["numbers"].keys()


# ------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("recipe", ["static", "adaptive"])
def test_timed_pass_casts_a_weight_after_a_step_and_not_in_later_micro_batches(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)  # for its neighbour record.py
    benchmark: Any = load("float8_gpu")
    casts: list[Any] = []
    note = CachedWeight.note
    monkeypatch.setattr(
        CachedWeight, "note", lambda self, *given: (casts.append(self), note(self, *given))[1]
    )
    layer = benchmark.Layer(64, 32, 48)
    model = layer.ours(recipe)
    first, later = layer.step(model), layer.step(model, changed=False)
    for work, expected in ((first, 1), (later, 0), (later, 0), (first, 1), (later, 0)):
        casts.clear()
        work()
        assert len(casts) == expected


# ------------------------------------------------------------------ how tables are made


def test_least_time_is_bold_whoever_has_it() -> None:
    cells = tables.times_faster(
        {"bf16": 2.0, "ours": 4.0, "peer": 1.0}, ("bf16", "ours", "peer"), "bf16"
    )
    assert cells == ["2.00", "4.00, 0.50x", "**1.00**, 2.00x"]
    cells = tables.times_faster({"bf16": 2.0, "ours": 4.0}, ("bf16", "ours", "peer"), "bf16")
    assert cells == ["**2.00**", "4.00, 0.50x", ""]


def test_figures_keep_their_digits() -> None:
    assert [tables.digits(x) for x in (0.3701, 5.0, 38.36, 159.27, 8016.0)] == [
        *("0.370", "5.00", "38.4", "159", "8016")
    ]
    assert tables.among([2.0, 1.0]) == "1.00 to 2.00" and tables.among([2.0, 2.0]) == "2.00"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "FIGURES", {"one": lambda: "| 1 |", "two": lambda: "2 ms"})
    return tmp_path / "page.md"


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(page: Path) -> None:
    page.write_text(
        "a <!-- figures: two -->3 ms<!-- end --> b\n<!-- figures: one -->\n<!-- end -->\n"
    )
    made = tables.rendered(page)
    assert made == (
        "a <!-- figures: two -->2 ms<!-- end --> b\n"
        "<!-- figures: one -->\n\n| 1 |\n\n<!-- end -->\n"
    )
    page.write_text(made)
    assert tables.rendered(page) == made


def test_table_of_an_item_is_indented_like_it(page: Path) -> None:
    page.write_text("- a\n\n  <!-- figures: one -->\n  <!-- end -->\n")
    assert tables.rendered(page) == (
        "- a\n\n  <!-- figures: one -->\n\n  | 1 |\n\n  <!-- end -->\n"
    )


# ------------------------------------------------------------------ how files are made


def test_run_that_is_added_takes_the_place_of_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results" / "file.json"
    monkeypatch.setattr(
        sys, "argv", ["dir/script.py", "--only", "a b", "--out", str(path), "--add"]
    )
    record.save(path, {"a": 1, "b": 2})
    record.save(path, {"b": 3}, onto=record.runs_of(path))
    first, second = json.loads(path.read_text())
    assert first["numbers"] == {"a": 1} and second["numbers"] == {"b": 3}
    assert second["command"] == "python docs/benchmarks/script.py --only 'a b'"
    record.save(path, {"a": 4, "b": 5}, onto=record.runs_of(path))
    (only,) = json.loads(path.read_text())
    assert only["numbers"] == {"a": 4, "b": 5}
    assert only["date"] == date.today().isoformat() and only["hardware"]


def test_script_that_was_asked_for_no_file_writes_none() -> None:
    record.save(None, {"a": 1})
    assert record.runs_of(None) == []
