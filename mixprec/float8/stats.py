"""What FP8 casts have lost: their counters as rows, as a table, and as sentences on what to do.

A cast counts as it goes (`cast.py`), and the counts stay on the device until somebody asks. Rates
follow by division. An exponent that would mend them follows from the largest value alone; it is the
one that the recipe "adaptive" would move to. Saturation is the costlier loss, because what is
clipped carries most of a tensor's energy, so it is reported from 1e-4 on, and flushing, which takes
the smallest values, from 5 %.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixprec.binades import MAX_FLUSHED, MAX_SATURATED, percent, signed
from mixprec.devices import to_host
from mixprec.float8.advice import better, fitting, lost, remedy
from mixprec.float8.casts.counters import (
    AMAX_BITS,
    FLUSHED,
    NON_FINITE,
    NUM_COUNTERS,
    SATURATED,
    SEEN,
)
from mixprec.float8.conversion import float8_layers
from mixprec.float8.exponents import exponents_of
from mixprec.float8.recipe import Cast
from mixprec.formats import Format
from mixprec.text import aligned

__all__ = ["Counted", "Row", "Stats", "read", "row", "stats"]


class Counted(NamedTuple):
    """One operand of one layer, as the layer holds it."""

    layer: str
    role: str
    """"input", "weight" or "grad_output"."""
    cast: Cast
    scale: Tensor
    """FP32 [2], the multiplier and its inverse; not read where each matrix has its own."""
    counters: Tensor
    """int64 [8], see `cast_scaled`; on the device of `scale`, as `last`."""
    last: Tensor
    """The same of an earlier step, for as long as `counters` has seen nothing."""


@dataclass(frozen=True)
class Row:
    """What the casts of one operand have seen."""

    layer: str
    role: str
    cast: Cast
    exponent: int | None
    """The casts multiply by 2^exponent; None where each finds a multiplier of its own."""
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
    def format(self) -> Format:
        return self.cast.format

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
    def fitting(self) -> int | None:
        """The exponent that leaves one to two binades above the largest value seen."""
        return fitting(self.amax, self.format)

    @property
    def fix(self) -> int | None:
        """The exponent to use instead; None if nothing is wrong, or no exponent would mend it."""
        return better(
            self.amax, self.format, self.exponent, saturates=self.saturates, flushes=self.flushes
        )


@dataclass(frozen=True)
class Stats:
    """One `Row` for each operand of each FP8 layer, in the model's order; printed as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no FP8 layers"
        header = ("layer", "role", "as", "exponent", "largest", "saturated", "to zero", "use")
        return aligned([header, *map(_cells, self.rows)], right=range(3, len(header)))

    def warnings(self) -> list[str]:
        """A sentence for each operand that loses too much, worst first: non-finite values, then
        saturation above 1e-4, then more than 5 % of values turned into 0.

        >>> from mixprec.float8 import Cast
        >>> from mixprec.float8.stats import Stats, row
        >>> counters = torch.tensor([0x44800000, 30, 0, 0, 1000, 0, 0, 0])  # 0x44800000 is 1024.0
        >>> print(*Stats((row("mlp.down", "input", Cast(), 0, counters),)).warnings())
        mlp.down input: 3 % of values are clipped to E4M3's 448 at exponent 0, and the largest is \
2^10.0. It needs exponent -4. Write mixprec.Precision('fp8').revert(model) and convert(model, \
overrides={'mlp.down': 'adaptive'}), which finds it, or overrides={'mlp.down': \
mixprec.float8.Recipe(input=mixprec.float8.Cast(exponent=-4))}, which sets it.
        """
        found = [row for row in self.rows if row.nonfinite or row.saturates or row.flushes]
        return [
            f"{row.layer or '(model)'} {row.role}: {_fault(row)}"
            for row in sorted(found, key=_severity)
        ]


def stats(model: nn.Module) -> Stats:
    """What the casts of every FP8 layer of `model` have lost in the last step that cast anything.

    Exponents are those of now: an adaptive one may have moved at the end of that step. Waits for
    the device, once.

    >>> from mixprec import float8
    >>> model = nn.Sequential(nn.Linear(64, 32, bias=False))
    >>> _ = float8.convert(model, "static", min_dim=16)
    >>> _ = model(torch.full((4, 64), 1000.0, dtype=torch.bfloat16))
    >>> [(row.role, row.values, row.saturated) for row in float8.stats(model).rows][:2]
    [('input', 256, 1.0), ('weight', 2048, 0.0)]
    """
    return read(
        Counted(name, role, operand.cast, operand.scale, operand.counters, operand.last)
        for name, layer in float8_layers(model)
        for role, operand in layer._float8.operands().items()
    )


@torch.no_grad()
def read(counted: Iterable[Counted]) -> Stats:
    """The rows of all operands. The host waits once for each device, however many layers there are.

    Raises:
        TypeError: if counters are not int64 of length 8.
    """
    entries = list(counted)
    for entry in entries:
        _check(entry.layer, entry.role, entry.counters)
    held = ((e.counters, e.last, e.scale.view(torch.int64)) for e in entries)
    numbers = iter(to_host(chain.from_iterable(held)))
    return Stats(tuple(_entry_row(entry, *islice(numbers, 3)) for entry in entries))


def row(layer: str, role: str, cast: Cast, exponent: int | None, counters: Tensor) -> Row:
    """One operand's row from its counters. The host waits for them; use `read` for many.

    Raises:
        TypeError: if `counters` is not int64 of length 8.

    >>> from mixprec import formats
    >>> from mixprec.float8.stats import row
    >>> counters = torch.tensor([0x3A800000, 0, 25, 0, 100, 0, 0, 0])  # 0x3A800000 is 2^-10
    >>> flushed = row("0", "grad_output", Cast(formats.E5M2), 0, counters)
    >>> flushed.flushed, flushed.log2_amax, flushed.fix
    (0.25, -10.0, 23)
    """
    _check(layer, role, counters)
    return _row(layer, role, cast, exponent, counters.tolist())


def _check(layer: str, role: str, counters: Tensor) -> None:
    if counters.dtype != torch.int64 or counters.shape != (NUM_COUNTERS,):
        raise TypeError(
            f"counters of {layer} {role} are {counters.dtype} {list(counters.shape)}; a cast "
            f"counts into torch.int64 [{NUM_COUNTERS}]"
        )


def _entry_row(entry: Counted, running: Tensor, last: Tensor, scale: Tensor) -> Row:
    exponent = int(exponents_of(scale.view(torch.float32))) if entry.cast.has_exponent else None
    counts = running if running[SEEN] else last
    return _row(entry.layer, entry.role, entry.cast, exponent, counts.tolist())


def _row(layer: str, role: str, cast: Cast, exponent: int | None, counts: Sequence[int]) -> Row:
    values = counts[SEEN]
    (amax,) = struct.unpack("<f", struct.pack("<I", counts[AMAX_BITS]))
    return Row(
        layer,
        role,
        cast,
        exponent,
        values,
        saturated=counts[SATURATED] / values if values else math.nan,
        flushed=counts[FLUSHED] / values if values else math.nan,
        nonfinite=counts[NON_FINITE],
        amax=amax,
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.layer or "(model)",
        row.role,
        f"{row.format.name} {row.cast.scaling}",
        "-" if row.exponent is None else signed(row.exponent),
        _largest(row) if row.values else "-",
        percent(row.saturated),
        percent(row.flushed),
        "" if row.fix is None else signed(row.fix),
    )


def _largest(row: Row) -> str:
    return f"2^{row.log2_amax:.1f}" if 0 < row.amax < math.inf else f"{row.amax:g}"


def _severity(row: Row) -> tuple[bool, float, float]:
    """Sorts the worst first."""
    saturated = row.saturated if row.saturates else 0.0
    return (not row.nonfinite, -saturated, -row.flushed)


def _fault(row: Row) -> str:
    if row.nonfinite:
        return (
            f"{row.nonfinite} of {row.values} values are inf or NaN, which no exponent mends. Look "
            f"for the first layer that makes them with mixprec.watch(model), or lower the loss "
            f"scale."
        )
    place = (
        f"({row.cast.scaling})" if row.exponent is None else f"at exponent {signed(row.exponent)}"
    )
    what = lost(row.format, row.saturated, row.flushed, place, how="clipped to")
    return f"{what}, and the largest is {_largest(row)}. {_remedy(row)}"


def _remedy(row: Row) -> str:
    moved = row.cast.scaling == "adaptive" and row.exponent == row.fitting
    if moved and row.saturates != row.flushes:
        return f"The exponent has moved to {signed(row.fitting or 0)} since, which should end it."
    fixes = [] if row.fix is None else [row.fix]
    return remedy(row.layer or "*", row.role, row.cast, row.format, fixes)
