from __future__ import annotations

import importlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixprec
from mixprec import formats
from mixprec.cli import main
from mixprec.cli.formats import _neighbour
from mixprec.formats import Format


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["formats", *arguments]) == 0
    return capsys.readouterr().out


def cells(page: str) -> dict[str, list[str]]:
    """The words after each format's name."""
    rows = [line.split() for line in page.splitlines() if line]
    names = [format.name for format in formats.ALL]
    return {row[0]: row[1:] for row in rows if row[0] in names}


def test_without_a_value_the_table_has_the_figures_of_every_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = cells(output(capsys))
    for format in formats.ALL:
        bits, exponent, mantissa, *figures = table[format.name]
        assert int(bits) == format.bits == 1 + int(exponent) + int(mantissa)
        expected = [
            format.max,
            format.smallest_normal,
            format.smallest_subnormal,
            format.epsilon,
        ]
        # Nine digits are printed.
        assert [float(x) for x in figures] == pytest.approx(expected, rel=1e-8)


def test_the_docs_show_the_table_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    assert output(capsys) in page.read_text()


def test_a_value_is_shown_with_error_and_neighbours_in_every_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert output(capsys, "0.1") == (
        "0.1, held in FP32 and rounded to nearest even:\n"
        "\n"
        "           becomes  relative error    next below   next above\n"
        "fp32   0.100000001         1.5e-08   0.099999994  0.100000009\n"
        "bf16   0.100097656         0.00098   0.099609375  0.100585938\n"
        "fp16  0.0999755859         0.00024  0.0999145508  0.100036621\n"
        "e4m3     0.1015625           0.016       0.09375     0.109375\n"
        "e5m2       0.09375           0.063      0.078125     0.109375\n"
    )


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        ("1e5", "fp16", "inf inf 65504 none overflow; a saturating cast gives 65504"),
        ("-1e5", "fp16", "-inf inf none -65504 overflow; a saturating cast gives -65504"),
        ("1e5", "e4m3", "448 1 416 none overflow; there is no inf, so it saturates"),
        ("inf", "bf16", "inf exact 3.38953139e+38 none"),
        ("-inf", "e4m3", "-448 inf none -416 overflow; there is no inf, so it saturates"),
        ("-1e-8", "fp16", "-0 1 -5.96046448e-08 5.96046448e-08 underflow"),
        ("0x1.8p-24", "fp16", "1.1920929e-07 0.33 5.96046448e-08 1.78813934e-07 subnormal"),
        ("nan", "e4m3", "nan none none"),
        ("1", "bf16", "1 exact 0.99609375 1.0078125"),
        ("-0.0", "e5m2", "-0 exact -1.52587891e-05 1.52587891e-05"),
    ],
)
def test_what_happens_at_the_ends_of_a_format_is_said(
    value: str, name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert " ".join(cells(output(capsys, value))[name]) == expected


@pytest.mark.parametrize("format", formats.ALL[1:], ids=str)
def test_the_neighbours_of_every_value_are_those_in_the_sorted_list(format: Format) -> None:
    integers = torch.int8 if format.bits == 8 else torch.int16
    half = 2 ** (format.bits - 1)
    values = torch.arange(-half, half, dtype=integers).view(format.dtype).double()
    ordered = values[~values.isnan()].unique().tolist()
    # 65,536 Python calls take seconds: all 8-bit values, and every 97th of a larger format.
    step = 1 if format.bits == 8 else 97
    for i in range(1, len(ordered) - 1, step):
        assert _neighbour(ordered[i], format, -1) == ordered[i - 1]
        assert _neighbour(ordered[i], format, +1) == ordered[i + 1]
    assert math.isnan(_neighbour(ordered[0], format, -1))
    assert math.isnan(_neighbour(ordered[-1], format, +1))


def test_a_value_that_is_no_number_is_refused_with_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in ("abc", "0x1.8q3"):
        with pytest.raises(SystemExit, match="2"):
            main(["formats", text])
        message = capsys.readouterr().err
        assert f"{text!r} is not a number; write it as 0.1, -1e-8, inf or 0x1.8p-3" in message


# The command itself


def test_without_a_command_the_help_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in ("demo", "doctor", "formats"))


def test_an_unknown_command_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["format"])
    assert "invalid choice: 'format'" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"mixprec {mixprec.__version__}\n"


@pytest.mark.parametrize("module", ["mixprec", "mixprec.cli"])
def test_the_module_runs_as_a_program(module: str) -> None:
    command = [sys.executable, "-m", module, "formats", "-1e-9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("-1e-09, held in FP32")


def test_a_reader_that_has_read_enough_ends_a_command_quietly() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "mixprec", "formats"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + 13, "")


def test_a_command_that_is_interrupted_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("mixprec.cli.formats"), "run", interrupted)
    assert main(["formats"]) == 130


def test_what_an_encoding_lacks_is_written_as_a_question_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    def print_braille(args: object) -> int:
        print("\u28ff")
        return 0

    monkeypatch.setattr(importlib.import_module("mixprec.cli.formats"), "run", print_braille)
    assert main(["formats"]) == 0
    assert written.getvalue().strip() == b"?"
