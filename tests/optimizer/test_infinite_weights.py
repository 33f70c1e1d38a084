"""A master beyond the range of its weight's 16 bits is said, by name and number."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from parts import judge_on_device
from torch import Tensor, nn
from torch.optim import SGD

import mixprec
from mixprec.optimizer.reports import outcome
from mixprec.optimizer.reports.infinite_weights import Look

FOUND = (
    r"big is infinite in 1 of 2 elements: float16 ends at 65504 and the FP32 master of the first "
    r"is 70000\. What it multiplies is inf or NaN, whatever the loss scale\. Hold it in BF16 or "
    r"FP32, or clamp it inside of masters_in_model\(\) and keep it small by a lower lr"
)


def made(dtype: torch.dtype = torch.float16, **options: Any) -> tuple[Tensor, Any]:
    """An optimizer whose first step brings one of two masters from 60000 to 70000."""
    big = nn.Parameter(torch.tensor([1.0, 6e4], dtype=dtype))
    return big, mixprec.MixedPrecision(SGD([("big", big)], lr=1e4), **options)


def go_beyond(big: Tensor, optimizer: Any) -> None:
    grow(big, optimizer, torch.tensor([0.0, -1.0]))
    assert big.tolist() == [1.0, torch.inf]


def grow(big: Tensor, optimizer: Any, grad: Tensor) -> None:
    scaler = optimizer.loss_scaler
    big.grad = (grad if scaler is None else scaler.multiply(grad)).to(big.dtype)
    optimizer.step()


NONFINITE = torch.tensor([torch.inf, torch.nan])


@pytest.mark.filterwarnings("ignore:gradients are not finite")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_first_skip_names_the_infinite_weight_once(scaled: bool, fused: bool) -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=1.0) if scaled else None
    big, optimizer = made(loss_scaler=scaler, fused=fused)
    go_beyond(big, optimizer)
    with pytest.warns(RuntimeWarning, match=FOUND) as told:
        for _ in range(3):
            grow(big, optimizer, NONFINITE)
    assert [str(one.message).startswith("big") for one in told].count(True) == 1
    ((_, master),) = optimizer.masters()
    assert master.tolist() == [1.0, 7e4]


@pytest.mark.parametrize("scaled", [False, True])
def test_where_the_device_decides_it_is_told_one_step_later(
    scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=1.0) if scaled else None
    big, optimizer = made(loss_scaler=scaler, fused=True)
    judge_on_device(optimizer, monkeypatch)
    go_beyond(big, optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            grow(big, optimizer, NONFINITE)
    assert sum("big is infinite" in str(one.message) for one in told) == 1


@pytest.mark.filterwarnings("ignore:gradients are not finite", "ignore:big is infinite")
@pytest.mark.parametrize("scaled", [False, True])
def test_the_error_after_many_skips_begins_with_the_infinite_weight(scaled: bool) -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=1.0, max_skips_in_a_row=3) if scaled else None
    big, optimizer = made(loss_scaler=scaler)
    go_beyond(big, optimizer)
    text = FOUND + r".* So \d+ steps in a row (were skipped|had non-finite gradients)"
    with pytest.raises(FloatingPointError, match=text):
        for _ in range(50):
            grow(big, optimizer, NONFINITE)


def test_on_nonfinite_raise_says_it_too() -> None:
    big, optimizer = made(on_nonfinite="raise")
    go_beyond(big, optimizer)
    with pytest.raises(FloatingPointError, match=FOUND + ".*nothing was updated"):
        grow(big, optimizer, NONFINITE)


@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore"])
def test_it_is_told_where_gradients_stay_finite(
    on_nonfinite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "LOOK_AT_WEIGHTS_EVERY", 4)
    big, optimizer = made(on_nonfinite=on_nonfinite)
    go_beyond(big, optimizer)
    with pytest.warns(RuntimeWarning, match="big is infinite"):
        for _ in range(4):
            grow(big, optimizer, torch.tensor([1e-6, 0.0]))


def test_an_infinite_weight_is_told_at_the_first_step() -> None:
    big = nn.Parameter(torch.tensor([1.0, 7e4]).half())
    optimizer = mixprec.MixedPrecision(SGD([("big", big)], lr=0.1))
    with pytest.warns(RuntimeWarning, match="big is infinite in 1 of 2 .* the first is inf"):
        grow(big, optimizer, torch.ones(2))


def test_a_frozen_mask_may_hold_infinities() -> None:
    mask = nn.Parameter(torch.tensor([0.0, -torch.inf]).bfloat16(), requires_grad=False)
    weight = nn.Parameter(torch.ones(2).bfloat16())
    optimizer = mixprec.MixedPrecision(SGD([mask, weight], lr=0.1))
    weight.grad = torch.ones_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("dtype, beyond", [(torch.float16, 7e4), (torch.bfloat16, -3.4e38)])
@pytest.mark.parametrize("held", [True, False])
def test_fp32_weights_beyond_the_range_are_not_loaded(
    dtype: torch.dtype, beyond: float, held: bool
) -> None:
    model = nn.Linear(2, 1).to(dtype)
    before = copy.deepcopy(model.state_dict())
    params = model.parameters() if held else [model.bias]
    optimizer = mixprec.MixedPrecision(SGD(params, lr=0.1))
    name = str(dtype).removeprefix("torch.")
    text = (
        rf"'weight' holds {beyond:.6g}".replace("+", r"\+")
        + rf" in 1 of 2 elements and {name} ends at .*"
        r"the weight would be infinite; nothing was loaded\. Hold this parameter in BF16 or FP32, "
        r"or clamp it in the state dict first\."
    )
    with pytest.raises(ValueError, match=text):
        weights = {"weight": torch.tensor([[1.0, beyond]]), "bias": torch.ones(1)}
        optimizer.load_fp32_state_dict(model, weights)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    inf = torch.tensor([[1.0, torch.inf]])
    optimizer.load_fp32_state_dict(model, {"weight": inf, "bias": torch.ones(1)})
    assert model.weight.tolist() == inf.tolist()  # whoever says inf means it


def test_loaded_masters_beyond_the_range_are_told_at_the_next_step() -> None:
    big, optimizer = made()
    go_beyond(big, optimizer)
    other, loaded = made()
    grow(other, loaded, torch.tensor([0.0, 1e-6]))
    loaded.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        other.copy_(big)
    with pytest.warns(RuntimeWarning, match=FOUND):
        grow(other, loaded, torch.tensor([0.0, 1e-6]))


def test_masters_written_beyond_the_range_are_told_on_the_way_out() -> None:
    big, optimizer = made()
    with pytest.warns(RuntimeWarning, match=FOUND), optimizer.masters_in_model(), torch.no_grad():
        big[1] = 7e4


def test_what_is_within_the_range_says_nothing() -> None:
    big, optimizer = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow(big, optimizer, torch.tensor([0.0, -0.5]))
        with optimizer.masters_in_model():
            pass
    assert big.tolist() == [1.0, 64992.0]


def test_a_look_is_told_once_and_is_no_part_of_a_copy() -> None:
    look = Look()
    look.send([torch.tensor([1.0, torch.inf]).half(), torch.ones(2)])
    assert not pickle.loads(pickle.dumps(look)).found()
    assert look.found() and not look.found()
    look.send([torch.tensor([torch.inf]), torch.empty(0).half()])
    assert not look.found()
