"""FP8 bytes, factors and counters: all 16-bit codes against an independent library, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from mixprec.float8.casts.cast import Operand8, cast_rowwise, cast_scaled, cast_tensorwise
from mixprec.float8.casts.counters import (
    AMAX_BITS,
    FLUSHED,
    NON_FINITE,
    NUM_COUNTERS,
    SATURATED,
    SEEN,
    largest_that_fits,
)
from mixprec.formats import BF16, E4M3, E5M2, Format

FORMATS = [E4M3, E5M2]
THEIRS: dict[Format, Any] = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
Cast = Callable[..., Operand8]


def all_codes(dtype: torch.dtype) -> Tensor:
    """Every 16-bit code, `[256, 256]`."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)


def many_codes() -> Tensor:
    """FP32 codes of every exponent, with mantissas near those of FP8 values and their midpoints."""
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, -1, 0x8000, 0x7FFF], dtype=torch.int32)
    return (upper[:, None] + lower).view(torch.float32)


def power(exponent: int) -> Tensor:
    return torch.tensor([2.0**exponent, 2.0**-exponent])


def numbers(x: Tensor) -> np.ndarray[Any, Any]:
    """`x` in FP32, which holds every input exactly."""
    return x.detach().float().numpy()


def their_bytes(scaled: np.ndarray[Any, Any], format: Format) -> np.ndarray[Any, Any]:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN
        codes = np.clip(scaled, -format.max, format.max).astype(THEIRS[format]).view(np.uint8)
    return codes


def expected_bytes(x: Tensor, multiplier: Any, format: Format) -> Tensor:
    wide = numbers(x)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        codes = their_bytes(wide * np.float32(multiplier), format)
    return torch.from_numpy(np.where(np.isfinite(wide), codes, 0x7F).astype(np.uint8))


def codes_of(operand: Tensor | None) -> Tensor:
    assert operand is not None and operand.is_contiguous()
    return operand.view(torch.uint8)


def new_counters() -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int64)


def check_cols(operand: Operand8) -> None:
    """`cols` is the transpose of `rows`, up to a multiple of 16 with zero bytes."""
    rows, cols = codes_of(operand.rows), codes_of(operand.cols)
    count = rows.shape[0]
    assert cols.shape == (rows.shape[1], -(-count // 16) * 16)
    assert torch.equal(cols[:, :count], rows.t())
    assert not cols[:, count:].any()


# ---------------------------------------- bytes


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exponent", [-20, -9, -1, 0, 1, 6, 20])
def test_every_16_bit_value_gets_the_nearest_byte(
    format: Format, dtype: torch.dtype, exponent: int
) -> None:
    x = all_codes(dtype)
    operand = cast_scaled(x, format, power(exponent))
    assert torch.equal(codes_of(operand.rows), expected_bytes(x, 2.0**exponent, format))
    assert operand.rows is not None and operand.rows.dtype == format.dtype
    check_cols(operand)
    for factor in (operand.row_scale, operand.col_scale):
        assert factor.shape == (1,) and factor.item() == 2.0**-exponent


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_fp32_values_get_the_nearest_byte(format: Format, exponent: int) -> None:
    x = many_codes()
    operand = cast_scaled(x, format, power(exponent), cols=False)
    assert torch.equal(codes_of(operand.rows), expected_bytes(x, 2.0**exponent, format))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_inf_and_nan_become_the_nan_byte_whatever_their_sign(format: Format) -> None:
    nan = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([nan, nan.view(torch.int32).bitwise_or(-0x80000000).view(torch.float32)])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf])])[None]
    for operand in (
        cast_scaled(x, format, power(0)),
        cast_tensorwise(x, format),
        cast_rowwise(x, format),
    ):
        assert (codes_of(operand.rows) == 0x7F).all() and operand.rows.float().isnan().all()  # type: ignore[union-attr]
        assert (codes_of(operand.cols)[:, 0] == 0x7F).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_finite_product_beyond_fp32_saturates(format: Format) -> None:
    x = torch.tensor([[3e38, -3e38]])
    rows = cast_scaled(x, format, power(20), cols=False).rows
    assert rows is not None and rows.float().tolist() == [[format.max, -format.max]]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_largest_value_that_fits_is_the_last_below_the_next_code(format: Format) -> None:
    fits = np.float32(largest_that_fits(format))
    beyond = np.nextafter(fits, np.float32(np.inf))
    with np.errstate(over="ignore", invalid="ignore"):
        ours, next_one = np.array([fits, beyond]).astype(THEIRS[format]).astype(np.float32)
    assert ours == format.max
    assert not np.isfinite(next_one)


# ---------------------------------------- multipliers


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("amax", [1.0, 3.7e-5, 448.0, 447.0, 1e-12, 1e-30, 0.0, 3e38, 2.0**-9])
def test_tensorwise_multipliers_follow_the_rule_in_fp64(
    format: Format, power_of_two: bool, amax: float
) -> None:
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(0)).clamp_(-1, 1) * amax
    x[3, 2] = -amax
    exact = float(np.float32(amax))
    multiplier = np.float32(format.max / max(exact, 1e-12))
    if power_of_two:
        multiplier = np.float32(2.0 ** math.floor(math.log2(multiplier)))
    operand = cast_tensorwise(x, format, power_of_two=power_of_two)
    assert torch.equal(codes_of(operand.rows), expected_bytes(x, multiplier, format))
    check_cols(operand)
    assert operand.row_scale.item() == np.float32(1) / multiplier
    assert operand.row_scale.shape == operand.col_scale.shape == (1,)
    assert operand.row_scale.item() == operand.col_scale.item()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_each_row_and_each_column_is_cast_as_a_tensor_of_its_own(
    format: Format, power_of_two: bool
) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(19, 33, generator=g) * torch.randn(19, 1, generator=g).mul(9).exp()
    x = (x * torch.randn(33, generator=g).mul(3).exp()).bfloat16()
    x[4], x[:, 7] = 0, 0
    operand = cast_rowwise(x, format, power_of_two=power_of_two)
    assert operand.row_scale.shape == (19, 1) and operand.col_scale.shape == (33, 1)
    rows, cols = codes_of(operand.rows), codes_of(operand.cols)
    for i, row in enumerate(x):
        alone = cast_tensorwise(row[None], format, power_of_two=power_of_two)
        assert torch.equal(rows[i], codes_of(alone.rows)[0])
        assert operand.row_scale[i, 0] == alone.row_scale
    for j, column in enumerate(x.t()):
        alone = cast_tensorwise(column[None], format, power_of_two=power_of_two)
        assert torch.equal(cols[j, :19], codes_of(alone.rows)[0])
        assert operand.col_scale[j, 0] == alone.row_scale
    assert not cols[:, 19:].any()


@pytest.mark.parametrize("cast", [cast_tensorwise, cast_rowwise])
def test_a_non_finite_value_leaves_the_other_bytes_as_they_were(cast: Cast) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    x[2, 3] = 0
    clean = cast(x, E5M2)
    for value in (math.inf, -math.inf, math.nan):
        x[2, 3] = value
        dirty = cast(x, E5M2)
        changed = codes_of(dirty.rows) != codes_of(clean.rows)
        assert changed.nonzero().tolist() == [[2, 3]]
        changed = codes_of(dirty.cols) != codes_of(clean.cols)
        assert changed.nonzero().tolist() == [[3, 2]]
        assert torch.equal(dirty.row_scale, clean.row_scale)
        assert torch.equal(dirty.col_scale, clean.col_scale)


@pytest.mark.parametrize("cast", [cast_tensorwise, cast_rowwise])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_zeros_give_zero_bytes_and_finite_factors(cast: Cast, power_of_two: bool) -> None:
    operand = cast(torch.zeros(3, 32), E4M3, power_of_two=power_of_two)
    assert not codes_of(operand.rows).any() and not codes_of(operand.cols).any()
    for factor in (operand.row_scale, operand.col_scale):
        assert (factor.isfinite() & (factor > 0)).all()


# ---------------------------------------- counters


def counted_by_hand(x: Tensor, multiplier: Any, format: Format) -> list[int]:
    """One value at a time, in Python and with the library's bytes."""
    counts = [0] * NUM_COUNTERS
    wide = numbers(x)
    factors = np.broadcast_to(np.float32(multiplier), wide.shape)
    bits = wide.view(np.uint32) & 0x7FFFFFFF
    for value, code, factor in zip(wide.ravel(), bits.ravel(), factors.ravel(), strict=True):
        counts[SEEN] += 1
        code = 0x7FC00000 if code > 0x7F800000 else int(code)
        counts[AMAX_BITS] = max(counts[AMAX_BITS], code)
        if not np.isfinite(value):
            counts[NON_FINITE] += 1
            continue
        product = float(value) * float(factor)  # exact in FP64
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = float(np.float32(product).astype(THEIRS[format]).astype(np.float32))
        counts[SATURATED] += not math.isfinite(rounded)
        counts[FLUSHED] += value != 0 and rounded == 0
    return counts


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("exponent", [-20, 0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_counters_agree_with_a_slow_count(
    format: Format, exponent: int, dtype: torch.dtype
) -> None:
    x = many_codes()[::17] if dtype == torch.float32 else all_codes(dtype)[::3]
    counters = new_counters()
    cast_scaled(x, format, power(exponent), counters)
    assert counters.tolist() == counted_by_hand(x, 2.0**exponent, format)
    assert counters[FLUSHED] > 0 and counters[NON_FINITE] > 0
    assert counters[SATURATED] > 0 or exponent < 0


def test_counters_are_added_to_and_amax_is_kept() -> None:
    counters = new_counters()
    counters[5:] = 7
    for x in ([[1.0, 1e-9]], [[-600.0, math.inf]], [[2.0]]):
        cast_scaled(torch.tensor(x), E4M3, power(0), counters)
    inf = 0x7F800000
    assert counters.tolist() == [inf, 1, 1, 1, 5, 7, 7, 7]


@pytest.mark.parametrize("value", [-1.5, -math.inf, -math.nan])
def test_the_bits_of_the_largest_magnitude_order_finite_inf_and_nan(value: float) -> None:
    counters = new_counters()
    cast_scaled(torch.tensor([[0.25, value]]).half(), E4M3, power(0), counters)
    bits = torch.tensor(abs(value)).view(torch.int32).item()
    assert counters[AMAX_BITS] == (0x7FC00000 if math.isnan(value) else bits)


def test_tensorwise_and_rowwise_count_with_their_own_multipliers() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 31, generator=g) * torch.randn(9, 31, generator=g).mul(12).exp()
    x[0, 0], x[1, 1] = math.nan, 0.0
    finite = numbers(x.nan_to_num(0.0).abs())
    for cast, largest in (
        (cast_tensorwise, finite.max()),
        (cast_rowwise, finite.max(1, keepdims=True)),
        (lambda *a, **k: cast_rowwise(*a, **k, rows=False), finite.max(0, keepdims=True)),
    ):
        counters = new_counters()
        cast(x, E4M3, counters, power_of_two=False)
        multiplier = (448.0 / np.maximum(largest.astype(np.float64), 1e-12)).astype(np.float32)
        assert counters.tolist() == counted_by_hand(x, multiplier, E4M3)
        assert counters[FLUSHED] > 0 and counters[SATURATED] == 0


# ---------------------------------------- shapes


def each_cast(x: Tensor, **options: Any) -> list[Operand8]:
    return [
        cast_scaled(x, E4M3, power(3), **options),
        cast_tensorwise(x, E4M3, **options),
        cast_rowwise(x, E4M3, **options),
    ]


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 40])
def test_the_transpose_is_padded_to_16_rows(num_rows: int) -> None:
    x = torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(0))
    check_cols(each_cast(x)[0])
    check_cols(each_cast(x)[1])
    cols = codes_of(each_cast(x)[2].cols)
    assert cols.shape == (24, -(-num_rows // 16) * 16) and not cols[:, num_rows:].any()


def test_strides_do_not_matter() -> None:
    base = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    views = [
        base.t(),
        base[:, ::2],
        base[1:, 3:],
        base[5].expand(7, 48),
        base[:1, :1].expand(9, 16),
        base.requires_grad_(),
    ]
    for view in views:
        for ours, dense in zip(each_cast(view), each_cast(view.detach().clone()), strict=True):
            for left, right in zip(ours, dense, strict=True):
                assert left is not None and right is not None and not left.requires_grad
                assert torch.equal(left.float(), right.float())
                assert left.is_contiguous()


@pytest.mark.parametrize(("num_rows", "num_cols"), [(0, 32), (16, 0), (0, 0)])
def test_an_empty_matrix_gives_empty_operands_and_finite_factors(
    num_rows: int, num_cols: int
) -> None:
    counters = new_counters()
    operands = each_cast(torch.empty(num_rows, num_cols), counters=counters)
    for operand in operands:
        assert codes_of(operand.rows).shape == (num_rows, num_cols)
        assert codes_of(operand.cols).shape == (num_cols, num_rows)
        assert not codes_of(operand.cols).any()
        assert operand.row_scale.isfinite().all() and operand.col_scale.isfinite().all()
    assert operands[2].row_scale.shape == (num_rows, 1)
    assert operands[2].col_scale.shape == (num_cols, 1)
    assert not counters.any()


def test_only_what_is_asked_for_is_made() -> None:
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for both, rows, cols in zip(
        each_cast(x), each_cast(x, cols=False), each_cast(x, rows=False), strict=True
    ):
        assert rows.cols is None and cols.rows is None
        assert torch.equal(codes_of(rows.rows), codes_of(both.rows))
        assert torch.equal(codes_of(cols.cols), codes_of(both.cols))
        assert torch.equal(rows.row_scale, both.row_scale)
        assert torch.equal(cols.col_scale, both.col_scale)


def test_out_is_overwritten_with_its_padding_and_returned() -> None:
    g = torch.Generator().manual_seed(0)
    first = cast_scaled(torch.randn(20, 32, generator=g), E4M3, power(0))
    x = torch.randn(20, 32, generator=g)
    codes_of(first.cols).fill_(0x55)
    again = cast_scaled(x, E4M3, power(2), out=(first.rows, first.cols))
    assert again.rows is first.rows and again.cols is first.cols
    assert torch.equal(codes_of(again.rows), expected_bytes(x, 4.0, E4M3))
    check_cols(again)


def test_a_factor_stays_when_the_exponent_moves() -> None:
    scale = power(3)
    operand = cast_scaled(torch.ones(1, 16), E4M3, scale)
    scale.copy_(power(5))
    assert operand.row_scale.item() == operand.col_scale.item() == 2.0**-3


# ---------------------------------------- errors


@pytest.mark.parametrize(
    "cast", [lambda x, f: cast_scaled(x, f, power(0)), cast_tensorwise, cast_rowwise]
)
def test_bad_input_is_named(cast: Cast) -> None:
    with pytest.raises(TypeError, match=r"x as torch\.float64; it takes BF16, FP16 or FP32"):
        cast(torch.zeros(2, 2, dtype=torch.float64), E4M3)
    with pytest.raises(ValueError, match=r"x of shape \[2, 3, 4\]; it takes a matrix"):
        cast(torch.zeros(2, 3, 4), E4M3)
    with pytest.raises(ValueError, match="format bf16; the FP8 formats are e4m3 and e5m2"):
        cast(torch.zeros(2, 2), BF16)
