"""Every code of every small format, and every FP32 pattern through split and join.

The oracle is ml_dtypes, which shares no code with torch. It knows nothing of saturation, so values
are clipped in numpy before it rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from mixprec import formats
from mixprec.formats import BF16, E4M3, E5M2, FP16, FP32, Format

SMALL = [BF16, FP16, E4M3, E5M2]
NUMPY: dict[str, Any] = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
for_each_small = pytest.mark.parametrize("format", SMALL, ids=str)
for_each_format = pytest.mark.parametrize("format", formats.ALL, ids=str)
on_each_device = pytest.mark.parametrize("device", DEVICES)


def all_codes(format: Format) -> Tensor:
    """Every bit pattern of a format of at most 16 bits, in order."""
    if format.bits == 8:
        return torch.arange(2**8).to(torch.uint8).view(format.dtype)
    return torch.arange(2**16).to(torch.int16).view(format.dtype)


def fp32_patterns(upper: Tensor, lower: Tensor) -> Tensor:
    """FP32 values of all pairs of 16-bit halves."""
    return ((upper.long()[:, None] << 16) + lower.long()).to(torch.int32).view(torch.float32)


def stratified_fp32() -> Tensor:
    """All 65,536 upper halves with every lower half at which a rounding can change its mind."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])
    random = torch.randint(2**16, (6,), generator=generator)
    return fp32_patterns(torch.arange(2**16), torch.cat([edges, random])).flatten()


def midpoints_and_their_neighbours(format: Format) -> Tensor:
    """The ties between any two adjacent values of `format`, and the FP32 values beside each tie."""
    values = all_codes(format).double()
    values = values[values.isfinite()].unique()
    ties = ((values[:-1] + values[1:]) / 2).float()
    inf = torch.tensor(torch.inf)
    return torch.cat([ties, ties.nextafter(inf), ties.nextafter(-inf)])


def oracle_values(tensor: Tensor, format: Format, saturate: bool) -> np.ndarray[Any, Any]:
    """FP32 values of ml_dtypes' cast of `tensor` to `format`."""
    values = tensor.cpu().double().numpy()
    if saturate:
        values = np.clip(values, -format.max, format.max)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32).astype(NUMPY[format.name]).astype(np.float32)


def assert_same_bits(ours: Tensor, expected: np.ndarray[Any, Any]) -> None:
    """Bitwise, but for the payload and the sign of NaN."""
    found = ours.cpu().float().numpy()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    keep = ~np.isnan(expected)
    np.testing.assert_array_equal(found[keep].view(np.int32), expected[keep].view(np.int32))


# Formats as data


@for_each_format
def test_range_and_spacing_are_those_of_torch_and_ml_dtypes(format: Format) -> None:
    info = torch.finfo(format.dtype)
    assert (format.bits, format.max, format.epsilon) == (info.bits, info.max, info.eps)
    assert format.smallest_normal == info.smallest_normal
    other = ml_dtypes.finfo(NUMPY[format.name])
    assert format.smallest_subnormal == float(other.smallest_subnormal)
    assert (format.exponent_bits, format.mantissa_bits) == (other.nexp, other.nmant)


@for_each_small
def test_every_code_of_a_small_format_has_the_value_that_ml_dtypes_gives_it(format: Format) -> None:
    codes = all_codes(format)
    bits = codes.view(torch.uint8 if format.bits == 8 else torch.int16).numpy()
    assert_same_bits(codes, bits.view(NUMPY[format.name]).astype(np.float32))


@for_each_small
def test_the_largest_and_smallest_values_are_the_ends_of_the_code_table(format: Format) -> None:
    values = all_codes(format).double()
    finite = values[values.isfinite()]
    assert finite.max().item() == format.max
    assert finite[finite > 0].min().item() == format.smallest_subnormal
    assert bool(values.isinf().any()) == format.has_inf


@for_each_format
def test_a_format_is_found_by_its_name_by_torchs_name_and_by_dtype(format: Format) -> None:
    torch_name = str(format.dtype)
    for name in (format.name, format.name.upper(), torch_name, torch_name.removeprefix("torch.")):
        assert formats.by_name(name) is format
    assert formats.by_dtype(format.dtype) is format
    assert str(format) == format.name


def test_unknown_formats_are_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown format 'fp4'; use one of fp32, bf16, fp16, e4m3, e5m2"
    ):
        formats.by_name("fp4")
    with pytest.raises(ValueError, match=r"no format stores torch\.int8; use one of torch.float32"):
        formats.by_dtype(torch.int8)


# Casts


@on_each_device
@for_each_small
@pytest.mark.parametrize("source", SMALL, ids=str)
def test_cast_of_every_small_code_equals_clip_then_ml_dtypes(
    source: Format, format: Format, device: str
) -> None:
    codes = all_codes(source).to(device)
    result = formats.cast(codes, format)
    assert result.dtype == format.dtype
    assert_same_bits(result, oracle_values(codes, format, saturate=True))


@on_each_device
@for_each_small
def test_cast_rounds_ties_to_even_and_their_neighbours_to_the_nearer_value(
    format: Format, device: str
) -> None:
    values = midpoints_and_their_neighbours(format).to(device)
    assert_same_bits(formats.cast(values, format), oracle_values(values, format, saturate=True))


@on_each_device
@for_each_small
def test_cast_of_fp32_equals_clip_then_ml_dtypes_at_every_upper_half(
    format: Format, device: str
) -> None:
    values = stratified_fp32().to(device)
    assert_same_bits(formats.cast(values, format), oracle_values(values, format, saturate=True))


@for_each_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cast_saturates_infinities_keeps_nan_and_keeps_signed_zeros(
    format: Format, dtype: torch.dtype
) -> None:
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0], dtype=dtype)
    result = formats.cast(specials, format).double()
    assert result[:2].tolist() == [format.max, -format.max]
    assert result.isnan().tolist() == [False, False, True, False, False]
    assert result.signbit()[3:].tolist() == [False, True]


@for_each_format
def test_cast_saturates_fp64_values_that_fp32_cannot_hold(format: Format) -> None:
    result = formats.cast(torch.tensor([1e300, -1e300], dtype=torch.float64), format)
    assert result.double().tolist() == [format.max, -format.max]


def test_cast_refuses_integers() -> None:
    with pytest.raises(TypeError, match=r"cast got torch.int64; it needs a floating-point tensor"):
        formats.cast(torch.arange(3), BF16)


@for_each_small
def test_round_to_equals_ml_dtypes_with_overflow_to_inf_where_there_is_one(format: Format) -> None:
    values = torch.cat([stratified_fp32(), midpoints_and_their_neighbours(format)])
    rounded = formats.round_to(values, format)
    assert rounded.dtype == torch.float32
    assert_same_bits(rounded, oracle_values(values, format, saturate=not format.has_inf))


def test_round_to_fp32_changes_nothing() -> None:
    values = stratified_fp32()
    torch.testing.assert_close(
        formats.round_to(values, FP32), values, rtol=0, atol=0, equal_nan=True
    )


def test_round_to_rounds_the_gradient_as_well() -> None:
    values = torch.ones(2, requires_grad=True)
    formats.round_to(values, BF16).backward(torch.tensor([257.0, 1e-3]))
    assert values.grad is not None
    assert values.grad.tolist() == torch.tensor([256.0, 1e-3]).bfloat16().tolist()


def test_round_to_refuses_dtypes_that_cannot_hold_the_result() -> None:
    with pytest.raises(TypeError, match=r"round_to got torch.bfloat16.*give it tensor.float\(\)"):
        formats.round_to(torch.ones(1, dtype=torch.bfloat16), FP16)


# Split and join


def assert_split_is_exact(values: Tensor) -> None:
    """The BF16 half is the oracle's but for ties, and join restores all bits (NaN: as 0x7FC0)."""
    bits = values.view(torch.int32).cpu().numpy()
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float32).astype(ml_dtypes.bfloat16).view(np.int16)
    # Where the oracle rounds a tie down to even, ties-away is the next code up in magnitude.
    expected += (bits & 0x1FFFF) == 0x8000
    remainder = bits.astype(np.int16)
    nan = np.isnan(bits.view(np.float32))
    if nan.any():
        expected, remainder = np.where(nan, [[0x7FC0], [0]], [expected, remainder])
        bits = np.where(nan, 0x7FC00000, bits)
    bf16, int16 = formats.split(values)
    np.testing.assert_array_equal(bf16.view(torch.int16).cpu().numpy(), expected)
    np.testing.assert_array_equal(int16.cpu().numpy(), remainder)
    joined = formats.join(bf16, int16).view(torch.int32).cpu().numpy()
    np.testing.assert_array_equal(joined, bits)


def assert_every_pair_joins_sanely(bf16: Tensor, int16: Tensor) -> None:
    """The bits added where that is a number, else the BF16 value; always rounds back to it."""
    joined = formats.join(bf16, int16)
    again = formats.split(joined)[0]
    added = ((bf16.view(torch.int16).int() << 16) + int16).view(torch.float32)
    # Bitwise but for NaN, whose payload is nobody's: NaN equals NaN, and nothing else.
    nan = bf16.isnan()
    expected = torch.where(added.isnan(), bf16.float(), added).view(torch.int32)
    assert joined.isnan().equal(nan)
    assert joined.view(torch.int32).eq(expected).logical_or_(nan).all()
    assert again.view(torch.int16).eq(bf16.view(torch.int16)).logical_or_(nan).all()


def pairs(int16: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """All 65,536 BF16 codes with each of the given remainders."""
    codes = all_codes(BF16).to(device)
    shape = len(codes), len(int16)
    return codes[:, None].expand(shape).contiguous(), int16.to(device).expand(shape).contiguous()


def stratified_remainders() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    edges = [-(2**15), 1 - 2**15, -2, -1, 0, 1, 2, 2**15 - 2, 2**15 - 1]
    random = torch.randint(-(2**15), 2**15, (8,), generator=generator)
    return torch.cat([torch.tensor(edges), random]).to(torch.int16)


@on_each_device
def test_split_rounds_ties_away_and_join_restores_every_bit_at_every_upper_half(
    device: str,
) -> None:
    assert_split_is_exact(stratified_fp32().to(device))


@on_each_device
def test_every_bf16_code_with_any_remainder_joins_to_a_value_that_rounds_to_it(
    device: str,
) -> None:
    assert_every_pair_joins_sanely(*pairs(stratified_remainders(), device))


def chunks_of_fp32() -> Iterator[Tensor]:
    """All 2^32 FP32 patterns, 2^24 at a time."""
    for start in range(-(2**31), 2**31, 2**24):
        yield torch.arange(start, start + 2**24, dtype=torch.int32).view(torch.float32)


@pytest.mark.slow
def test_split_and_join_are_exact_on_all_fp32_patterns() -> None:
    for values in chunks_of_fp32():
        assert_split_is_exact(values)


@pytest.mark.slow
def test_join_is_sane_on_all_pairs_of_bf16_code_and_remainder() -> None:
    for start in range(-(2**15), 2**15, 2**8):
        assert_every_pair_joins_sanely(
            *pairs(torch.arange(start, start + 2**8, dtype=torch.int16), "cpu")
        )


def test_a_processor_without_the_quick_nan_check_gets_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = stratified_fp32()
    finite = values[values.isfinite()] * 2.0**-20  # the quick check must say "no NaN" here
    assert not formats._may_hold_nan(finite)
    quick = formats.split(finite)
    quick_joined = formats.join(*quick)
    monkeypatch.setattr(formats, "_may_hold_nan", lambda tensor: True)
    careful = formats.split(finite)
    assert all(
        a.view(torch.int16).equal(b.view(torch.int16)) for a, b in zip(quick, careful, strict=True)
    )
    assert formats.join(*careful).view(torch.int32).equal(quick_joined.view(torch.int32))


def test_zeroed_weights_join_to_zero_within_half_the_smallest_bf16_value() -> None:
    weight, remainder = formats.split(torch.randn(1000, generator=torch.Generator().manual_seed(2)))
    for zero in (0.0, -0.0):
        joined = formats.join(torch.full_like(weight, zero), remainder)
        assert joined.signbit().eq(torch.tensor(zero).signbit()).all()
        assert (joined[remainder < 0] == 0).all()
        # A positive remainder of zero is a value of its own, and split must get it back.
        assert (joined.abs() <= BF16.smallest_subnormal / 2).all()


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 10, generator=torch.Generator().manual_seed(3)).t(),
    "every second column": lambda: torch.randn(8, 8, generator=torch.Generator())[:, ::2],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "zero-dimensional": lambda: torch.tensor(-0.1),
    "empty": lambda: torch.empty(0, 3),
    "expanded": lambda: torch.tensor([0.1, 257.0]).expand(3, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_and_join_take_any_layout(layout: str) -> None:
    values = LAYOUTS[layout]()
    bf16, int16 = formats.split(values)
    assert bf16.shape == int16.shape == values.shape
    assert formats.join(bf16, int16).equal(values)


@pytest.mark.parametrize("layout", ["transposed", "every second column", "zero-dimensional"])
def test_split_and_join_write_the_given_outputs_and_leave_the_input_alone(layout: str) -> None:
    values = LAYOUTS[layout]()
    before = values.clone()
    bf16 = torch.zeros_like(values, dtype=torch.bfloat16)
    int16 = torch.zeros_like(values, dtype=torch.int16)
    scratch = torch.zeros_like(values, dtype=torch.int32)
    returned = formats.split(values, out=(bf16, int16), scratch=scratch)
    assert returned[0] is bf16 and returned[1] is int16
    assert values.equal(before)
    assert bf16.equal(formats.split(values)[0])
    out = torch.zeros_like(values)
    assert formats.join(bf16, int16, out=out, scratch=scratch) is out
    assert out.equal(before)


@pytest.mark.parametrize("poison", [0.0, torch.nan])
def test_the_fp32_tensor_may_be_its_own_scratch(poison: float) -> None:
    values = torch.tensor([0.1, -257.0, poison, torch.inf])
    expected = formats.split(values.clone())
    result = formats.split(values, scratch=values.view(torch.int32))
    assert all(
        a.view(torch.int16).equal(b.view(torch.int16))
        for a, b in zip(result, expected, strict=True)
    )


def test_split_takes_parameters_and_records_no_gradient() -> None:
    bf16, int16 = formats.split(torch.nn.Parameter(torch.tensor([1.0, torch.nan])))
    weight = torch.nn.Parameter(bf16)
    assert not bf16.grad_fn and not formats.join(weight, int16).requires_grad


def test_split_and_join_name_the_tensor_of_wrong_dtype_or_shape() -> None:
    values, short = torch.ones(2), torch.ones(3, dtype=torch.int16)
    with pytest.raises(TypeError, match=r"split got fp32 as torch.float16 \[2\]; it must be torch"):
        formats.split(values.half())
    with pytest.raises(
        TypeError, match=r"split got out\[1\] as .*int16 \[3\]; it must be .*int16 \[2\]"
    ):
        formats.split(values, out=(values.bfloat16(), short))
    with pytest.raises(TypeError, match=r"split got out\[0\] as torch.float16"):
        formats.split(values, out=(values.half(), short[:2]))
    with pytest.raises(TypeError, match=r"split got scratch as torch.float32"):
        formats.split(values, scratch=values)
    with pytest.raises(TypeError, match=r"join got bf16 as torch.float16 \[2\]"):
        formats.join(values.half(), short[:2])
    with pytest.raises(TypeError, match=r"join got int16 as .*int16 \[3\]"):
        formats.join(values.bfloat16(), short)
    with pytest.raises(TypeError, match=r"join got out as torch.float32 \[1\]"):
        formats.join(values.bfloat16(), short[:2], out=torch.ones(1))
    with pytest.raises(TypeError, match=r"join got scratch as torch.float32 \[2\]"):
        formats.join(values.bfloat16(), short[:2], scratch=values)


@for_each_format
def test_formats_compare_equal_after_pickling_and_are_frozen(format: Format) -> None:
    import pickle

    assert pickle.loads(pickle.dumps(format)) == format
    with pytest.raises(AttributeError, match="cannot assign to field 'max'"):
        format.max = 1.0  # pyright: ignore[reportAttributeAccessIssue]
