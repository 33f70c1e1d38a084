"""What FP8 casts have lost: their counters as rows, as a table, and as sentences on what to do.

A cast multiplies by 2^exponent, rounds and saturates. It counts as it goes, five numbers for each
operand of each layer, which stay on the device until somebody asks:

    0  the largest |x|, before the multiplication, as its FP32 bit pattern
    1  saturated: finite values that the format's largest value had to stand in for
    2  flushed: values other than 0 that became 0
    3  values that were inf or NaN
    4  all values, zeros too

Rates follow by division. An exponent that would fix them follows from the largest value alone: the
highest at which that value stays one binade below the format's largest, because the next batch may
hold a larger one. Saturation is the costlier loss (a clipped outlier carries most of a tensor's
energy), so it is reported from 1e-4 on, and flushing, which loses the smallest values, from 5 %.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixprec.formats import Format

__all__ = [
    "HEADROOM",
    "MAX_FLUSHED",
    "MAX_SATURATED",
    "Counted",
    "Row",
    "Stats",
    "highest_exponent",
    "percent",
    "read",
    "row",
    "signed",
]

MAX_SATURATED = 1e-4
"""Share of saturated values from which a tensor is reported."""
MAX_FLUSHED = 0.05
"""Share of values turned into 0 from which a tensor is reported."""
HEADROOM = 1
"""Binades that a proposed exponent leaves free above the largest value seen."""
COUNTERS = 8
"""Length of a counters tensor; the last three are spare."""


class Counted(NamedTuple):
    """One operand of one layer, as the layer hands it out."""

    layer: str
    role: str
    """"input", "weight" or "grad_output"."""
    format: Format
    exponent: int | Tensor | None
    """The cast multiplies by 2^exponent: an int, an integer tensor of one element where it lives on
    the device, or None where each cast finds a factor of its own from the largest value."""
    counters: Tensor
    """int64 [8], on any device."""


@dataclass(frozen=True)
class Row:
    """What the casts of one operand have seen since its counters were last cleared."""

    layer: str
    role: str
    format: Format
    exponent: int | None
    """None where each cast finds a factor of its own."""
    values: int
    """How many values were cast."""
    saturated: float
    """Share of values that saturated; NaN where none was cast."""
    flushed: float
    """Share of values that were not 0 and became 0; NaN where none was cast."""
    nonfinite: int
    """How many values were inf or NaN."""
    amax: float
    """Largest |x| before the multiplication; inf or NaN once such a value was seen."""

    @property
    def log2_amax(self) -> float:
        """-inf where all values were 0."""
        return math.log2(self.amax) if self.amax > 0 else self.amax if self.amax else -math.inf

    @property
    def saturates(self) -> bool:
        return self.saturated > MAX_SATURATED

    @property
    def flushes(self) -> bool:
        return self.flushed > MAX_FLUSHED

    @property
    def fix(self) -> int | None:
        """The exponent that would mend this row; None if nothing is wrong, or no exponent would."""
        highest = highest_exponent(self.amax, self.format)
        if self.exponent is None or highest is None or self.saturates == self.flushes:
            return None
        return highest if self.saturates or highest > self.exponent else None


@dataclass(frozen=True)
class Stats:
    """One `Row` for each operand of each FP8 layer, in the model's order; printed as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no FP8 layers"
        header = ("layer", "role", "format", "exponent", "largest", "saturated", "to zero", "use")
        cells = [header, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(_line(line, widths) for line in cells)

    def warnings(self) -> list[str]:
        """A sentence for each operand that loses too much, worst first: non-finite values, then
        saturation above 1e-4, then more than 5 % of values turned into 0.

        >>> from mixprec import float8_stats, formats
        >>> counters = torch.tensor([0x44800000, 30, 0, 0, 1000, 0, 0, 0])  # 0x44800000 is 1024.0
        >>> row = float8_stats.row("mlp.down", "input", formats.E4M3, 0, counters)
        >>> print(*float8_stats.Stats((row,)).warnings())
        mlp.down input: 3 % of values are above E4M3's 448 (exponent 0, largest 2^10.0); use \
exponent -3, or overrides={'mlp.down': 'adaptive'}
        """
        found = [row for row in self.rows if row.nonfinite or row.saturates or row.flushes]
        return [f"{row.layer} {row.role}: {_fault(row)}" for row in sorted(found, key=_severity)]


def read(counted: Iterable[Counted]) -> Stats:
    """The rows of all operands. The host waits once for each device, however many layers there are.

    Raises:
        TypeError: if counters are not int64 of length 8.
    """
    entries = list(counted)
    asked: dict[torch.device, list[Tensor]] = {}
    for entry in entries:
        _check(entry)
        for tensor in _tensors(entry):
            asked.setdefault(tensor.device, []).append(tensor.detach().reshape(-1).to(torch.int64))
    answers = {device: iter(torch.cat(pieces).tolist()) for device, pieces in asked.items()}

    def take(tensor: Tensor) -> list[int]:
        numbers = answers[tensor.device]
        return [next(numbers) for _ in range(tensor.numel())]

    rows: list[Row] = []
    for entry in entries:
        numbers = [take(tensor) for tensor in _tensors(entry)]
        exponent = numbers[1][0] if isinstance(entry.exponent, Tensor) else entry.exponent
        rows.append(_row(entry.layer, entry.role, entry.format, exponent, numbers[0]))
    return Stats(tuple(rows))


def row(layer: str, role: str, format: Format, exponent: int | None, counters: Tensor) -> Row:
    """One operand's row. The host waits for `counters`; use `read` for many.

    Args:
        exponent: the cast multiplied by 2^exponent; None where it found a factor of its own.
        counters: int64 [8], as the top of this file says.

    Raises:
        TypeError: if `counters` is not int64 of length 8.

    >>> from mixprec import float8_stats, formats
    >>> counters = torch.tensor([0x3A800000, 0, 25, 0, 100, 0, 0, 0])  # 0x3A800000 is 2^-10
    >>> row = float8_stats.row("0", "grad_output", formats.E5M2, 0, counters)
    >>> row.flushed, row.log2_amax, row.fix
    (0.25, -10.0, 24)
    """
    return read([Counted(layer, role, format, exponent, counters)]).rows[0]


def highest_exponent(amax: float, format: Format, *, headroom: int = HEADROOM) -> int | None:
    """The highest e with `amax * 2^(e + headroom) <= format.max`; None for 0, inf and NaN.

    >>> from mixprec import formats
    >>> highest_exponent(448.0, formats.E4M3, headroom=0), highest_exponent(449.0, formats.E4M3)
    (0, -2)
    """
    if not 0 < amax < math.inf:
        return None
    (fraction, exponent), (fraction_max, exponent_max) = math.frexp(amax), math.frexp(format.max)
    return exponent_max - exponent - (fraction > fraction_max) - headroom


def percent(share: float) -> str:
    """`share` as a percentage of two digits; "-" for NaN.

    >>> percent(0.0213), percent(0.0), percent(3e-6), percent(1.0)
    ('2.1 %', '0', '0.0003 %', '100 %')
    """
    if math.isnan(share):
        return "-"
    number = 100 * share
    return f"{number:.0f} %" if number >= 9.95 else f"{number:.2g} %" if number else "0"


def signed(exponent: int) -> str:
    """How an exponent is written everywhere: 0, +3, -2.

    >>> signed(0), signed(3), signed(-2)
    ('0', '+3', '-2')
    """
    return f"{exponent:+d}" if exponent else "0"


def _tensors(entry: Counted) -> Sequence[Tensor]:
    return (
        (entry.counters, entry.exponent)
        if isinstance(entry.exponent, Tensor)
        else (entry.counters,)
    )


def _check(entry: Counted) -> None:
    counters = entry.counters
    if counters.dtype != torch.int64 or counters.shape != (COUNTERS,):
        raise TypeError(
            f"counters of {entry.layer} {entry.role} are {counters.dtype} {list(counters.shape)}; "
            f"a cast counts into torch.int64 [{COUNTERS}]"
        )
    if isinstance(entry.exponent, Tensor) and entry.exponent.numel() != 1:
        raise TypeError(
            f"exponent of {entry.layer} {entry.role} has shape {list(entry.exponent.shape)}; a "
            f"tensor has one exponent, so give one element"
        )


def _row(
    layer: str, role: str, format: Format, exponent: int | None, numbers: Sequence[int]
) -> Row:
    amax_bits, saturated, flushed, nonfinite, values = numbers[:5]
    (amax,) = struct.unpack("<f", struct.pack("<I", amax_bits & 0xFFFFFFFF))
    return Row(
        layer,
        role,
        format,
        exponent,
        values,
        saturated / values if values else math.nan,
        flushed / values if values else math.nan,
        nonfinite,
        amax,
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.layer or "(model)",
        row.role,
        row.format.name,
        "dynamic" if row.exponent is None else signed(row.exponent),
        _largest(row) if row.values else "-",
        percent(row.saturated),
        percent(row.flushed),
        "" if row.fix is None else signed(row.fix),
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def _largest(row: Row) -> str:
    return f"2^{row.log2_amax:.1f}" if 0 < row.amax < math.inf else f"{row.amax:g}"


def _severity(row: Row) -> tuple[bool, float, float]:
    """Sorts the worst first."""
    saturated = row.saturated if row.saturates else 0.0
    return (not row.nonfinite, -saturated, -row.flushed)


def _fault(row: Row) -> str:
    if row.nonfinite:
        return (
            f"{row.nonfinite} of {row.values} values are inf or NaN, which no exponent mends; look "
            f"for the first layer that makes them, or lower the loss scale"
        )
    name, limit = row.format.name.upper(), f"{row.format.max:g}"
    place = f"exponent {signed(row.exponent)}" if row.exponent is not None else "dynamic"
    lost: list[str] = []
    if row.saturates:
        lost.append(f"{percent(row.saturated)} of values are above {name}'s {limit}")
    if row.flushes:
        lost.append(f"{percent(row.flushed)} become 0 in {name}")
    return f"{' and '.join(lost)} ({place}, largest {_largest(row)}); {_remedy(row)}"


def _remedy(row: Row) -> str:
    if row.fix is not None:
        return f"use exponent {signed(row.fix)}, or overrides={{{row.layer!r}: 'adaptive'}}"
    others = [f"overrides={{{row.layer!r}: {other!r}}}" for other in ("rowwise", "bf16")]
    return f"no exponent holds both ends, use {' or '.join(others)}"
