from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixprec
from mixprec import float8
from mixprec.float8.casts.cast import cast_scaled
from mixprec.float8.recipe import Cast
from mixprec.float8.stats import Counted, Row, Stats, read, row
from mixprec.formats import E4M3, E5M2, Format

GRADS = Cast(E5M2)


def bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def counters(
    amax: float, saturated: int = 0, flushed: int = 0, nonfinite: int = 0, values: int = 1000
) -> Tensor:
    return torch.tensor([bits(amax), saturated, flushed, nonfinite, values, 0, 0, 0])


def cast_row(x: Tensor, format: Format, exponent: int) -> Row:
    """The row that a cast of `x` leaves."""
    counts = torch.zeros(8, dtype=torch.int64)
    cast_scaled(x, format, torch.tensor([2.0**exponent, 2.0**-exponent]), counts)
    return row("layer", "input", Cast(format, "static", exponent), exponent, counts)


def test_rates_are_counts_over_all_values() -> None:
    r = row("up", "input", Cast(E4M3, exponent=2), 2, counters(1.5, 30, 250, 7))
    assert (r.layer, r.role, r.format, r.exponent) == ("up", "input", E4M3, 2)
    assert (r.values, r.saturated, r.flushed, r.nonfinite) == (1000, 0.03, 0.25, 7)
    assert (r.amax, r.log2_amax) == (1.5, math.log2(1.5))


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("log2_rms", range(-40, 41, 5))
def test_the_exponent_named_mends_a_gaussian_of_any_size(format: Format, log2_rms: int) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 2.0**log2_rms
    before = cast_row(x, format, 0)
    if before.fix is None:
        assert not before.saturates and not before.flushes
        return
    assert before.saturates or before.flushes
    after = cast_row(x, format, before.fix)
    assert not after.saturates and not after.flushes and after.fix is None
    # One to two binades are left above, below the largest power of two that fits.
    top = 2.0 ** (math.frexp(format.max)[1] - 1)
    assert top / 4 <= after.amax * 2.0**before.fix < top / 2


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_no_exponent_follows_from_zero_or_from_what_is_not_finite(amax: float) -> None:
    assert row("layer", "input", Cast(), 0, counters(amax, saturated=10)).fix is None


def test_nothing_is_proposed_where_nothing_is_wrong() -> None:
    # Ten in a million saturate, and four in a hundred become 0: both below their limits.
    r = row("layer", "input", Cast(), 0, counters(500.0, 10, 40_000, 0, 1_000_000))
    assert r.fix is None
    assert Stats((r,)).warnings() == []


def test_no_exponent_is_proposed_where_both_ends_lose() -> None:
    r = row("a.down", "input", Cast(), 0, counters(2.0**12, 30, 100))
    assert r.fix is None
    assert Stats((r,)).warnings() == [
        "a.down input: 3 % of values are clipped to E4M3's 448 and 10 % of values become 0 in E4M3 "
        "at exponent 0, and the largest is 2^12.0. No exponent holds both its ends. Write "
        "mixprec.Precision('fp8').revert(model) and convert(model, overrides={'a.down': "
        "'rowwise'}), which gives each row its own, or overrides={'a.down': 'bf16'}."
    ]


def test_no_higher_exponent_is_proposed_where_the_largest_value_leaves_no_room() -> None:
    r = row("a", "grad_output", GRADS, 0, counters(30000.0, 0, 100))
    assert r.flushes and r.fix is None


@pytest.mark.parametrize(
    ("scaling", "remedy"),
    [
        (
            "tensorwise",
            "No exponent holds both its ends. Write mixprec.Precision('fp8').revert(model) and "
            "convert(model, overrides={'a': 'rowwise'}), which gives each row its own, or "
            "overrides={'a': 'bf16'}.",
        ),
        (
            "rowwise",
            "A multiplier for each row does not hold it. Write mixprec.Precision('fp8')."
            "revert(model) and convert(model, overrides={'a': 'bf16'}).",
        ),
    ],
)
def test_multipliers_of_their_own_are_no_exponent_to_change(scaling: Any, remedy: str) -> None:
    r = row("a", "grad_output", Cast(E5M2, scaling), None, counters(1e-20, 0, 600))
    assert r.fix is None
    assert Stats((r,)).warnings() == [
        f"a grad_output: 60 % of values become 0 in E5M2 ({scaling}), and the largest is 2^-66.4. "
        f"{remedy}"
    ]


def test_an_adaptive_exponent_is_not_to_be_changed_by_hand() -> None:
    plan = Cast(E4M3, "adaptive")
    moved = row("a", "input", plan, -4, counters(2.0**10, 30))
    moving = row("b", "input", plan, 0, counters(2.0**10, 30))
    assert moved.fix is None and moving.fix == -4
    assert [warning.partition("2^10.0. ")[2] for warning in Stats((moved, moving)).warnings()] == [
        "The exponent has moved to -4 since, which should end it.",
        "It adapts: the next optimizer step moves its exponent to -4.",
    ]


def test_warnings_come_worst_first() -> None:
    rows = (
        row("zeros", "grad_output", GRADS, 0, counters(2.0**-17, 0, 310)),
        row("sound", "weight", Cast(), 0, counters(1.0)),
        row("few", "input", Cast(), 0, counters(2.0**11, 2)),
        row("overflow", "input", Cast(), 0, counters(math.inf, 5, 0, 3)),
        row("many", "input", Cast(), 0, counters(2.0**11, 20)),
    )
    overflow, *others = Stats(rows).warnings()
    assert overflow == (
        "overflow input: 3 of 1000 values are inf or NaN, which no exponent mends. Look for the "
        "first layer that makes them with mixprec.watch(model), or lower the loss scale."
    )
    assert [warning.partition(" Write")[0] for warning in others] == [
        "many input: 2 % of values are clipped to E4M3's 448 at exponent 0, and the largest is "
        "2^11.0. It needs exponent -5.",
        "few input: 0.2 % of values are clipped to E4M3's 448 at exponent 0, and the largest is "
        "2^11.0. It needs exponent -5.",
        "zeros grad_output: 31 % of values become 0 in E5M2 at exponent 0, and the largest is "
        "2^-17.0. It needs exponent +30.",
    ]


def test_the_table_has_a_row_an_operand_in_the_models_order() -> None:
    rows = (
        row("0.down", "input", Cast(), 0, counters(2.0**11, 21)),
        row("0.down", "weight", Cast(E4M3, "adaptive"), 6, counters(0.03)),
        row("0.down", "grad_output", Cast(E5M2, "tensorwise"), None, counters(0.0)),
        row("head", "input", Cast(), 0, torch.zeros(8, dtype=torch.int64)),
        row("head", "weight", Cast(), -1, counters(math.nan, nonfinite=1)),
    )
    assert str(Stats(rows)).splitlines() == [
        "layer   role         as               exponent  largest  saturated  to zero  use",
        "0.down  input        e4m3 static             0   2^11.0      2.1 %        0   -5",
        "0.down  weight       e4m3 adaptive          +6   2^-5.1          0        0",
        "0.down  grad_output  e5m2 tensorwise         -        0          0        0",
        "head    input        e4m3 static             0        -          -        -",
        "head    weight       e4m3 static            -1      nan          0        0",
    ]
    assert str(Stats(())) == "no FP8 layers"


def test_what_no_cast_has_seen_has_no_rates_and_no_warning() -> None:
    r = row("layer", "weight", Cast(), 0, torch.zeros(8, dtype=torch.int64))
    assert math.isnan(r.saturated) and math.isnan(r.flushed)
    assert r.log2_amax == -math.inf and r.fix is None
    assert Stats((r,)).warnings() == []


def scale(exponent: int) -> Tensor:
    return torch.tensor([2.0**exponent, 2.0**-exponent])


def test_all_layers_are_read_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    none = torch.zeros(8, dtype=torch.int64)
    entries = [
        Counted(str(e), "input", Cast(E4M3, "adaptive"), scale(e), counters(1.0, 0, e + 64), none)
        for e in range(-64, 65)
    ]
    copies: list[torch.Size] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda t: (copies.append(t.shape), cpu(t))[1])
    rows = read(entries).rows
    assert copies == [torch.Size([129 * 17])]
    assert [r.exponent for r in rows] == list(range(-64, 65))
    assert [r.flushed for r in rows] == [i / 1000 for i in range(129)]


def test_the_last_step_stands_until_the_next_has_cast_something() -> None:
    none, last = torch.zeros(8, dtype=torch.int64), counters(2.0, values=7)
    entries = [
        Counted("a", "input", Cast(), scale(0), none, last),
        Counted("a", "weight", Cast(), scale(0), counters(1.0, values=5), last),
        Counted("a", "grad_output", Cast(E5M2, "rowwise"), scale(0), none, none),
    ]
    rows = read(entries).rows
    assert [r.values for r in rows] == [7, 5, 0]
    assert [r.exponent for r in rows] == [0, 0, None]


@pytest.mark.parametrize("wrong", [torch.zeros(8), torch.zeros(7, dtype=torch.int64)])
def test_counters_of_another_kind_are_refused(wrong: Tensor) -> None:
    with pytest.raises(TypeError, match=r"counters of up input are torch\.\w+ \[\d\]; a cast coun"):
        row("up", "input", Cast(), 0, wrong)
    with pytest.raises(TypeError, match=r"counters of up input are torch\.\w+ \[\d\]; a cast coun"):
        read([Counted("up", "input", Cast(), scale(0), wrong, wrong)])


@pytest.mark.parametrize("recipe", ["static", "adaptive", "tensorwise", "rowwise"])
def test_stats_of_a_model_are_those_of_its_last_step(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    float8.convert(model, recipe, min_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for size in (1.0, 10000.0):
        model(size * torch.randn(48, 32, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
    stats = mixprec.Precision("fp8").stats(model)
    assert [(r.layer, r.role) for r in stats.rows] == [
        (layer, role) for layer in ("0", "2") for role in ("input", "weight", "grad_output")
    ]
    first, weight = stats.rows[:2]
    assert (first.values, weight.values) == (48 * 32, 32 * 64)
    assert 2.0**13 < first.amax < 2.0**17
    dynamic = recipe in ("tensorwise", "rowwise")
    # The adaptive exponent was fitted to the first step, and moved after the second.
    expected = None if dynamic else first.fitting if recipe == "adaptive" else 0
    assert first.exponent == expected
    assert (first.saturated > 0.5) == (not dynamic)
    remedies = [w for w in stats.warnings() if w.startswith("0 input")]
    wanted = {
        "static": f"It needs exponent {first.fix}.",
        "adaptive": f"The exponent has moved to {first.fitting} since, which should end it.",
    }
    assert [
        w.partition(f"2^{first.log2_amax:.1f}. ")[2].partition(" Write")[0] for w in remedies
    ] == ([] if dynamic else [wanted[recipe]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_and_a_cpu_have_the_same_stats() -> None:
    def table(device: str) -> str:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32)
        ).bfloat16()
        float8.convert(model, "static", min_dim=16)
        model.to(device)
        x = 100 * torch.randn(48, 32, dtype=torch.bfloat16)
        model[0](x.to(device))  # no second layer, whose input may differ by a rounding
        return str(float8.stats(model))

    assert table("cuda") == table("cpu")
