"""One advice on exponents: the same from both sides, and what it says to write ends the fault."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixprec
from mixprec.float8.advice import better, fitting, remedy
from mixprec.float8.recipe import Cast, Recipe
from mixprec.formats import E4M3, E5M2, FP16
from mixprec.ranges.watch import Watch


def gauss(size: float, seed: int = 0) -> Tensor:
    return size * torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))


def outlier(size: float) -> Tensor:
    """One value in 2048 far above the rest, which no exponent holds."""
    x = gauss(1.0)
    x[0, 0] = size
    return x


INPUTS = {
    "large": gauss(1000.0),
    "tiny": gauss(1e-7),
    "far": gauss(1e8),
    "wide": 2.0 ** torch.linspace(-30, 20, 2048).view(64, 32),
    "sound": gauss(1.0),
    "zero": torch.zeros(64, 32),
}


def ran(recipe: Any, x: Tensor, overrides: Any = None) -> tuple[nn.Module, Watch]:
    """A model that was converted and watched in a step with a loss gradient of 2^-30."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    mixprec.Precision("fp8", recipe=recipe).convert(model, min_dim=16, overrides=overrides)
    with mixprec.watch(model) as report:
        (2.0**-30 * model(x.bfloat16()).float()).sum().backward()
    return model, report


def said(warnings: list[str], role: str) -> list[str]:
    return [w.partition(". ")[2] for w in warnings if w.startswith(f"0 {role}: ")]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("role", ["input", "weight", "grad_output"])
def test_watch_and_stats_advise_the_same(name: str, role: str) -> None:
    model, report = ran("static", INPUTS[name])
    watched = {row.role: row for row in report.rows()}
    counted = {row.role: row for row in mixprec.Precision("fp8").stats(model).rows}
    assert watched[role].fix == counted[role].fix
    plain = [
        re.sub(r" \([-+\d]+ to [-+\d]+ fit\)", "", text) for text in said(report.warnings(), role)
    ]
    assert plain == said(mixprec.Precision("fp8").stats(model).warnings(), role)


@pytest.mark.parametrize("name", ["large", "tiny", "far"])
def test_what_it_says_to_write_ends_the_fault(name: str) -> None:
    _, before = ran("static", INPUTS[name])
    for role in ("input", "grad_output"):
        (text,) = said(before.warnings(), role)
        written = re.findall(r"overrides=(\{.*?\})(?:, which|\)|\.)", text)
        assert len(written) == 2
        for overrides in written:
            _, after = ran("static", INPUTS[name], eval(overrides, {"mixprec": mixprec}))
            assert not said(after.warnings(), role)


def test_an_outlier_is_too_far_at_once_for_watch_and_one_step_later_for_stats() -> None:
    """Counters do not know what another exponent would turn into 0; a histogram does."""
    x = outlier(2.0**20)
    model, report = ran("static", x)
    (watched,) = said(report.warnings(), "input")
    (counted,) = said(mixprec.Precision("fp8").stats(model).warnings(), "input")
    assert watched.startswith("No exponent holds both its ends.")
    assert counted.startswith("It needs exponent -14.")
    model, report = ran("static", x, {"0": Recipe(input=Cast(exponent=-14))})
    assert said(report.warnings(), "input") == [watched]
    assert said(mixprec.Precision("fp8").stats(model).warnings(), "input") == [watched]


def test_a_tensor_that_no_exponent_holds_is_advised_rows() -> None:
    _, before = ran("static", INPUTS["wide"])
    (text,) = said(before.warnings(), "input")
    assert text.startswith("No exponent holds both its ends. Write mixprec.Precision('fp8').revert")
    assert "convert(model, overrides={'0': 'rowwise'})" in text


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_the_exponent_is_the_one_that_adaptive_moves_to(format: Any) -> None:
    from mixprec.float8.exponents import fitting_exponent, top_of

    for amax in [1.0, 0.75, 1.999, 448.0, 1e-30, 1e30, 2.0**-20, 3.0]:
        expected = int(fitting_exponent(torch.tensor(amax), top_of(format)))
        assert fitting(amax, format) == expected
        assert format.max / 8 < amax * 2.0**expected < format.max or abs(expected) == 64
    for nothing in (0.0, float("inf"), float("nan")):
        assert fitting(nothing, format) is None


def test_an_exponent_is_advised_only_where_it_helps() -> None:
    loses = {"saturates": True, "flushes": False}
    fades = {"saturates": False, "flushes": True}
    assert better(1024.0, E4M3, 0, **loses) == -4
    assert better(1024.0, E4M3, -4, **loses) is None
    assert better(1024.0, E4M3, None, **loses) is None
    assert better(1024.0, E4M3, 0, **fades) is None
    assert better(2.0**-20, E4M3, 0, **fades) == 26
    assert better(1024.0, E4M3, 0, saturates=True, flushes=True) is None
    assert better(1024.0, E4M3, 0, saturates=False, flushes=False) is None


def test_several_layers_that_adapt_are_told_where_to() -> None:
    adapts = Cast(E4M3, "adaptive")
    assert remedy("*", "input", adapts, E4M3, [-6, 2]) == (
        "It adapts: the next optimizer step moves its exponent to -6 to +2."
    )


def test_a_layer_without_a_name_is_overridden_by_a_star() -> None:
    model = nn.Linear(32, 64, bias=False)
    mixprec.Precision("fp8", recipe="static").convert(model, min_dim=16)
    model(gauss(1000.0).bfloat16())
    (text,) = mixprec.Precision("fp8").stats(model).warnings()
    assert text.startswith("(model) input: ") and "overrides={'*': 'adaptive'}" in text


def test_values_in_the_highest_quarter_of_a_binade_do_not_saturate_tensorwise() -> None:
    x = 0.97 + 0.02 * torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    _, report = ran("tensorwise", x)
    assert not said(report.warnings(), "input")


# ------------------------------------------------------------------ FP16, before a cast


def sentences(x: Tensor, loss_weight: float = 1.0, dtype: torch.dtype = torch.float32) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 4)).to(dtype)
    with mixprec.watch(model) as report:
        (loss_weight * model(x.to(dtype)).float()).sum().backward()
    return [w for w in report.warnings() if "FP16" in w]


def test_what_fp16_would_lose_is_said_before_a_cast() -> None:
    assert sentences(gauss(1.0)) == []
    assert sentences(gauss(30000.0)) == [
        "In FP16 1 tensor would hold inf: of 0 input 3.5 % of values are above 65504. Use BF16, "
        "which has the range of FP32: mixprec.cast_model(model, 'bf16')."
    ]
    assert sentences(gauss(1e-9))[-1] == (
        "In FP16 3 tensors would lose small values: of 0 input 100 % become 0, which no loss scale "
        "mends. Use BF16: mixprec.cast_model(model, 'bf16')."
    )
    # Models that are 16-bit already are judged by what they are.
    assert sentences(gauss(30000.0), dtype=torch.bfloat16) == []


def test_the_loss_scale_that_is_said_keeps_fp16_gradients() -> None:
    (text,) = sentences(gauss(1.0), 2.0**-40)
    assert text.startswith("In FP16 6 tensors would lose gradients: of ")
    assert text.endswith(
        "mixprec.MixedPrecision(optimizer, loss_scaler=mixprec.DynamicLossScaler())."
    )
    (power,) = re.findall(r"which 2\^(\d+) times would mend", text)
    assert sentences(gauss(1.0), 2.0 ** (int(power) - 40)) == []
    assert sentences(gauss(1.0), 2.0 ** (int(power) - 42)) != []
    assert FP16.smallest_subnormal == 2.0**-24
