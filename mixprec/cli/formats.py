"""`mixprec formats [VALUE]`: the formats as a table, or what each of them makes of one number."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

import torch

from mixprec import formats
from mixprec.cli.table import table
from mixprec.formats import Format

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "value",
        nargs="?",
        type=_number,
        metavar="VALUE",
        help="a number such as 0.1, -1e-8, inf or 0x1.8p-3",
    )
    # argparse takes -1 and -0.5 for numbers, but -1e-8 and -inf for options.
    parser._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")


def run(args: argparse.Namespace) -> int:
    print(_ranges() if args.value is None else _roundings(args.value))
    return 0


def _number(text: str) -> float:
    try:
        return float.fromhex(text) if "x" in text.lower() else float(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; write it as 0.1, -1e-8, inf or 0x1.8p-3"
        ) from None


def _ranges() -> str:
    header = ("", "bits", "exponent", "mantissa", "max", "smallest normal", "subnormal", "epsilon")
    rows = [
        (
            format.name,
            *(str(n) for n in (format.bits, format.exponent_bits, format.mantissa_bits)),
            *map(_digits, (format.max, format.smallest_normal, format.smallest_subnormal)),
            _digits(format.epsilon),
        )
        for format in formats.ALL
    ]
    return table([header, *rows])


def _roundings(value: float) -> str:
    header = ("", "becomes", "relative error", "next below", "next above", "")
    rows = [_rounding(value, format) for format in formats.ALL]
    return f"{value!r}, held in FP32 and rounded to nearest even:\n\n{table([header, *rows])}"


def _rounding(value: float, format: Format) -> Sequence[str]:
    rounded = formats.round_to(torch.tensor(value, dtype=torch.float32), format).item()
    around = (_neighbour(rounded, format, step) for step in (-1, 1))
    return (
        format.name,
        _digits(rounded),
        _relative_error(value, rounded),
        *("none" if math.isnan(x) else _digits(x) for x in around),
        _remark(value, rounded, format),
    )


def _relative_error(value: float, rounded: float) -> str:
    if math.isnan(value):
        return ""
    if rounded == value:
        return "exact"
    return "inf" if math.isinf(rounded - value) else f"{abs(rounded - value) / abs(value):.2g}"


def _remark(value: float, rounded: float, format: Format) -> str:
    if math.isinf(rounded) and math.isfinite(value):
        return f"overflow; a saturating cast gives {_digits(math.copysign(format.max, value))}"
    if abs(value) > format.max and not format.has_inf:
        return "overflow; there is no inf, so it saturates"
    if rounded == 0 and value != 0:
        return "underflow"
    return "subnormal" if 0 < abs(rounded) < format.smallest_normal else ""


def _neighbour(value: float, format: Format, step: int) -> float:
    """The value of `format` one step up or down from one of its values; NaN where there is none."""
    if math.isnan(value):
        return math.nan
    integers = {8: torch.int8, 16: torch.int16, 32: torch.int32}[format.bits]
    bits = int(torch.tensor(value).to(format.dtype).view(integers).item())
    # Codes count magnitudes upwards from either zero. Signed, they are in the order of the values.
    sign = 2 ** (format.bits - 1)
    place = (bits if bits >= 0 else -(bits + sign)) + step
    code = place if place >= 0 else -place - sign
    return float(torch.tensor(code, dtype=integers).view(format.dtype).item())


def _digits(value: float) -> str:
    """`value` with the nine digits that tell any two FP32 values apart."""
    return f"{value:.9g}"
