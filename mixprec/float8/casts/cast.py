"""A matrix in FP8, with its transpose: what a scaled matrix product takes.

Every value is multiplied in FP32, rounded to the nearest FP8 value (ties to even) and saturated:

    byte = round(clamp(x * multiplier, -max, max)),    x is about byte * (1 / multiplier)

The units of a GPU multiply only matrices whose summed dimension is contiguous, so each operand is
needed twice: `rows` for one product, `cols`, its transpose, for another. Both come from one reading
of x, and where one multiplier serves the whole matrix they hold the same bytes.

A saturating cast hides an overflow from a loss scaler. Here inf and NaN become the byte 0x7F, which
is NaN in both formats: they pass through every product and end in the gradients, where they are
looked for anyway. Finite values saturate. What was lost can be counted on the way, at no extra
reading.

`in_torch` does it in plain torch; on a CUDA device with FP8 units `cast_kernels` write the same
bytes in one pass.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mixprec.devices import has_triton
from mixprec.float8.casts import in_torch
from mixprec.float8.products import has_units, padded
from mixprec.formats import E4M3, E5M2, Format

__all__ = [
    "Operand8",
    "cast_rowwise",
    "cast_scaled",
    "cast_tensorwise",
    "has_kernel",
]

_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


class Operand8(NamedTuple):
    """A matrix `[R, C]` in FP8. An orientation that was not asked for is None, its factor empty."""

    rows: Tensor | None
    """`[R, C]`, row-major."""
    cols: Tensor | None
    """`[C, R16]`, row-major: the transpose, with zero bytes up to a multiple of 16 rows."""
    row_scale: Tensor
    """FP32: multiply `rows` by it. One element, or `(R, 1)` with one factor a row."""
    col_scale: Tensor
    """FP32: multiply `cols` by it. One element, or `(C, 1)` with one factor a column."""


def cast_scaled(
    x: Tensor,
    format: Format,
    scale: Tensor,
    counters: Tensor | None = None,
    *,
    rows: bool = True,
    cols: bool = True,
    out: tuple[Tensor | None, Tensor | None] | None = None,
) -> Operand8:
    """`x` in FP8 by a multiplier that is given.

    Args:
        x: `[R, C]`, BF16, FP16 or FP32, any strides; may be empty.
        format: `formats.E4M3` or `formats.E5M2`.
        scale: FP32 `[2]` on the device of `x`: the multiplier, a power of two, and its inverse.
        counters: int64 `[8]` on the device of `x`, added to, or None. `[AMAX_BITS]` is the largest
            `|x|` as the bits of an FP32 (NaN as 0x7FC00000, above inf), `[SATURATED]` counts finite
            values that rounded to nearest would not fit, `[FLUSHED]` nonzero ones that became 0,
            `[NON_FINITE]` inf and NaN, `[SEEN]` all; the rest stays.
        rows, cols: which orientations to write.
        out: contiguous `(rows, cols)` to overwrite, as an earlier call made them, instead of new
            ones; None for an orientation that is not wanted. Decides instead of `rows` and `cols`.

    Returns:
        Both orientations, with a copy of `scale[1]` as their factor: `scale` may change before they
        are used.

    Raises:
        TypeError: for another dtype of `x`.
        ValueError: for a format of more bits, or an `x` that is no matrix.

    >>> import torch
    >>> from mixprec import formats
    >>> x, scale = torch.tensor([[1.0, 300.0], [-0.3, float("inf")]]), torch.tensor([2.0, 0.5])
    >>> operand = cast_scaled(x, formats.E4M3, scale)
    >>> operand.rows.float() * operand.row_scale
    tensor([[  1.0000, 224.0000],
            [ -0.3125,      nan]])
    >>> operand.cols.shape
    torch.Size([2, 16])
    """
    x = _checked("cast_scaled", x, format)
    by_row, by_col = _empty(x, format, rows, cols) if out is None else out
    factor = _twin(x).cast_scaled_(x, by_row, by_col, format, scale, counters)
    return Operand8(by_row, by_col, factor, factor)


def cast_tensorwise(
    x: Tensor,
    format: Format,
    counters: Tensor | None = None,
    *,
    power_of_two: bool = False,
    rows: bool = True,
    cols: bool = True,
) -> Operand8:
    """`x` in FP8 by the multiplier that puts its largest value at the format's.

    The multiplier is `format.max / max(amax, 1e-12)` in FP64, rounded to FP32, and the factor its
    inverse in FP32: the bytes and factors of torchao. Non-finite values do not count in `amax`, so
    one of them leaves the other bytes useful, and is one NaN of the operand.

    Args:
        power_of_two: round the multiplier down to a power of two, so that multiplying is exact.
        x, format, counters, rows, cols: as in `cast_scaled`.

    >>> import torch
    >>> from mixprec import formats
    >>> operand = cast_tensorwise(torch.tensor([[2.0, -0.125]]), formats.E4M3)
    >>> operand.rows.float(), operand.row_scale
    (tensor([[448., -28.]]), tensor([0.0045]))
    """
    x = _checked("cast_tensorwise", x, format)
    by_row, by_col = _empty(x, format, rows, cols)
    factor = _twin(x).cast_tensorwise_(x, by_row, by_col, format, counters, power_of_two)
    return Operand8(by_row, by_col, factor, factor)


def cast_rowwise(
    x: Tensor,
    format: Format,
    counters: Tensor | None = None,
    *,
    power_of_two: bool = True,
    rows: bool = True,
    cols: bool = True,
) -> Operand8:
    """`x` in FP8 by multipliers of its own for each row, and others for each column.

    Each as in `cast_tensorwise`. `rows` and `cols` hold different bytes here; what a value lost is
    counted in `rows`, or in `cols` if that is all there is.

    Args:
        power_of_two: round multipliers down to powers of two.
        x, format, counters, rows, cols: as in `cast_scaled`.

    >>> import torch
    >>> from mixprec import formats
    >>> operand = cast_rowwise(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), formats.E4M3)
    >>> operand.rows.float(), operand.row_scale.T
    (tensor([[128., 256.],
            [  0.,   0.]]), tensor([[7.8125e-03, 3.5527e-15]]))
    """
    x = _checked("cast_rowwise", x, format)
    by_row, by_col = _empty(x, format, rows, cols)
    by = _twin(x) if rows or cols else in_torch
    factors = by.cast_rowwise_(x, by_row, by_col, format, counters, power_of_two)
    return Operand8(by_row, by_col, *factors)


def has_kernel(device: torch.device) -> bool:
    """Whether casts run as kernels on this device: CUDA with FP8 units, and Triton."""
    return has_units(device) and has_triton()


def _twin(x: Tensor) -> ModuleType:
    """`cast_kernels` where they run, and have something to do; else `in_torch`."""
    if x.is_cuda and x.numel() and has_kernel(x.device):
        from mixprec.float8.casts import cast_kernels  # imports Triton

        return cast_kernels
    return in_torch


def _checked(function: str, x: Tensor, format: Format) -> Tensor:
    if x.dtype not in _INPUTS:
        raise TypeError(f"{function} got x as {x.dtype}; it takes BF16, FP16 or FP32")
    if x.ndim != 2:
        raise ValueError(
            f"{function} got x of shape {list(x.shape)}; it takes a matrix, as by x.flatten(0, -2)"
        )
    if format is not E4M3 and format is not E5M2 and format not in (E4M3, E5M2):
        raise ValueError(f"{function} got format {format}; the FP8 formats are e4m3 and e5m2")
    return x.contiguous()


def _empty(
    x: Tensor, format: Format, rows: bool, cols: bool
) -> tuple[Tensor | None, Tensor | None]:
    num_rows, num_cols = x.shape
    by_row = x.new_empty(num_rows, num_cols, dtype=format.dtype) if rows else None
    by_col = x.new_empty(num_cols, padded(num_rows), dtype=format.dtype) if cols else None
    return by_row, by_col
