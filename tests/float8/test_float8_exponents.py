"""Exponents move between steps by what was counted, and only then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixprec
from mixprec import Precision
from mixprec.float8.exponents import fitting_exponent, moved, top_of
from mixprec.formats import E4M3, E5M2, Format


def bits(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32))


def counters(amax: float, *, saturated: int = 0, flushed: int = 0, seen: int = 10**6) -> Tensor:
    return torch.tensor([[bits(amax), saturated, flushed, 0, seen, 0, 0, 0]])


def move(exponent: int, counted: Tensor, *, slack: int = 0, top: int = 8) -> tuple[int, int]:
    as_tensor = [torch.tensor([n], dtype=torch.int32) for n in (exponent, slack, top)]
    exponents, waited = moved(as_tensor[0], as_tensor[1], counted, as_tensor[2])
    return int(exponents), int(waited)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_a_fitted_exponent_leaves_one_to_two_binades_above_any_value(format: Format) -> None:
    torch.manual_seed(0)
    amax = torch.cat([torch.rand(10000) + 2.0**-20, torch.tensor([1.0, 2.0, 0.5, 1 - 2.0**-24])])
    amax = torch.cat([amax * 2.0**e for e in (-30, -3, 0, 9)])
    top = top_of(format)
    assert 2.0**top <= format.max < 2.0 ** (top + 1)
    placed = amax.double() * 2.0 ** fitting_exponent(amax, top).double()
    assert placed.max() < 2.0 ** (top - 1)
    assert placed.min() >= 2.0 ** (top - 2)


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        (counters(10.0), (3, 0)),  # 80 of 448: room, but not 4 binades
        (counters(3.0), (3, 0)),  # 24: rises by 2 if ever
        (counters(0.9), (3, 1)),  # 7.2: 4 binades unused, wait
        (counters(0.9, flushed=2 * 10**4), (7, 0)),  # and values lost: at once
        (counters(0.9, flushed=10**4), (3, 1)),  # 1 % is not more than 1 %
        (counters(200.0, flushed=2 * 10**4), (3, 0)),  # 1600 and flushed: no exponent mends both
        (counters(100.0, saturated=11), (0, 0)),  # 800: falls at once
        (counters(100.0, saturated=10), (3, 0)),  # 1e-5 of values may saturate
        (counters(0.0, seen=0), (3, 0)),  # nothing was cast
        (counters(0.0), (3, 0)),  # nothing but zeros
        (counters(float("inf"), saturated=10**5), (3, 0)),  # a step that will be skipped
        (counters(float("nan"), flushed=10**5), (3, 0)),
    ],
)
def test_the_rule(counted: Tensor, expected: tuple[int, int]) -> None:
    assert move(3, counted) == expected


def test_slack_alone_waits_for_sixteen_steps_in_a_row() -> None:
    exponent, waited = 3, 0
    for step in range(16):
        assert (exponent, waited) == (3, step)
        exponent, waited = move(exponent, counters(0.9), slack=waited)
    assert (exponent, waited) == (7, 0)
    assert move(3, counters(10.0), slack=15) == (3, 0)
    assert move(3, counters(0.0, seen=0), slack=15) == (3, 15)


# ------------------------------------------------------------------ in a model


def converted(recipe: str = "adaptive") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 64, bias=False))
    Precision("fp8", recipe=recipe).convert(model, min_dim=16)
    return model


def train(model: Any, optimizer: Any, factors: list[float], seed: int = 0) -> list[float]:
    losses: list[float] = []
    torch.manual_seed(seed)
    for factor in factors:
        x = (torch.randn(32, 64) * factor).bfloat16()
        loss = (model(x).float() - x.float()).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def exponents(model: Any) -> dict[str, dict[str, int]]:
    return Precision("fp8").exponents(model)


def test_a_step_fits_and_the_next_one_keeps() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, [1.0])
    found = exponents(model)
    assert found["0"]["input"] == 4  # the largest of these 2048 normal numbers is above 4
    assert found["0"]["weight"] == 9  # and of a weight 64^-1/2 = 2^-3, rounded to BF16
    train(model, optimizer, [1.0, 0.5, 2.0])
    assert exponents(model) == found
    train(model, optimizer, [64.0])
    assert exponents(model)["0"]["input"] == -2
    assert exponents(model)["0"]["weight"] == 9


def test_exponents_stay_within_a_step_of_micro_batches() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, [1.0])
    before = exponents(model)
    model(torch.full((16, 64), 1000.0).bfloat16())
    assert exponents(model) == before
    optimizer.step()
    assert exponents(model)["0"]["input"] < before["0"]["input"]


def test_counters_of_the_last_step_stay_readable_and_others_begin_anew() -> None:
    model = converted("static")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, [1.0])
    operand = model[0]._float8.input
    assert operand.last[4] == 32 * 64 and not operand.counters.any()
    optimizer.step()  # of a model that was not run
    assert operand.last[4] == 32 * 64


def test_every_optimizer_of_a_wrapper_ends_a_step_once() -> None:
    """MixedPrecision may call the inner step for each bucket."""
    models = [converted() for _ in range(2)]
    plain = torch.optim.SGD(models[0].parameters(), lr=0.0)
    wrapped = mixprec.MixedPrecision(torch.optim.SGD(models[1].parameters(), lr=0.0), fused=False)
    for factors in ([1.0], [0.02] * 9, [64.0]):
        train(models[0], plain, factors)
        train(models[1], wrapped, factors)
        assert exponents(models[0]) == exponents(models[1])
        slack = [[o.slack_steps.item() for o in m[0]._float8.operands().values()] for m in models]
        assert slack[0] == slack[1]


def test_a_skipped_step_moves_nothing() -> None:
    model = converted()
    optimizer = mixprec.MixedPrecision(torch.optim.SGD(model.parameters(), lr=0.0))
    train(model, optimizer, [1.0])
    before = exponents(model)
    with pytest.warns(RuntimeWarning, match="gradients are not finite"):
        train(model, optimizer, [float("inf")])
    assert exponents(model) == before


def test_a_run_resumes_without_exponents_and_bit_for_bit_with_them() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    train(model, optimizer, [1.0, 8.0, 1.0])
    saved = copy.deepcopy(model.state_dict()), exponents(model)
    straight = train(model, optimizer, [4.0, 4.0], seed=1)

    for with_exponents in (True, False):
        resumed = converted()
        resumed.load_state_dict(saved[0])
        if with_exponents:
            Precision("fp8").load_exponents(resumed, saved[1])
        optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-5)
        losses = train(resumed, optimizer, [4.0, 4.0], seed=1)
        assert (losses == straight) or not with_exponents
        assert losses == pytest.approx(straight, rel=0.05)


def test_siblings_that_resume_with_their_exponents_share_one_cast_again() -> None:
    def siblings() -> Any:
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(64, 48) for _ in range(3))
        Precision("fp8").convert(model, min_dim=16)
        return model

    def step(model: Any) -> list[Any]:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        for layer, factor in zip(model, (1, 1, 8), strict=True):
            layer(x if factor == 1 else x * factor).float().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        return [layer._float8.input for layer in model]

    model, resumed = siblings(), siblings()
    first, second, stranger = step(model)
    assert first is second is not stranger
    saved = exponents(model)
    Precision("fp8").load_exponents(resumed, saved)
    first, second, stranger = step(resumed)
    assert first is second is not stranger
    assert exponents(resumed) == saved

    saved["1"]["input"] -= 2  # never one operand, so not one now
    other = siblings()
    Precision("fp8").load_exponents(other, saved)
    first, second, _ = step(other)
    assert first is not second
    assert exponents(other) == saved


def test_loaded_exponents_begin_no_wait_and_are_not_fitted_again() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, [1.0, *[0.02] * 5])
    operand = model[0]._float8.input
    assert operand.slack_steps == 5
    Precision("fp8").load_exponents(model, {"0": {"input": 9}})
    assert operand.slack_steps == 0
    model(torch.ones(16, 64).bfloat16())
    assert exponents(model)["0"]["input"] == 9
    Precision("fp8").load_exponents(model, {"0": {"weight": 3}})
    model(torch.ones(16, 64).bfloat16())
    assert model[0]._float8.weight.held[2] == 2.0**-3


def test_exponents_of_another_model_are_refused() -> None:
    model = converted()
    with pytest.raises(ValueError, match="exponents hold '5' 'input', which is no adaptive operan"):
        Precision("fp8").load_exponents(model, {"5": {"input": 3}})
    with pytest.raises(ValueError, match="exponents hold '0' 'input', which is no adaptive operan"):
        Precision("fp8").load_exponents(converted("static"), {"0": {"input": 3}})


def test_static_models_have_no_exponents_to_save() -> None:
    assert exponents(converted("static")) == {}
