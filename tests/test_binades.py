from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from waiting import no_waiting

from mixprec import formats
from mixprec.binades import (
    BINS,
    MAX_FLUSHED,
    MAX_SATURATED,
    Binades,
    Rates,
    Window,
    count,
)
from mixprec.formats import BF16, E4M3, E5M2, FP16, FP32, Format


def binades(*tensors: Tensor) -> Binades:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for tensor in tensors:
        count(tensor, counts)
    return Binades(counts.tolist())


def codes(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit format."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_code_is_in_its_binade(dtype: torch.dtype) -> None:
    x = codes(dtype)
    found = binades(x)
    finite = x[x.isfinite() & (x != 0)].double()
    # FP32's subnormals, which BF16 has as well, are one binade.
    expected = torch.frexp(finite).exponent.sub(1).clamp(min=-127)
    values, numbers = expected.unique(return_counts=True)
    assert found.histogram == dict(zip(values.tolist(), numbers.tolist(), strict=True))
    assert (found.zeros, found.infs, found.nans) == (2, 2, int(x.isnan().sum()))
    assert found.values == 2**16 and found.present == finite.numel()


def lost(x: Tensor, format: Format, exponent: int) -> Rates:
    """What a cast of FP64 values does, value by value."""
    scaled = x.double() * 2.0**exponent
    size = scaled.abs()
    saturated = scaled.isfinite() & (size > format.max)
    flushed = (size > 0) & (size <= format.smallest_subnormal / 2)
    subnormal = (size > 0) & ~flushed & (size < format.smallest_normal)
    return Rates(*(float(each.double().mean()) for each in (saturated, subnormal, flushed)))


@pytest.mark.parametrize("format", [FP16, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("exponent", [*range(-40, 41, 7), 3, -1])
def test_rates_are_those_of_a_cast_of_every_bf16_code(format: Format, exponent: int) -> None:
    x = codes(torch.bfloat16)
    x = x[(x == 0) | ~x.isfinite() | (x.double().abs() >= 2.0**-126)]
    assert binades(x).rates(format, exponent) == lost(x, format, exponent)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_flushed_is_what_torch_turns_into_zero(format: Format) -> None:
    x = codes(torch.float16)
    x = x[x.isfinite()]
    zero = (formats.cast(x, format).float() == 0) & (x != 0)
    assert binades(x).rates(format).flushed == float(zero.double().mean())


@pytest.mark.parametrize("format", [BF16, FP32], ids=str)
def test_wide_formats_lose_nothing_of_fp16(format: Format) -> None:
    assert binades(codes(torch.float16)).rates(format) == Rates(0.0, 0.0, 0.0)


@pytest.mark.parametrize("format", [FP16, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("log2_rms", range(-60, 61, 12))
def test_the_window_is_all_exponents_within_both_limits(format: Format, log2_rms: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 2.0**log2_rms
    found = binades(x)
    window = found.window(format)
    assert window is not None and window.low <= window.high
    within = [
        e
        for e in range(window.low - 5, window.high + 6)
        if (rates := lost(x, format, e)).saturated <= MAX_SATURATED and rates.flushed <= MAX_FLUSHED
    ]
    assert within == list(range(window.low, window.high + 1))
    assert found.rates(format, window.middle).fits
    assert (0 in window) == found.rates(format).fits


def test_where_nothing_fits_the_middle_does_not_saturate() -> None:
    x = 2.0 ** torch.linspace(-60, 60, 1000)
    found = binades(x)
    window = found.window(E4M3)
    assert window is not None and window.low > window.high
    assert found.rates(E4M3, window.middle).saturated <= MAX_SATURATED
    assert found.rates(E4M3, window.middle + 1).saturated > MAX_SATURATED


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(0), torch.tensor([math.inf, math.nan])])
def test_without_a_finite_value_there_is_no_window(x: Tensor) -> None:
    assert binades(x).window(E4M3) is None
    assert binades(x).rates(E4M3) == Rates(0.0, 0.0, 0.0)
    assert binades(x).histogram == {}


def test_shares_are_of_all_values_zeros_and_nan_too() -> None:
    x = torch.tensor([1000.0, 0.0, math.nan, math.inf])
    assert binades(x).rates(E4M3) == Rates(0.25, 0.0, 0.0)


def test_counts_add_up_over_calls_pieces_strides_and_dtypes() -> None:
    x = torch.randn(3, 2**18, generator=torch.Generator().manual_seed(0))
    whole = binades(x)
    assert whole.values == x.numel()
    assert binades(*x).counts == binades(x.t()).counts == binades(x.double()).counts == whole.counts
    assert binades(x[:, ::2], x[:, 1::2]).counts == whole.counts
    eight = x.to(torch.float8_e4m3fn)
    assert binades(eight).counts == binades(eight.float()).counts
    assert binades(torch.tensor(2.0)).histogram == {1: 1}


def test_fp64_beyond_fp32_counts_as_rounded() -> None:
    found = binades(torch.tensor([1e300, 1e-300], dtype=torch.float64))
    assert (found.infs, found.zeros) == (1, 1)


def test_the_middle_of_a_window_is_halfway() -> None:
    assert Window(-4, 7).middle == 1
    assert 7 in Window(-4, 7) and 8 not in Window(-4, 7)


def one_nan(counts: list[int]) -> list[int]:
    """Counts with all NaN together: a GPU widens every NaN to the same one."""
    return [*counts[: 255 * 4 + 1], sum(counts[255 * 4 + 1 :])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_counts_as_a_cpu_does_and_the_host_does_not_wait(
    dtype: torch.dtype, deterministic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(2**23 + 3, generator=generator)
        * torch.randn(2**23 + 3, generator=generator).exp2()
    )
    x[:4] = torch.tensor([0.0, math.inf, math.nan, -1.75])
    x = torch.cat([x.to(dtype), codes(torch.bfloat16).to(dtype)])
    on_device, counts = x.cuda(), torch.zeros(BINS, dtype=torch.int64, device="cuda")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with no_waiting():
            count(on_device, counts)
            count(on_device, counts)
    finally:
        torch.use_deterministic_algorithms(before)
    on_gpu, on_cpu = (one_nan(found) for found in (counts.tolist(), binades(x, x).counts))
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(on_gpu, on_cpu, strict=True)) if a != b]
    assert not wrong, f"bins (index, on the GPU, on the CPU): {wrong[:10]}"
