"""Fused parameters share one step count; whoever else sets, counts or saves it does right."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adamax, AdamW, RAdam

import mixprec


def beside(dtype: torch.dtype, **options: Any) -> tuple[list[Any], Any, list[Any], Any]:
    """Three fused parameters of one age, and the bare rule on FP32 ones of the same values."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 6), (5,), (3, 2))]
    ours = [nn.Parameter(value.clone()) for value in values]
    theirs = [nn.Parameter(value.float()) for value in values]
    optimizer = mixprec.MixedPrecision(AdamW(ours, lr=0.02), fused=True, **options)
    return ours, optimizer, theirs, AdamW(theirs, lr=0.02)


def give_both(ours: list[Any], theirs: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for our, their in zip(ours, theirs, strict=True):
        our.grad = torch.randn(our.shape, generator=generator).to(our.dtype)
        their.grad = our.grad.float().clone()


def assert_beside(optimizer: Any, theirs: list[Any]) -> None:
    for (_, master), their in zip(optimizer.masters(), theirs, strict=True):
        torch.testing.assert_close(master, their.detach(), rtol=3e-6, atol=3e-6)


def steps_of(optimizer: Any) -> list[float]:
    return [float(entry["step"]) for entry in optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("which", [slice(None), slice(1)])
def test_a_number_that_somebody_sets_is_read_at_the_next_step(
    dtype: torch.dtype, which: slice
) -> None:
    ours, optimizer, theirs, bare = beside(dtype)
    for step, number in enumerate([None, None, 50.0, 2.0, 2.0]):
        if number is not None:
            for param in ours[which]:
                optimizer.state[param]["step"] = torch.tensor(number)
            for param in theirs[which]:
                bare.state[param]["step"] = torch.tensor(number)
        give_both(ours, theirs, step)
        optimizer.step()
        bare.step()
        assert steps_of(optimizer) == steps_of(bare)
        assert_beside(optimizer, theirs)


@pytest.mark.parametrize("rule", [AdamW, RAdam, Adamax, lambda ps: SGD(ps, lr=0.1, momentum=0.9)])
def test_numbers_that_nobody_sets_leave_a_plan_as_it_is(rule: Any) -> None:
    weights = [nn.Parameter(torch.ones(4, 6).bfloat16()) for _ in range(3)]
    optimizer = mixprec.MixedPrecision(rule(weights), fused=True)
    plans: list[Any] = []
    for step in range(4):
        for weight in weights:
            weight.grad = torch.full_like(weight, step + 1.0)
        optimizer.step()
        plans.append(optimizer._fused._plan)
    assert plans[2] is plans[3] is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("formats", [None, "8bit"])
def test_a_new_wrapper_finds_states_as_the_rule_keeps_them(
    dtype: torch.dtype, formats: Any
) -> None:
    ours, optimizer, theirs, bare = beside(dtype, state_formats=formats)
    for step in range(5):
        if step == 2:  # go on with masters as they are, and another kind of step
            wrapper = mixprec.MixedPrecision(optimizer.inner, fused=False)
            bare.load_state_dict(copy.deepcopy(wrapper.state_dict()))
            for (_, master), their in zip(wrapper.masters(), theirs, strict=True):
                their.data.copy_(master)
            optimizer = wrapper
        give_both(ours, theirs, step)
        optimizer.step()
        bare.step()
    assert steps_of(optimizer) == steps_of(bare) == [5.0] * 3
    assert_beside(optimizer, theirs)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_the_rule_itself_finds_states_as_it_keeps_them(is_dropped: bool) -> None:
    ours, optimizer, theirs, bare = beside(torch.float32)
    inner = optimizer.inner
    for step in range(5):
        give_both(ours, theirs, step)
        (optimizer if step < 2 else inner).step()
        bare.step()
        if is_dropped and step == 1:
            del optimizer
            gc.collect()
            optimizer = inner
    assert steps_of(inner) == steps_of(bare) == [5.0] * 3
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=3e-6, atol=3e-6)


def test_what_the_rule_saves_by_itself_shares_nothing() -> None:
    ours, optimizer, theirs, _ = beside(torch.float32)
    give_both(ours, theirs, 0)
    optimizer.step()
    saved = optimizer.inner.state_dict()["state"].values()
    assert len({id(entry["step"]) for entry in saved}) == 3
    give_both(ours, theirs, 1)
    optimizer.step()
    assert steps_of(optimizer) == [2.0] * 3


def test_what_a_rule_itself_shares_stays_shared() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    inner = SGD(weights, lr=0.1)
    common = torch.zeros(())
    for weight in weights:
        inner.state[weight]["common"] = common
    optimizer = mixprec.MixedPrecision(inner)
    assert all(entry["common"] is common for entry in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_write_into_a_shared_number_is_said_once(dtype: torch.dtype) -> None:
    ours, optimizer, theirs, _ = beside(dtype)
    text = r"state\[\.\.\.\]\['step'\] was written in place, .* one for all of them\. To change it"
    with pytest.warns(RuntimeWarning, match=text) as told:
        for step in range(6):
            give_both(ours, theirs, step)
            if step in (2, 4):
                optimizer.state[ours[0]]["step"].zero_()
            optimizer.step()
    assert len(told) == 1
    alone, optimizer = ours[:1], mixprec.MixedPrecision(AdamW(ours[:1]), fused=True)
    for step in range(4):
        give_both(alone, theirs[:1], step)
        if step == 2:
            optimizer.state[alone[0]]["step"].zero_()
        optimizer.step()
    assert steps_of(optimizer) == [2.0]
