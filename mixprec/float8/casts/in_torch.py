"""The casts in plain torch: the twin of `cast_kernels`, of the same functions.

Each writes the orientations that it is given and returns the factors that they are multiplied by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixprec.float8.casts.counters import (
    AMAX_BITS,
    NON_FINITE,
    SATURATED,
    SEEN,
    largest_that_fits,
)
from mixprec.formats import Format

__all__ = ["cast_rowwise_", "cast_scaled_", "cast_tensorwise_"]

SMALLEST_AMAX = 1e-12
"""Stands in for a smaller one, as in torchao, so that zeros have a finite multiplier."""

_INF, _NAN = 0x7F800000, 0x7FC00000
_NAN_BYTE = 0x7F


def cast_scaled_(
    x: Tensor,
    by_row: Tensor | None,
    by_col: Tensor | None,
    format: Format,
    scale: Tensor,
    counters: Tensor | None,
) -> Tensor:
    """See `cast.cast_scaled`."""
    with torch.no_grad():
        codes = _codes(x, scale[0], format)
        _write(codes, by_row, by_col)
        _count(x, scale[0], codes, format, counters)
        return scale[1:].clone()


def cast_tensorwise_(
    x: Tensor,
    by_row: Tensor | None,
    by_col: Tensor | None,
    format: Format,
    counters: Tensor | None,
    power_of_two: bool,
) -> Tensor:
    """See `cast.cast_tensorwise`."""
    with torch.no_grad():
        multiplier, factor = _fitted(_finite_magnitude(x).amax(), format, power_of_two)
        codes = _codes(x, multiplier, format)
        _write(codes, by_row, by_col)
        _count(x, multiplier, codes, format, counters)
        return factor.view(1)


def cast_rowwise_(
    x: Tensor,
    by_row: Tensor | None,
    by_col: Tensor | None,
    format: Format,
    counters: Tensor | None,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    """See `cast.cast_rowwise`."""
    with torch.no_grad():
        magnitude = _finite_magnitude(x)
        row_factor = col_factor = magnitude.new_empty(0, 1)
        if by_col is not None:
            fitted = _fitted(magnitude.amax(0, keepdim=True)[:, : x.shape[1]], format, power_of_two)
            codes, col_factor = _codes(x, fitted[0], format), fitted[1].t().contiguous()
            _write(codes, None, by_col)
            if by_row is None:
                _count(x, fitted[0], codes, format, counters)
        if by_row is not None:
            fitted = _fitted(magnitude.amax(1, keepdim=True)[: x.shape[0]], format, power_of_two)
            codes, row_factor = _codes(x, fitted[0], format), fitted[1]
            _write(codes, by_row, None)
            _count(x, fitted[0], codes, format, counters)
    return row_factor, col_factor


def _codes(x: Tensor, multiplier: Tensor, format: Format) -> Tensor:
    """The bytes of `x`, as uint8."""
    scaled = (x.float() * multiplier).clamp_(-format.max, format.max)
    return scaled.to(format.dtype).view(torch.uint8).masked_fill_(~x.isfinite(), _NAN_BYTE)


def _write(codes: Tensor, by_row: Tensor | None, by_col: Tensor | None) -> None:
    if by_row is not None:
        by_row.view(torch.uint8).copy_(codes)
    if by_col is not None:
        target, num_rows = by_col.view(torch.uint8), codes.shape[0]
        target[:, :num_rows].copy_(codes.t())
        target[:, num_rows:].zero_()


def _finite_magnitude(x: Tensor) -> Tensor:
    """`|x|` in FP32, with 0 for inf and NaN; a zero where there is nothing to be the maximum."""
    if not x.numel():
        return x.new_zeros(max(x.shape[0], 1), max(x.shape[1], 1), dtype=torch.float32)
    return x.float().abs().masked_fill_(~x.isfinite(), 0.0)


def _fitted(amax: Tensor, format: Format, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Multipliers that bring `amax` to the format's largest value, and their inverses."""
    multiplier = (format.max / amax.double().clamp(min=SMALLEST_AMAX)).float()
    if power_of_two:  # drop the mantissa; no multiplier is as small as a subnormal
        multiplier = (multiplier.view(torch.int32) & -0x800000).view(torch.float32)
    return multiplier, multiplier.reciprocal()


def _count(
    x: Tensor, multiplier: Tensor, codes: Tensor, format: Format, counters: Tensor | None
) -> None:
    if counters is None or not x.numel():
        return
    lost, wide = codes == _NAN_BYTE, x.float()
    too_large = ((wide * multiplier).abs() > largest_that_fits(format)) & ~lost
    flushed = (x != 0) & (codes & 0x7F == 0)
    amax = wide.view(torch.int32).bitwise_and(0x7FFFFFFF).amax()
    amax = torch.where(amax > _INF, _NAN, amax)
    counters[AMAX_BITS] = torch.maximum(counters[AMAX_BITS], amax)
    sums = torch.stack([too_large.sum(), flushed.sum(), lost.sum()])
    counters[SATURATED : NON_FINITE + 1] += sums
    counters[SEEN] += x.numel()
