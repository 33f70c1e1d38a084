"""One operand of one layer: how it is cast, its multiplier, and what its casts have lost.

The multiplier and the counters live on the device. An exponent may move between two steps without
a recompilation or another capture of a CUDA graph, and nothing waits for the device to know it.

Under `torch.compile` a cast is a kernel that the compiled code launches; where there is none, one
registered operator, which the compiler leaves as it is; or, on demand and with a static exponent,
plain operations that it may fuse with what comes before.

An adaptive exponent is fitted to the values of the first step, and compiled code has none of those
when it is made, nor may it be made again for the second step. So it calls an operator, before each
cast or around it, that looks whether the exponent is settled: from the second step on that is all
it does. It is given nothing but tensors, and finds the operand by where its multiplier lies.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixprec import formats
from mixprec.devices import is_capturing
from mixprec.float8.casts.cast import (
    Operand8,
    cast_rowwise,
    cast_scaled,
    cast_tensorwise,
    has_kernel,
)
from mixprec.float8.casts.counters import NUM_COUNTERS
from mixprec.float8.exponents import follow, scale_for
from mixprec.float8.operators import operator, written
from mixprec.float8.products import padded
from mixprec.float8.recipe import Cast

__all__ = ["Operand", "cast_as", "cast_named", "settle_at"]


class Operand:
    """Casts matrices as `cast` says and counts what that did.

    Args:
        cast: format and scaling.
        device: of the matrices to come; what this holds moves along if they come from another.
        inline: a static cast under `torch.compile` is made of plain operations, and not counted.
    """

    def __init__(self, cast: Cast, device: torch.device, *, inline: bool = False) -> None:
        self.cast = cast
        self.inline = inline and cast.scaling == "static"
        self.scale = torch.tensor([2.0**cast.exponent, 2.0**-cast.exponent], device=device)
        """FP32: the multiplier and its inverse; unused where each matrix has its own."""
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        """Of the step in progress."""
        self.last = torch.zeros_like(self.counters)
        """Of the last step that cast anything."""
        self.slack_steps = torch.zeros((), dtype=torch.int32, device=device)
        """For how many steps in a row the exponent has left range unused."""
        self.fitted = False
        """Whether the exponent was fitted to a matrix."""
        self.settled = cast.scaling != "adaptive"
        """Whether it stays from one matrix to the next: from the first step on."""
        self.given: int | None = None
        """The exponent that `set_exponent` was given, which needs no fit."""
        self._listen()

    def _listen(self) -> None:
        follow(self)
        _at_address[self.scale.data_ptr()] = self

    def __call__(self, x: Tensor, *, rows: bool = True, cols: bool = True) -> Operand8:
        """The matrix `x` in FP8, in the orientations asked for."""
        if torch.compiler.is_compiling():
            return self.traced(x, self.scale, self.counters, rows=rows, cols=cols)
        self.move_to(x.device)
        self.settle(x)
        return cast_as(self.cast, x, self.scale, self.counters, rows, cols)

    def settle(self, x: Tensor) -> None:
        """Fit the exponent to `x`, as long as no step has shown what to expect.

        Not again while a CUDA graph is captured: each replay would fit, for the whole run.
        """
        if not self.settled and x.numel():
            if self.given is None and not (self.fitted and is_capturing(x.device)):
                self.scale.copy_(scale_for(x.abs().amax().float(), self.cast.format))
            self.fitted = True

    def unsettle(self) -> None:
        """Fit anew, to matrices that have nothing to do with those before."""
        if self.settled and self.cast.scaling == "adaptive":
            self.settled, self.given = False, None

    def set_exponent(self, exponent: int) -> None:
        """Go on from `exponent`; siblings that are given the same become one again."""
        self.scale.copy_(torch.tensor([2.0**exponent, 2.0**-exponent]))
        self.slack_steps.zero_()
        self.given, self.settled = exponent, False

    def move_to(self, device: torch.device) -> None:
        """Hold everything on `device`."""
        if self.scale.device == device:
            return
        with torch.inference_mode(False):  # they are for training too, whoever comes first
            for name in ("scale", "counters", "last", "slack_steps"):
                setattr(self, name, getattr(self, name).to(device))
        _at_address[self.scale.data_ptr()] = self

    def traced(
        self, x: Tensor, scale: Tensor, counters: Tensor, *, rows: bool, cols: bool
    ) -> Operand8:
        """What a call does under `torch.compile`, where a backward pass is handed its tensors."""
        plan = self.cast
        if self.inline:
            return _inlined(x, plan, rows, cols)
        adaptive = plan.scaling == "adaptive"
        # FP32 takes two launches, of which nothing would keep the first behind the fit.
        by_operator = adaptive and x.dtype == torch.float32
        if has_kernel(x.device) and not by_operator:  # launched by what the compiler makes
            x = written(x)
            if adaptive:
                _settle_op(x, scale, counters)
            return cast_as(plan, x, scale, counters, rows, cols)
        options = plan.format.name, plan.scaling, plan.power_of_two
        by_row, by_col, row_scale, col_scale = _cast(x, *options, scale, counters, rows, cols)
        return Operand8(
            by_row if rows else None,
            by_col if cols else None,
            row_scale,
            col_scale if plan.scaling == "rowwise" else row_scale,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._listen()


_at_address: weakref.WeakValueDictionary[int, Operand] = weakref.WeakValueDictionary()
"""Operands by where their multiplier lies; one that has moved may still stand at its old place."""


def settle_at(x: Tensor, scale: Tensor) -> None:
    """`Operand.settle(x)` of the operand with the multiplier `scale`.

    Compiled code saves `scale` for a backward pass that may well cast by a newer exponent, as it
    does where nothing is compiled; autograd must not take that for a mistake.
    """
    owner = _at_address.get(scale.data_ptr())
    if owner is None or owner.settled or owner.scale.data_ptr() != scale.data_ptr():
        return
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(owner.scale):
        owner.settle(x)


@cache
def cast_named(format: str, scaling: Any, power_of_two: bool) -> Cast:
    """A `Cast` as operators are told of it: by names, and without the exponent."""
    return Cast(formats.by_name(format), scaling, power_of_two=power_of_two)


def cast_as(
    plan: Cast, x: Tensor, scale: Tensor, counters: Tensor | None, rows: bool, cols: bool
) -> Operand8:
    """`x` cast as `plan` says; `scale` is read if the plan has an exponent."""
    format, pow2 = plan.format, plan.power_of_two
    if plan.has_exponent:
        return cast_scaled(x, format, scale, counters, rows=rows, cols=cols)
    dynamic = cast_rowwise if plan.scaling == "rowwise" else cast_tensorwise
    return dynamic(x, format, counters, power_of_two=pow2, rows=rows, cols=cols)


# ------------------------------------------------------------------ under torch.compile


def _cast_or_empty(
    x: Tensor,
    format: str,
    scaling: str,
    power_of_two: bool,
    scale: Tensor,
    counters: Tensor,
    rows: bool,
    cols: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cast_as` for the compiler: what is not wanted is empty, and no output comes twice."""
    plan = cast_named(format, scaling, power_of_two)
    if scaling == "adaptive":
        settle_at(x, scale)
    by_row, by_col, row_scale, col_scale = cast_as(plan, x, scale, counters, rows, cols)
    return (
        x.new_empty(0, dtype=plan.format.dtype) if by_row is None else by_row,
        x.new_empty(0, dtype=plan.format.dtype) if by_col is None else by_col,
        row_scale,
        scale.new_empty(0) if col_scale is row_scale else col_scale,
    )


def _fake(
    x: Tensor,
    format: str,
    scaling: str,
    power_of_two: bool,
    scale: Tensor,
    counters: Tensor,
    rows: bool,
    cols: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = formats.by_name(format).dtype
    num_rows, num_cols = x.shape
    rowwise = scaling == "rowwise"
    return (
        x.new_empty((num_rows, num_cols) if rows else (0,), dtype=dtype),
        x.new_empty((num_cols, padded(num_rows)) if cols else (0,), dtype=dtype),
        scale.new_empty((num_rows if rows else 0, 1) if rowwise else (1,)),
        scale.new_empty((num_cols if cols else 0, 1) if rowwise else (0,)),
    )


_cast = operator("float8_cast", _cast_or_empty, _fake, mutates=("counters",))


def _settle(x: Tensor, scale: Tensor, counters: Tensor) -> None:
    settle_at(x, scale)


_settle_op = operator("float8_settle", _settle, lambda *arguments: None, mutates=("counters",))
"""Says that it writes the counters, which the cast adds to, and so is called before it. It must not
name what it does write, `scale`: a compiler that does not write in place would hand it a copy.
"""


def _inlined(x: Tensor, plan: Cast, rows: bool, cols: bool) -> Operand8:
    """`cast_scaled` in plain operations."""
    factor = torch.full((1,), 2.0**-plan.exponent, dtype=torch.float32, device=x.device)
    by_row = _codes(x, plan) if rows else None
    by_col = None
    if cols:
        excess = padded(x.shape[0]) - x.shape[0]
        by_col = _codes(F.pad(x, (0, 0, 0, excess)), plan).t().contiguous()
    return Operand8(by_row, by_col, factor, factor)


def _codes(x: Tensor, plan: Cast) -> Tensor:
    largest = plan.format.max
    scaled = (x.float() * 2.0**plan.exponent).clamp(-largest, largest)
    return torch.where(x.isfinite(), scaled, float("nan")).to(plan.format.dtype)
