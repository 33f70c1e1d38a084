# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of the FP8 casts: one reading of a matrix, up to two orientations written.

`cast.py` has the rules, and the same in plain torch. A program takes a tile, multiplies and
rounds it in registers, and stores it by rows and, turned in shared memory, by columns; both stores
are 16 bytes wide. For each 16-bit value 4 bytes move, which leaves time for some 25 instructions,
half as many where they are integer ones:

- Saturating is left to the conversion: `cvt.rn.satfinite` rounds to nearest even and saturates, in
  both formats, on every chip that has it.
- Inf and NaN become NaN by adding `x * 0`, which is NaN for these and changes nothing else.
- Counting costs one maximum and two comparisons a value. What saturated and what was not finite is
  counted only in tiles whose largest value says that there is something, from a second reading.

A largest finite value is found as an integer: the bits of `|x|` plus 2^23 stay positive for finite
values, turn negative for others, and are ordered like the values ("key" below; 0 for none yet).

Triton is imported here, so this module is imported inside functions that have a CUDA device before
them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixprec.devices import on_device
from mixprec.float8.products import padded
from mixprec.formats import Format

__all__ = ["cast_rowwise_", "cast_scaled_", "cast_tensorwise_"]

_TILE = {"BLOCK_R": 64, "BLOCK_C": 256, "num_warps": 8}
_SMALL_TILE = {"BLOCK_R": 64, "BLOCK_C": 128, "num_warps": 4}
"""For kernels that need more registers: half the values, by half the threads."""
_ROWWISE_TILE = {"BLOCK_R": 128, "BLOCK_C": 64, "num_warps": 4}
_COUNTED_TILES = 1
"""Tiles below each other that a program counts together."""
_AMAX_BLOCK, _AMAX_BLOCKS = 8192, 4
_AMAX_TILE = {"BLOCK_R": 32, "BLOCK_C": 256, "TILES": 8, "num_warps": 8}
"""A program takes so many tiles below each other."""

# EXPONENT is that of the largest value, FITS is `cast.largest_that_fits`, and FLUSHED half
# the smallest value, which ties to 0.
_FORMATS: dict[str, dict[str, Any]] = {
    "e4m3": {"MAX": 448.0, "EXPONENT": 8, "FITS": 464.0, "FLUSHED": 2.0**-10},
    "e5m2": {"MAX": 57344.0, "EXPONENT": 15, "FITS": 61440.0 - 2.0**-8, "FLUSHED": 2.0**-17},
}
_TYPES = {"e4m3": tl.float8e4nv, "e5m2": tl.float8e5}


# ---------------------------------------- parts of kernels


@triton.jit
def _magnitude(values):
    """The bits of `|x|`."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _multiplier(key, MAX: tl.constexpr, EXPONENT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """What brings the magnitude of `key`, or 1e-12 if that is larger, to the largest value."""
    bits = tl.maximum(key - 0x00800000, 0)
    if POWER_OF_TWO:
        # Both formats end at 1.75 * 2^EXPONENT. Up to a mantissa of 1.75 the power is EXPONENT less
        # the magnitude's own, beyond it, where the sum carries into the exponent, one less still.
        # No quotient is so little below a power of two that FP32 would round it up to that.
        bits = tl.maximum(bits, 0x2B8CBCCC)  # 1e-12
        field = (254 + EXPONENT) - ((bits + 0x1FFFFF) >> 23)
        return (field << 23).to(tl.float32, bitcast=True)
    else:
        amax = bits.to(tl.float32, bitcast=True).to(tl.float64)
        smallest = tl.full((), 1e-12, tl.float64)  # a plain 1e-12 is rounded to FP32 on its way
        return (MAX / tl.maximum(amax, smallest)).to(tl.float32)


@triton.jit
def _inverse(multiplier, POWER_OF_TWO: tl.constexpr):
    if POWER_OF_TWO:  # of 2^e, whose bits are (127 + e) 2^23
        bits = (254 << 23) - multiplier.to(tl.int32, bitcast=True)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.div_rn(1.0, multiplier)


@triton.jit
def _load(x, rows, columns, num_rows, num_cols):
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_cols)
    offsets = rows[:, None].to(tl.int64) * num_cols + columns[None, :]
    return tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _codes(values, multiplier, TYPE: tl.constexpr):
    return (values * multiplier + values * 0.0).to(TYPE).to(tl.uint8, bitcast=True)


@triton.jit
def _bytes(codes):
    return codes.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def _store_rows(by_row, codes, rows, columns, num_rows, num_cols):
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_cols)
    at = _bytes(by_row) + rows[:, None].to(tl.int64) * num_cols + columns[None, :]
    tl.store(at, codes, mask=inside)


@triton.jit
def _store_cols(by_col, codes, rows, columns, padded, num_cols):
    """Transposed. Rows beyond the last were loaded as zeros."""
    inside = (columns[:, None] < num_cols) & (rows[None, :] < padded)
    at = _bytes(by_col) + columns[:, None].to(tl.int64) * padded + rows[None, :]
    tl.store(at, tl.trans(codes), mask=inside)


@triton.jit
def _tally(tops, counts, values, multiplier, FLUSHED: tl.constexpr):
    """The largest magnitude and the number of flushed values of each 16 neighbours so far.

    These lie in one thread, so that a tile costs no exchange between threads.
    """
    PARTS: tl.constexpr = (values.shape[0], values.shape[1] // 16, 16)
    bits = _magnitude(values)
    is_flushed = (tl.abs(values * multiplier) <= FLUSHED) & (bits != 0)
    tops = tl.maximum(tops, tl.max(tl.reshape(bits, PARTS), axis=2))
    return tops, counts + tl.sum(tl.reshape(is_flushed.to(tl.int32), PARTS), axis=2)


@triton.jit
def _count(
    counters,
    tops,
    counts,
    x,
    multiplier,
    first_row,
    columns,
    num_rows,
    num_cols,
    FITTED: tl.constexpr,
    FITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """FITTED multipliers were made for what they multiply, so that nothing saturates."""
    known = tl.load(counters)
    top = tl.max(tl.max(tops, axis=1), axis=0)
    flushed = tl.sum(tl.sum(counts, axis=1), axis=0)
    top = tl.where(top > 0x7F800000, 0x7FC00000, top)
    if top > known:
        tl.atomic_max(counters, top.to(tl.int64), sem="relaxed")
    if flushed > 0:
        tl.atomic_add(counters + 2, flushed.to(tl.int64), sem="relaxed")
    if FITTED:
        is_rare = top >= 0x7F800000
    else:
        is_rare = (top >= 0x7F800000) | (top.to(tl.float32, bitcast=True) * multiplier > FITS)
    if is_rare:
        _count_rare(
            counters,
            x,
            multiplier,
            first_row,
            columns,
            num_rows,
            num_cols,
            FITTED,
            FITS,
            ROWS,
        )
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.atomic_add(counters + 4, tl.cast(num_rows, tl.int64) * num_cols, sem="relaxed")


@triton.jit
def _count_rare(
    counters,
    x,
    multiplier,
    first_row,
    columns,
    num_rows,
    num_cols,
    FITTED: tl.constexpr,
    FITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """In few registers, since the whole program is given as many as its hungriest part."""
    saturated = tl.full((), 0, tl.int32)
    non_finite = tl.full((), 0, tl.int32)
    for start in range(0, ROWS, 8):
        rows = first_row + start + tl.arange(0, 8)
        values = _load(x, rows, columns, num_rows, num_cols)
        is_finite = _magnitude(values) < 0x7F800000
        non_finite += tl.sum(tl.sum((is_finite == 0).to(tl.int32), axis=1), axis=0)
        if not FITTED:
            is_saturated = (tl.abs(values * multiplier) > FITS) & is_finite
            saturated += tl.sum(tl.sum(is_saturated.to(tl.int32), axis=1), axis=0)
    if saturated > 0:
        tl.atomic_add(counters + 1, saturated.to(tl.int64), sem="relaxed")
    if non_finite > 0:
        tl.atomic_add(counters + 3, non_finite.to(tl.int64), sem="relaxed")


# ---------------------------------------- one multiplier


@triton.jit
def _cast_kernel(
    x,
    by_row,
    by_col,
    scale,
    factor,
    counters,
    num_rows,
    num_cols,
    padded,
    TYPE: tl.constexpr,
    FITTED: tl.constexpr,
    FITS: tl.constexpr,
    FLUSHED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES below each other, whose counts cost one exchange between threads."""
    # No branch: it would keep all values of the tile in registers from before it to after it.
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tl.store(factor, tl.load(scale + 1), mask=is_first)
    multiplier = tl.load(scale)
    first_row = tl.program_id(0) * (BLOCK_R * TILES)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tops = tl.zeros((BLOCK_R, BLOCK_C // 16), tl.int32)
    counts = tl.zeros((BLOCK_R, BLOCK_C // 16), tl.int32)
    # With 1 tile too: without the loop, Triton 3.6 makes a kernel that takes 13 % longer.
    for tile in range(TILES):
        rows = first_row + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        values = _load(x, rows, columns, num_rows, num_cols)
        codes = _codes(values, multiplier, TYPE)
        if by_row is not None:
            _store_rows(by_row, codes, rows, columns, num_rows, num_cols)
        if by_col is not None:
            _store_cols(by_col, codes, rows, columns, padded, num_cols)
        if counters is not None:
            tops, counts = _tally(tops, counts, values, multiplier, FLUSHED)
    if counters is not None:
        _count(
            counters,
            tops,
            counts,
            x,
            multiplier,
            first_row,
            columns,
            num_rows,
            num_cols,
            FITTED,
            FITS,
            BLOCK_R * TILES,
        )


@triton.jit
def _fit_kernel(
    x,
    scale,
    work,
    numel,
    MAX: tl.constexpr,
    EXPONENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`work` holds the largest key and how many programs are done; the last one writes `scale`."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    best = tl.zeros((BLOCK,), tl.int32)
    for block in tl.static_range(BLOCKS):
        offsets = first + block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
        best = tl.maximum(best, _magnitude(values) + 0x00800000)
    top = tl.max(best, axis=0)
    if top > tl.load(work):
        tl.atomic_max(work, top, sem="relaxed")
    if tl.atomic_add(work + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        key = tl.atomic_max(work, 0, sem="relaxed")  # which reads it past the cache
        multiplier = _multiplier(key, MAX, EXPONENT, POWER_OF_TWO)
        tl.store(scale, multiplier)
        tl.store(scale + 1, _inverse(multiplier, POWER_OF_TWO))


def cast_scaled_(
    x: Tensor,
    by_row: Tensor | None,
    by_col: Tensor | None,
    format: Format,
    scale: Tensor,
    counters: Tensor | None,
    fitted: bool = False,
) -> Tensor:
    """Write the orientations that are not None, by the multiplier `scale[0]`. One launch.

    Returns the factor, a copy of `scale[1]`: `scale` may change before the factor is used, and a
    product takes none that is not aligned to 16 bytes.

    Args:
        x: `[R, C]`, contiguous, not empty; so are the others.
        fitted: whether the multiplier is known to let nothing saturate.
    """
    if x.dtype == torch.float32 and by_row is not None and by_col is not None:
        # Two launches: of both orientations in one, Triton 3.6 writes garbage in one of them where
        # nothing was widened.
        cast_scaled_(x, None, by_col, format, scale, None, fitted)
        by_col = None
    numbers = _FORMATS[format.name]
    tile = _TILE if counters is None and x.shape[1] % 16 == 0 else _SMALL_TILE
    factor = x.new_empty(1, dtype=torch.float32)
    tiles = 1 if counters is None else _COUNTED_TILES
    with on_device(x.device):
        _cast_kernel[_grid(x, tile, tiles)](
            x,
            by_row,
            by_col,
            scale,
            factor,
            counters,
            *x.shape,
            padded(x.shape[0]),
            TYPE=_TYPES[format.name],
            FITTED=fitted,
            FITS=numbers["FITS"],
            FLUSHED=numbers["FLUSHED"],
            TILES=tiles,
            **tile,
        )
    return factor


def cast_tensorwise_(
    x: Tensor,
    by_row: Tensor | None,
    by_col: Tensor | None,
    format: Format,
    counters: Tensor | None,
    power_of_two: bool,
) -> Tensor:
    """As above, by a multiplier from the largest value. Two launches and a memset."""
    work = torch.zeros(2, dtype=torch.int32, device=x.device)
    scale = torch.empty(2, dtype=torch.float32, device=x.device)
    numbers = _FORMATS[format.name]
    with on_device(x.device):
        _fit_kernel[(_blocks(x.numel(), _AMAX_BLOCK * _AMAX_BLOCKS),)](
            x,
            scale,
            work,
            x.numel(),
            MAX=numbers["MAX"],
            EXPONENT=numbers["EXPONENT"],
            POWER_OF_TWO=power_of_two,
            BLOCK=_AMAX_BLOCK,
            BLOCKS=_AMAX_BLOCKS,
            num_warps=8,
        )
    return cast_scaled_(x, by_row, by_col, format, scale, counters, fitted=True)


# ---------------------------------------- a multiplier for each row and each column


@triton.jit
def _keys_kernel(
    x,
    keys,
    num_rows,
    num_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    """The largest key of each row, then of each column, of those asked for."""
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    best = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        found = _magnitude(_load(x, rows, columns, num_rows, num_cols)) + 0x00800000
        if ROWS:
            top = tl.max(found, axis=1)
            tl.atomic_max(keys + rows, top, mask=rows < num_rows, sem="relaxed")
        best = tl.maximum(best, found)
    if COLS:
        top = tl.max(best, axis=0)
        at = keys + (num_rows if ROWS else 0) + columns
        tl.atomic_max(at, top, mask=columns < num_cols, sem="relaxed")


@triton.jit
def _fitted(
    keys,
    factors,
    places,
    end,
    is_writer,
    MAX: tl.constexpr,
    EXPONENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """The multipliers of some rows or columns, and their factors stored by one program."""
    inside = places < end
    key = tl.load(keys + places, mask=inside, other=0)
    multiplier = _multiplier(key, MAX, EXPONENT, POWER_OF_TWO)
    if is_writer:
        tl.store(factors + places, _inverse(multiplier, POWER_OF_TWO), mask=inside)
    return multiplier


@triton.jit
def _rowwise_cast_kernel(
    x,
    by_row,
    by_col,
    keys,
    row_factors,
    col_factors,
    counters,
    num_rows,
    num_cols,
    padded,
    TYPE: tl.constexpr,
    MAX: tl.constexpr,
    EXPONENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    FITS: tl.constexpr,
    FLUSHED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    values = _load(x, rows, columns, num_rows, num_cols)
    if by_col is not None:
        is_writer = tl.program_id(0) == 0
        col_keys = keys + (0 if by_row is None else num_rows)
        multiplier = _fitted(
            col_keys, col_factors, columns, num_cols, is_writer, MAX, EXPONENT, POWER_OF_TWO
        )[None, :]
        codes = _codes(values, multiplier, TYPE)
        _store_cols(by_col, codes, rows, columns, padded, num_cols)
    if by_row is not None:
        is_writer = tl.program_id(1) == 0
        multiplier = _fitted(
            keys, row_factors, rows, num_rows, is_writer, MAX, EXPONENT, POWER_OF_TWO
        )[:, None]
        codes = _codes(values, multiplier, TYPE)
        _store_rows(by_row, codes, rows, columns, num_rows, num_cols)
    if counters is not None:  # by the multipliers of the rows, if there are any
        none = tl.zeros((BLOCK_R, BLOCK_C // 16), tl.int32)
        tops, counts = _tally(none, none, values, multiplier, FLUSHED)
        _count(
            counters,
            tops,
            counts,
            x,
            multiplier,
            first_row,
            columns,
            num_rows,
            num_cols,
            True,
            FITS,
            BLOCK_R,
        )


def cast_rowwise_(
    x: Tensor,
    by_row: Tensor | None,
    by_col: Tensor | None,
    format: Format,
    counters: Tensor | None,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    """As above, by multipliers for each row and for each column; their factors, `[.., 1]`.

    Two launches and a memset. One orientation at least. The kernels divide the keys themselves:
    around a kernel that writes to a view, torch 2.11 compiles a read past the view's end.
    """
    sizes = [0 if by_row is None else x.shape[0], 0 if by_col is None else x.shape[1]]
    keys = torch.zeros(sum(sizes), dtype=torch.int32, device=x.device)
    row_factors, col_factors = (x.new_empty(size, 1, dtype=torch.float32) for size in sizes)
    amax, tile = _AMAX_TILE, _ROWWISE_TILE
    with on_device(x.device):
        _keys_kernel[_grid(x, amax, amax["TILES"])](
            x,
            keys,
            *x.shape,
            ROWS=by_row is not None,
            COLS=by_col is not None,
            **amax,
        )
        _rowwise_cast_kernel[_grid(x, tile)](
            x,
            by_row,
            by_col,
            keys,
            row_factors,
            col_factors,
            counters,
            *x.shape,
            padded(x.shape[0]),
            TYPE=_TYPES[format.name],
            POWER_OF_TWO=power_of_two,
            **_FORMATS[format.name],
            **tile,
        )
    return row_factors, col_factors


# ---------------------------------------- launching


def _grid(x: Tensor, tile: dict[str, int], tiles: int = 1) -> tuple[int, int]:
    """Neighbours are below each other: what they write of a column is in the same lines."""
    return _blocks(x.shape[0], tile["BLOCK_R"] * tiles), _blocks(x.shape[1], tile["BLOCK_C"])


def _blocks(size: int, block: int) -> int:
    """How many blocks cover `size`; `triton.cdiv` takes the host as long as five operations."""
    return -(-size // block)
