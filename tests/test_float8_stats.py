from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from mixprec import float8_stats, formats
from mixprec.float8_stats import Counted
from mixprec.formats import E4M3, E5M2, Format


def counted(x: Tensor, format: Format, exponent: int) -> Tensor:
    """The counters that a cast of `x` leaves, counted one by one in FP64."""
    values = x.double()
    scaled = values * 2.0**exponent
    finite = values.isfinite()
    cast = formats.cast(scaled.float(), format).double()
    amax = 0x7FC00000 if bool(values.isnan().any()) else bits(float(values.abs().max()))
    saturated = finite & (scaled.abs() > format.max)
    flushed = (values != 0) & (cast == 0)
    counts = [amax, *(int(each.sum()) for each in (saturated, flushed, ~finite)), x.numel()]
    return torch.tensor([*counts, 0, 0, 0])


def bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def counters(
    amax: float, saturated: int = 0, flushed: int = 0, nonfinite: int = 0, values: int = 1000
) -> Tensor:
    return torch.tensor([bits(amax), saturated, flushed, nonfinite, values, 0, 0, 0])


def test_rates_are_counts_over_all_values() -> None:
    row = float8_stats.row("up", "input", E4M3, 2, counters(1.5, 30, 250, 7))
    assert (row.layer, row.role, row.format, row.exponent) == ("up", "input", E4M3, 2)
    assert (row.values, row.saturated, row.flushed, row.nonfinite) == (1000, 0.03, 0.25, 7)
    assert (row.amax, row.log2_amax) == (1.5, math.log2(1.5))


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("log2_rms", range(-40, 41, 5))
def test_the_exponent_named_mends_a_gaussian_of_any_size(format: Format, log2_rms: int) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2.0**log2_rms
    row = float8_stats.row("layer", "input", format, 0, counted(x, format, 0))
    if row.fix is None:
        assert not row.saturates and not row.flushes
        return
    assert row.saturates or row.flushes
    mended = float8_stats.row("layer", "input", format, row.fix, counted(x, format, row.fix))
    assert not mended.saturates and not mended.flushes and mended.fix is None
    # One binade is left, and not two.
    assert format.max / 4 < mended.amax * 2.0**row.fix <= format.max / 2


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("amax", [448.0, 449.0, 57344.0, 1.0, 2.0**-149, 2.0**-126, 3.4e38, 1.75])
def test_the_highest_exponent_fits_and_the_next_does_not(format: Format, amax: float) -> None:
    exponent = float8_stats.highest_exponent(amax, format, headroom=0)
    assert exponent is not None
    assert math.ldexp(amax, exponent) <= format.max < math.ldexp(amax, exponent + 1)


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_no_exponent_follows_from_zero_or_from_what_is_not_finite(amax: float) -> None:
    assert float8_stats.highest_exponent(amax, E4M3) is None
    row = float8_stats.row("layer", "input", E4M3, 0, counters(amax, saturated=10))
    assert row.fix is None


def test_nothing_is_proposed_where_nothing_is_wrong() -> None:
    # Ten in a million saturate, and four in a hundred become 0: both below their limits.
    row = float8_stats.row("layer", "input", E4M3, 0, counters(500.0, 10, 40_000, 0, 1_000_000))
    assert row.fix is None
    assert float8_stats.Stats((row,)).warnings() == []


def test_no_exponent_is_proposed_where_both_ends_lose() -> None:
    row = float8_stats.row("a.down", "input", E4M3, 0, counters(2.0**12, 30, 100))
    assert row.fix is None
    (warning,) = float8_stats.Stats((row,)).warnings()
    assert warning == (
        "a.down input: 3 % of values are above E4M3's 448 and 10 % become 0 in E4M3 (exponent 0, "
        "largest 2^12.0); no exponent holds both ends, use overrides={'a.down': 'rowwise'} or "
        "overrides={'a.down': 'bf16'}"
    )


def test_no_higher_exponent_is_proposed_where_the_largest_value_leaves_no_room() -> None:
    row = float8_stats.row("a", "grad_output", E5M2, 0, counters(30000.0, 0, 100))
    assert row.flushes and row.fix is None


def test_a_factor_of_its_own_is_no_exponent_to_change() -> None:
    row = float8_stats.row("a", "grad_output", E5M2, None, counters(1e-20, 0, 600))
    assert row.fix is None
    (warning,) = float8_stats.Stats((row,)).warnings()
    assert warning == (
        "a grad_output: 60 % become 0 in E5M2 (dynamic, largest 2^-66.4); no exponent holds both "
        "ends, use overrides={'a': 'rowwise'} or overrides={'a': 'bf16'}"
    )


def test_warnings_come_worst_first() -> None:
    rows = (
        float8_stats.row("zeros", "grad_output", E5M2, 0, counters(2.0**-17, 0, 310)),
        float8_stats.row("sound", "weight", E4M3, 0, counters(1.0)),
        float8_stats.row("few", "input", E4M3, 0, counters(2.0**11, 2)),
        float8_stats.row("overflow", "input", E4M3, 0, counters(math.inf, 5, 0, 3)),
        float8_stats.row("many", "input", E4M3, 0, counters(2.0**11, 20)),
    )
    assert float8_stats.Stats(rows).warnings() == [
        "overflow input: 3 of 1000 values are inf or NaN, which no exponent mends; look for the "
        "first layer that makes them, or lower the loss scale",
        "many input: 2 % of values are above E4M3's 448 (exponent 0, largest 2^11.0); use exponent "
        "-4, or overrides={'many': 'adaptive'}",
        "few input: 0.2 % of values are above E4M3's 448 (exponent 0, largest 2^11.0); use "
        "exponent -4, or overrides={'few': 'adaptive'}",
        "zeros grad_output: 31 % become 0 in E5M2 (exponent 0, largest 2^-17.0); use exponent +31, "
        "or overrides={'zeros': 'adaptive'}",
    ]


def test_the_table_has_a_row_an_operand_in_the_models_order() -> None:
    stats = float8_stats.read(
        [
            Counted("0.down", "input", E4M3, 0, counters(2.0**11, 21)),
            Counted("0.down", "weight", E4M3, 6, counters(0.03)),
            Counted("0.down", "grad_output", E5M2, None, counters(0.0)),
            Counted("head", "input", E4M3, 0, torch.zeros(8, dtype=torch.int64)),
            Counted("head", "weight", E4M3, -1, counters(math.nan, nonfinite=1)),
        ]
    )
    assert str(stats).splitlines() == [
        "layer   role         format  exponent  largest  saturated  to zero  use",
        "0.down  input        e4m3           0   2^11.0      2.1 %        0   -4",
        "0.down  weight       e4m3          +6   2^-5.1          0        0",
        "0.down  grad_output  e5m2     dynamic        0          0        0",
        "head    input        e4m3           0        -          -        -",
        "head    weight       e4m3          -1      nan          0        0",
    ]
    assert str(float8_stats.Stats(())) == "no FP8 layers"


def test_what_no_cast_has_seen_has_no_rates_and_no_warning() -> None:
    row = float8_stats.row("layer", "weight", E4M3, 0, torch.zeros(8, dtype=torch.int64))
    assert math.isnan(row.saturated) and math.isnan(row.flushed)
    assert row.log2_amax == -math.inf and row.fix is None
    assert float8_stats.Stats((row,)).warnings() == []


def test_all_layers_are_read_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        Counted(str(i), "input", E4M3, torch.tensor(i) if i % 2 else i, counters(1.0, values=i + 1))
        for i in range(20)
    ]
    copies: list[torch.Size] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: (copies.append(t.shape), tolist(t))[1])
    stats = float8_stats.read(entries)
    assert copies == [torch.Size([20 * 8 + 10])]
    assert [row.values for row in stats.rows] == list(range(1, 21))
    assert [row.exponent for row in stats.rows] == list(range(20))


@pytest.mark.parametrize("wrong", [torch.zeros(8), torch.zeros(7, dtype=torch.int64)])
def test_counters_of_another_kind_are_refused(wrong: Tensor) -> None:
    with pytest.raises(TypeError, match=r"counters of up input are torch\.\w+ \[\d\]; a cast coun"):
        float8_stats.row("up", "input", E4M3, 0, wrong)
    with pytest.raises(TypeError, match=r"exponent of up input has shape \[2\]; a tensor has one"):
        float8_stats.read([Counted("up", "input", E4M3, torch.zeros(2), counters(1.0))])
