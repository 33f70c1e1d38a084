"""Which optimizers may hold a parameter together: masters are held by one, all else as in torch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import mixprec


def weight(dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype))


def test_fp32_parameters_may_be_in_two_wrappers_as_in_two_bare_optimizers() -> None:
    ours, theirs = weight(torch.float32), weight(torch.float32)
    wrapped = [mixprec.MixedPrecision(SGD([ours], lr=0.1)), mixprec.MixedPrecision(Adam([ours]))]
    bare = [SGD([theirs], lr=0.1), Adam([theirs])]
    for param, optimizers in ((ours, wrapped), (theirs, bare)):
        for optimizer in (*optimizers, *optimizers):
            param.grad = param.detach() * 0.5
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_16_bit_parameter_in_two_wrappers_is_refused_beside_an_fp32_one() -> None:
    low, wide = weight(), weight(torch.float32)
    older = mixprec.MixedPrecision(SGD([("wide", wide), ("low", low)], lr=0.1))
    mixprec.MixedPrecision(SGD([("other", weight())], lr=0.1))
    newer = mixprec.MixedPrecision(SGD([("wide", wide)], lr=0.1))
    low.grad, wide.grad = torch.ones_like(low), torch.ones_like(wide)
    older.step()
    newer.add_param_group({"params": [("low", low)]})
    with pytest.raises(RuntimeError, match="'low' was given to a MixedPrecision created later"):
        older.step()
    newer.step()


def test_parameters_that_become_16_bit_after_wrapping_have_one_owner_too() -> None:
    model = nn.Linear(2, 2)
    older = mixprec.MixedPrecision(SGD(model.named_parameters(), lr=0.1))
    newer = mixprec.MixedPrecision(SGD(model.named_parameters(), lr=0.1))
    model.bfloat16()
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' was given to a MixedPrecision created later"):
        older.step()
    newer.step()


def test_owner_keeps_no_parameter_alive() -> None:
    param = weight()
    optimizer = mixprec.MixedPrecision(SGD([{"params": [param]}, {"params": [weight()]}], lr=0.1))
    gone = weakref.ref(param)
    del optimizer.param_groups[0], param
    gc.collect()
    assert gone() is None


def test_parameter_without_weak_references_can_be_swapped() -> None:
    """Torch's swap of a parameter's contents refuses one that somebody refers to weakly."""
    param = weight(torch.float32)
    optimizer = mixprec.MixedPrecision(SGD([param], lr=0.1))
    torch.utils.swap_tensors(param, nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    assert not weakref.getweakrefs(param)
    assert param.dtype == torch.bfloat16 and optimizer.param_groups[0]["params"][0] is param


# ---------------------------------------- one parameter twice


def twice(build: Any, dtype: torch.dtype, wrap: Any = lambda inner: inner) -> tuple[Tensor, Any]:
    param = weight(dtype)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        inner = build([param, param])
    return param, wrap(inner)


@pytest.mark.parametrize("build", [lambda p: SGD(p, lr=0.1), lambda p: Adam(p, lr=0.1)])
def test_fp32_parameter_that_is_in_a_group_twice_steps_as_the_bare_optimizer_steps_it(
    build: Any,
) -> None:
    ours, optimizer = twice(build, torch.float32, mixprec.MixedPrecision)
    theirs, bare = twice(build, torch.float32)
    for size in (1.0, 0.5, 2.0):
        for param, each in ((ours, optimizer), (theirs, bare)):
            param.grad = torch.full_like(param, size)
            each.step()
    assert torch.equal(ours, theirs)
    saved = optimizer.state_dict()
    other, resumed = twice(build, torch.float32, mixprec.MixedPrecision)
    resumed.load_state_dict(saved)
    other.detach().copy_(ours)
    for param, each in ((ours, optimizer), (other, resumed)):
        param.grad = torch.ones_like(param)
        each.step()
    assert torch.equal(ours, other)


def test_gradient_of_a_parameter_that_is_in_a_group_twice_is_scaled_and_counted_once() -> None:
    scaler = mixprec.StaticLossScaler(4.0)
    param, optimizer = twice(
        lambda p: SGD(p, lr=0.25),
        torch.float32,
        lambda inner: mixprec.MixedPrecision(inner, loss_scaler=scaler, max_grad_norm=100.0),
    )
    (scaler.multiply(param.sum())).backward()
    optimizer.step()
    assert param.tolist() == [0.5, 0.5, 0.5]  # two steps of lr * 1
    assert optimizer.metrics()["grad_norm"] == pytest.approx(3**0.5)


@pytest.mark.parametrize(
    ("dtype", "options", "why"),
    [(torch.bfloat16, {}, "has one master"), (torch.float32, {"fused": True}, "fused=True")],
)
def test_parameter_that_would_need_two_masters_is_refused_by_name(
    dtype: torch.dtype, options: dict[str, Any], why: str
) -> None:
    param = weight(dtype)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        inner = AdamW([("w", param), ("tied", param)])
    with pytest.raises(ValueError, match="tied is w once more") as raised:
        mixprec.MixedPrecision(inner, **options)
    assert why in str(raised.value)
