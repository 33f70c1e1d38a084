"""Weights and states that somebody else writes, and parameters that somebody drops."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_rules import Rule
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

import mixprec

TIERS: dict[str, dict[str, Any]] = {
    "rule": {"fused": False},
    "whole": {"fused": False, "bucket_numel": None},
    "fused": {"fused": True},
}


# ---------------------------------------- weights, between steps


@pytest.mark.filterwarnings("ignore:.* written outside of step")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.bfloat16, "split"), (torch.bfloat16, "full"), (torch.float16, "full")],
)
def test_masters_do_not_wind_up_behind_weights_that_are_clamped_through_data(
    dtype: torch.dtype, masters: Any, tier: str
) -> None:
    def walk(optimizer: Any, weight: Tensor) -> Tensor:
        for sign in [-1.0] * 40 + [1.0] * 40:
            weight.grad = torch.full_like(weight, sign)
            optimizer.step()
            weight.data.clamp_(-1, 1)
        return weight.detach().float()

    weight = nn.Parameter(torch.full((4,), 0.875, dtype=dtype))
    sgd = SGD([weight], lr=2.0**-6)
    walked = walk(mixprec.MixedPrecision(sgd, masters=masters, **TIERS[tier]), weight)
    plain = nn.Parameter(torch.full((4,), 0.875))
    assert torch.equal(walked, walk(SGD([plain], lr=2.0**-6), plain))  # all are exact in 16 bits


def test_a_write_through_data_is_told_once_and_only_its_elements_lose_their_bits() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1e-3), masters="full")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.data[0] = 3.0
    weight.grad = torch.full_like(weight, 1e-30)
    with pytest.warns(RuntimeWarning, match="was written outside of step"):
        optimizer.step()
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, torch.tensor([3.0, 1.999]))


def test_a_warning_that_is_an_error_comes_when_the_step_has_been_taken_and_counted() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.5), masters="full")
    for step in range(2):
        weight.grad = torch.ones_like(weight)
        if step:
            weight.data.fill_(3.0)
            with pytest.raises(RuntimeWarning, match="was written outside of step"):
                optimizer.step()  # warnings are errors here
        else:
            optimizer.step()
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, torch.full((2,), 2.5))
    assert optimizer.metrics()["steps"] == 2
    optimizer.step()
    assert optimizer.metrics()["steps"] == 3


# ---------------------------------------- weights, inside of masters_in_model


def through_data(params: list[nn.Parameter], values: Tensor) -> None:
    params[0].data.copy_(values)


def another_data(params: list[nn.Parameter], values: Tensor) -> None:
    nn.utils.vector_to_parameters(values, params)


def in_place(params: list[nn.Parameter], values: Tensor) -> None:
    with torch.no_grad():
        params[0].copy_(values)


@pytest.mark.parametrize("masters", ["split", "full"])
@pytest.mark.parametrize("write", [through_data, another_data, in_place])
def test_what_is_written_inside_is_kept_however_it_is_written(
    masters: Any, write: Callable[[list[nn.Parameter], Tensor], None]
) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.1), masters=masters)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    values = torch.tensor([5.001, 6.001])
    with optimizer.masters_in_model():
        write([weight], values)
        assert torch.equal(weight.detach(), values)
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, values) and torch.equal(weight, values.bfloat16())


def test_a_context_inside_of_another_ends_with_the_outer_one() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.1))
    with optimizer.masters_in_model():
        with optimizer.masters_in_model():
            pass
        assert weight.dtype == torch.float32
        with pytest.raises(RuntimeError, match=r"step\(\) inside masters_in_model"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"adopt_params\(\) inside masters_in_model"):
            optimizer.adopt_params()
    assert weight.dtype == torch.bfloat16


def test_buffers_of_a_model_that_is_given_are_fp32_inside() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    optimizer = mixprec.MixedPrecision(SGD(model.parameters(), lr=0.1))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    mean: Any = model[1].running_mean
    with optimizer.masters_in_model():
        assert mean.dtype == torch.bfloat16
    with optimizer.masters_in_model(model):
        model(x)
        assert mean.dtype == torch.float32
        inside = mean.clone()
    assert mean.dtype == torch.bfloat16 and torch.equal(mean, inside.bfloat16())
    assert inside.abs().max() > 0


def test_parameters_without_elements_step_and_are_clipped() -> None:
    empty = nn.Parameter(torch.ones(0, 3, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([empty], lr=0.1, momentum=0.9), max_grad_norm=1.0)
    for _ in range(2):
        empty.grad = torch.ones_like(empty)
        optimizer.step()
    assert optimizer.state[empty]["momentum_buffer"].shape == (0, 3)


# ---------------------------------------- states


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("masters", ["split", "full"])
def test_a_state_that_somebody_makes_like_the_weight_is_widened(tier: str, masters: Any) -> None:
    """`state["sum"] = torch.zeros_like(p)`, as schemes that merge and restart adapters do."""

    def run(dtype: torch.dtype, wrap: Callable[[Optimizer], Any]) -> Tensor:
        weight = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = wrap(Adagrad([weight], lr=1e-2))
        for step in range(300):
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
            if step == 10:
                optimizer.state[weight]["sum"] = torch.zeros_like(weight)
        return optimizer.state[weight]["sum"]

    found = run(
        torch.bfloat16,
        lambda rule: mixprec.MixedPrecision(rule, masters=masters, **TIERS[tier]),
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, run(torch.float32, lambda rule: rule))  # 72.25; BF16 ends at 64


class HalfMomentum(Rule):
    """Keeps its momentum in BF16, whatever its parameters are."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        momentum = state.setdefault("m", torch.zeros_like(p, dtype=torch.bfloat16))
        p.sub_(momentum.mul_(0.9).add_(grad).float(), alpha=group["lr"])


def test_a_state_that_the_rule_itself_keeps_in_16_bits_stays_so_also_after_a_load() -> None:
    def steps(weight: nn.Parameter, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            weight.grad = torch.full_like(weight, 0.3 + step).bfloat16().to(weight.dtype)
            optimizer.step()

    plain = nn.Parameter(torch.ones(4))
    bare = HalfMomentum([plain])
    steps(plain, bare, range(6))

    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    first = mixprec.MixedPrecision(HalfMomentum([weight]))
    steps(weight, first, range(4))
    optimizer = mixprec.MixedPrecision(HalfMomentum([weight]))
    optimizer.load_state_dict(first.state_dict())
    steps(weight, optimizer, range(4, 6))
    ((_, master),) = optimizer.masters()
    momentum: Tensor = optimizer.state[weight]["m"]
    assert torch.equal(master, plain)
    assert momentum.dtype == torch.bfloat16 and torch.equal(momentum, bare.state[plain]["m"])


class OwnMaster(Rule):
    """Keeps a state of its own that is called "master"."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        own = state.setdefault("master", torch.zeros_like(p))
        p.sub_(own.mul_(0.9).add_(grad), alpha=group["lr"])


def test_a_state_called_master_of_an_fp32_parameter_is_the_rule_s() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = mixprec.MixedPrecision(OwnMaster([weight]))
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.adopt_params()
    assert torch.equal(optimizer.state[weight]["master"], torch.full((2,), 1.9))
    assert torch.equal(optimizer.state_dict()["state"][0]["master"], torch.full((2,), 1.9))
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, weight)


def test_the_inner_optimizer_does_not_step_16_bit_weights_by_itself() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.1))
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        ((param, _),) = one.masters()
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match=r"step\(\) of the SGD.*without its FP32 master"):
            one.inner.step()
        one.step()
    plain = nn.Parameter(torch.ones(2))
    free = mixprec.MixedPrecision(SGD([plain], lr=0.1))
    plain.grad = torch.ones_like(plain)
    free.inner.step()  # has no master


# ---------------------------------------- parameters that are dropped


@pytest.mark.parametrize(
    ("dtype", "tier", "move"),
    [
        (torch.bfloat16, "rule", True),
        (torch.bfloat16, "fused", True),
        (torch.bfloat16, "fused", False),
        (torch.float16, "fused", False),
        (torch.float16, "whole", False),
        (torch.float32, "rule", True),
    ],
)
def test_nothing_of_ours_outlives_a_parameter_that_is_replaced(
    dtype: torch.dtype, tier: str, move: bool
) -> None:
    weight = nn.Parameter(torch.ones(8, 8, dtype=dtype))
    optimizer = mixprec.MixedPrecision(Adam([weight]), **TIERS[tier])
    old: list[weakref.ref[Tensor]] = []
    states: list[weakref.ref[Tensor]] = []
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        new = nn.Parameter(weight.detach().clone())
        state = optimizer.state.pop(weight)
        if move:
            optimizer.state[new] = state
        else:
            states.append(weakref.ref(state["exp_avg"]))
        optimizer.param_groups[0]["params"] = [new]
        old.append(weakref.ref(weight))
        weight = new
        del state
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    assert [ref() for ref in states] == [None] * len(states)


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_of_ours_outlives_a_group_that_is_deleted(tier: str) -> None:
    weights = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = mixprec.MixedPrecision(Adam([{"params": [w]} for w in weights]), **TIERS[tier])
    weight: nn.Parameter | None = None
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    del optimizer.state[weights[1]], optimizer.param_groups[1]
    gone = weakref.ref(weights[1])
    weights.clear()
    weight = None
    gc.collect()
    assert gone() is None
    optimizer.step()
