"""`mixprec umup`: wrong arguments get sentences, roles can be given, what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixprec.cli import main

MODELS = """
from torch import nn
from mixprec import umup
number = 3
plain = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False))
unit = nn.Sequential(umup.layers.Linear(64, 64), umup.layers.LinearReadout(64, 8))
def needs(width):
    return unit
def makes_text():
    return "text"
def fails():
    raise KeyError("width")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "number in {file} gave a int; it must be an nn.Module, or a function without"),
        ("makes_text", "makes_text in {file} gave a str; it must be an nn.Module"),
        ("needs", "needs() in {file} raised TypeError: needs() missing 1 required positional"),
        ("fails", "fails() in {file} raised KeyError: 'width'"),
        ("nothing", "{file} has no 'nothing'; its models are: plain, unit"),
        ("plain", "0.weight has no role"),
    ],
)
def test_what_is_no_model_gets_a_sentence(
    name: str, message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["umup", "table", f"{file}:{name}"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("mixprec umup: " + message.format(file=file))
    assert captured.out == "" and captured.err.count("\n") == 1


def test_a_missing_file_and_a_missing_name_are_told_apart(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.py"
    assert main(["umup", "table", f"{missing}:model"]) == 1
    assert f"there is no file '{missing}'" in capsys.readouterr().err
    assert main(["umup", "table", "models.py"]) == 1
    assert "'models.py' names no model; write it as FILE.py:NAME, models.py:model" in (
        capsys.readouterr().err
    )
    file.write_text("import nothing_of_this_name")
    assert main(["umup", "table", f"{file}:model"]) == 1
    assert f"{file} raised ModuleNotFoundError: No module named" in capsys.readouterr().err


def test_roles_are_given_where_modules_say_none(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = ["--roles", "0.weight=hidden", "1.*=output"]
    assert main(["umup", "table", f"{file}:plain", "--format", "json", *roles]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["role"] for row in rows] == ["hidden", "output"]
    for wrong in ("0.weight", "0.weight=best", "=hidden"):
        with pytest.raises(SystemExit, match="2"):
            main(["umup", "table", f"{file}:plain", "--roles", wrong])
        message = capsys.readouterr().err
        assert f"{wrong!r} is no PATTERN=ROLE" in message and "roles are bias, embedding" in message


def test_the_part_that_an_optimizer_leaves_out_is_said(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["umup", "table", f"{file}:unit", "--optimizer", "Muon"]) == 0
    captured = capsys.readouterr()
    assert "0.weight" in captured.out and "1.weight" not in captured.out
    assert captured.err == (
        "\nMuon trains hidden matrices only: 3 of 4 parameters are not listed. See theirs with the "
        "optimizer that trains them, --optimizer AdamW.\n"
    )
    assert main(["umup", "table", f"{file}:unit"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and " eps" in captured.out
