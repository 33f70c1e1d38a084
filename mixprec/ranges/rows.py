"""One watched tensor: what its format loses of it, and which exponent would fix that.

What a linear layer multiplies is judged as FP8 would hold it at exponent 0, E4M3 for input and
weight, E5M2 for the gradient of the output; in a layer that is in FP8 already, as its cast does.
Everything else is judged by the dtype it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from mixprec import formats
from mixprec.binades import (
    MAX_FLUSHED,
    MAX_SATURATED,
    Binades,
    Rates,
    Window,
    percent,
    signed,
)
from mixprec.float8.advice import better, lost, remedy
from mixprec.float8.recipe import Cast
from mixprec.formats import E4M3, E5M2, FP16, Format
from mixprec.text import aligned

__all__ = ["Row", "advice", "judge", "table"]

_FP8 = {"input": E4M3, "weight": E4M3, "grad_output": E5M2}
SUM_NOT_MEAN = (
    "Gradients become 0. If the loss is a mean over n tokens, they are n times smaller than a "
    "sum's: write reduction='sum', and mixprec.GradientAccumulator(optimizer, presumed_tokens=1) "
    "divides at the step. If it is a sum already, they are that small, and exponents that adapt "
    "lift them: mixprec.Precision('fp8', recipe='adaptive')."
)
_NO_LOSS = Rates(0.0, 0.0, 0.0)


class Judge(NamedTuple):
    """What a tensor has to fit."""

    format: Format | None
    """None where its dtype is no format."""
    exponent: int = 0
    """A cast multiplies by 2^exponent first."""
    cast: Cast | None = None
    """How the layer casts it, if it is in FP8 and not with a multiplier for each row."""


@dataclass(frozen=True)
class Row:
    """All values of one tensor of one layer that were counted."""

    layer: str
    kind: str
    """Class of the layer."""
    role: str
    """"input", "output", "grad_output", a parameter's name, or "grad_" and that name."""
    dtypes: tuple[str, ...]
    """In the order in which they came; mostly one."""
    judge: Judge
    binades: Binades
    also: tuple[str, ...] = ()
    """Other layers that own the same parameter."""

    @property
    def format(self) -> Format | None:
        """What it is judged by; None where its dtype is no format."""
        return self.judge.format

    @property
    def exponent(self) -> int:
        """The exponent at which it is judged: 0, or that of a layer which is in FP8 already."""
        return self.judge.exponent

    @property
    def name(self) -> str:
        return f"{self.layer or '(model)'} {self.role}"

    @property
    def zeros(self) -> float:
        """Share of values that are 0 before any cast."""
        return self.binades.zeros / self.binades.values

    @property
    def nonfinite(self) -> int:
        """How many values are inf or NaN."""
        return self.binades.infs + self.binades.nans

    @cached_property
    def rates(self) -> Rates:
        """What `format` loses at `exponent`."""
        return self.binades.rates(self.format, self.exponent) if self.format else _NO_LOSS

    @cached_property
    def window(self) -> Window | None:
        """The exponents at which `format` loses little enough; None where all are the same."""
        return self.binades.window(self.format) if self.format else None

    @property
    def fix(self) -> int | None:
        """The exponent to use instead, where it is cast to FP8 and that is needed and helps."""
        format = self.format
        if format is None or format not in _FP8.values():
            return None
        has_exponent = self.judge.cast is None or self.judge.cast.has_exponent
        return self._better(format, self.exponent if has_exponent else None)

    def best(self, format: Format) -> int:
        """The exponent at which `format` holds it best: as it is, if that is good enough."""
        now = self.exponent if format == self.format else 0
        window = self.binades.window(format)
        if window is None or now in window:
            return now
        wanted = self._better(format, now)
        return window.middle if wanted is None else wanted

    def _better(self, format: Format, exponent: int | None) -> int | None:
        rates, window = self.binades.rates(format, exponent or 0), self.binades.window(format)
        if window is None:
            return None
        wanted = better(
            2.0 ** max(self.binades.histogram),
            format,
            exponent,
            saturates=rates.saturated > MAX_SATURATED,
            flushes=rates.flushed > MAX_FLUSHED,
        )
        return wanted if wanted in window else None

    @property
    def badness(self) -> float:
        """0 for a tensor that fits; else its worst loss in units of the limit, or inf."""
        if self.nonfinite:
            return math.inf
        # What is FP16 already cannot be seen to saturate or to have been flushed.
        faint = self.rates.subnormal if self.format == FP16 else 0.0
        losses = (self.rates.saturated / MAX_SATURATED, self.rates.flushed / MAX_FLUSHED)
        worst = max(*losses, faint / MAX_FLUSHED)
        return worst if worst > 1 else 0.0

    @property
    def fault(self) -> str | None:
        """What is wrong and what to do about it; None where nothing is."""
        return f"{_lost(self)}. {_remedy([self])}" if self.badness else None


def judge(
    role: str,
    dtypes: Sequence[torch.dtype],
    binades: Binades,
    *,
    linear: bool,
    cast: Cast | None = None,
    exponent: int = 0,
) -> Judge:
    """What a tensor should fit: by its role in a linear layer, or else by its dtypes.

    Where it came in several dtypes, the narrowest range decides.

    Args:
        cast: the `mixprec.float8.Cast` of an operand that is cast already, and its exponent now.
    """
    own = [format for format in formats.ALL if format.dtype in dtypes]
    narrowest = min(own, key=lambda format: format.exponent_bits, default=None)
    if cast is None:
        return Judge(_FP8.get(role, narrowest) if linear else narrowest)
    if cast.has_exponent:
        return Judge(cast.format, exponent, cast)
    if cast.scaling == "rowwise":
        return Judge(narrowest)  # each row has a multiplier of its own, which one histogram hides
    highest = binades.highest(cast.format)
    # The largest value comes to the format's largest, so nothing saturates.
    return Judge(cast.format, highest - (binades.rates(cast.format, highest).saturated > 0), cast)


def advice(rows: Sequence[Row]) -> list[str]:
    """A sentence for each of `rows` that has a fault, in their order.

    Those that differ only in the numbers within their names, as the layers of a stack do, share
    one, which quotes the first: the worst, if `rows` are sorted so. Where gradients become 0, a
    sentence names the usual cause. The last ones say what FP16 would make of what is FP32.
    """
    alike: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.badness:
            alike.setdefault((_pattern([row, row]), row.role, _remedy_kind(row)), []).append(row)
    faint = any(row.role == "grad_output" and row.rates.flushed > MAX_FLUSHED for row in rows)
    said = [*map(_sentence, alike.values()), *([SUM_NOT_MEAN] if faint else [])]
    return [*said, *_in_fp16([row for row in rows if "float32" in row.dtypes])]


def _in_fp16(rows: Sequence[Row]) -> Iterator[str]:
    """What a cast to FP16 would do to these tensors, if anything, and what to write then."""
    above = [row for row in rows if row.binades.rates(FP16).saturated > 0]
    if above:
        worst = max(above, key=lambda row: row.binades.rates(FP16).saturated)
        share = percent(worst.binades.rates(FP16).saturated)
        yield (
            f"In FP16 {_tensors(above)} would hold inf: of {worst.name} {share} of values are "
            f"above 65504. Use BF16, which has the range of FP32: mixprec.cast_model(model, "
            "'bf16')."
        )
    faint = [row for row in rows if row.binades.rates(FP16).flushed > MAX_FLUSHED]
    grads = [row for row in faint if row.role.startswith("grad_")]
    if grads:
        worst = max(grads, key=lambda row: row.binades.rates(FP16).flushed)
        share = percent(worst.binades.rates(FP16).flushed)
        low = max(window.low for row in grads if (window := row.binades.window(FP16)))
        yield (
            f"In FP16 {_tensors(grads)} would lose gradients: of {worst.name} {share} of values "
            f"become 0. Scale the loss, which 2^{low} times would mend: "
            f"mixprec.MixedPrecision(optimizer, loss_scaler=mixprec.DynamicLossScaler())."
        )
    rest = [row for row in faint if row not in grads]
    if rest:
        worst = max(rest, key=lambda row: row.binades.rates(FP16).flushed)
        share = percent(worst.binades.rates(FP16).flushed)
        yield (
            f"In FP16 {_tensors(rest)} would lose small values: of {worst.name} {share} become 0, "
            f"which no loss scale mends. Use BF16: mixprec.cast_model(model, 'bf16')."
        )


def _tensors(rows: Sequence[Row]) -> str:
    return "1 tensor" if len(rows) == 1 else f"{len(rows)} tensors"


def table(rows: Sequence[Row]) -> str:
    """`rows` as aligned text."""
    header = ("layer", "role", "dtype", "binades", "zero", "as", "saturated", "to zero", "use")
    return aligned([header, *map(_cells, rows)])


def _cells(row: Row) -> tuple[str, ...]:
    present = list(row.binades.histogram)
    return (
        row.layer or "(model)",
        row.role,
        "+".join(row.dtypes),
        f"2^{present[0]} to 2^{present[-1] + 1}" if present else "-",
        percent(row.zeros),
        row.format.name if row.format else "-",
        percent(row.rates.saturated),
        percent(row.rates.flushed),
        signed(row.fix) if row.fix is not None else "see below" if row.badness else "",
    )


def _lost(row: Row) -> str:
    if row.nonfinite or row.format is None:
        binades = row.binades
        return f"{binades.infs} inf and {binades.nans} NaN among {binades.values} values"
    rates = row.rates
    place = f"at exponent {signed(row.exponent)}" if row.format in _FP8.values() else "as it is"
    return lost(row.format, rates.saturated, rates.flushed, place) or (
        f"{percent(rates.subnormal)} of values are in {row.format.name.upper()}'s subnormals, "
        f"where digits get lost, and {percent(row.zeros)} are 0"
    )


def _sentence(rows: Sequence[Row]) -> str:
    worst = rows[0]
    if len(rows) == 1:
        return f"{worst.name}: {worst.fault}"
    which = "first" if worst.nonfinite else "worst"
    place = f"{_pattern(rows)} {worst.role} in {len(rows)} layers, {which} in {worst.layer}"
    return f"{place}: {_lost(worst)}. {_remedy(rows)}"


def _pattern(rows: Sequence[Row]) -> str:
    """What names all of the layers: the name of one, or one with `*` for the numbers within."""
    layer = rows[0].layer or "*"
    if len(rows) == 1:
        return layer
    *path, last = layer.split(".")  # a number in last place tells layers of one block apart
    return ".".join(["*" if part.isdecimal() else part for part in path] + [last])


def _remedy_kind(row: Row) -> str:
    if row.nonfinite:
        return "none"
    if row.format == FP16:
        return "loss scale" if row.role.startswith("grad_") else "bf16"
    if row.fix is None:
        return "other recipe"
    return "higher exponent" if row.fix > row.exponent else "lower exponent"


def _remedy(rows: Sequence[Row]) -> str:
    worst = rows[0]
    kind = _remedy_kind(worst)
    if kind == "none":
        return "No exponent mends that: find the first layer that makes them."
    if kind == "bf16":
        return "Hold it in BF16: mixprec.cast_model(model, 'bf16')."
    if kind == "loss scale":
        return (
            f"Raise the loss scale 2^{max(map(_lift, rows))} times, or let it find its size: "
            f"mixprec.MixedPrecision(optimizer, loss_scaler=mixprec.DynamicLossScaler())."
        )
    fixes = [row.fix for row in rows if row.fix is not None]
    window = worst.window if len(rows) == 1 else None
    assert worst.format is not None
    return remedy(_pattern(rows), worst.role, worst.judge.cast, worst.format, fixes, window)


def _lift(row: Row) -> int:
    """The least power of two that brings FP16 gradients out of the subnormals."""
    return next(e for e in range(1, 64) if row.binades.rates(FP16, e).subnormal <= MAX_FLUSHED)
