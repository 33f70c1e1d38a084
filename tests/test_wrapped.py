"""Accumulators around what a trainer has wrapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from mixprec.accumulation import GradientAccumulator
from mixprec.loss_scaling import StaticLossScaler
from mixprec.optimizer import MixedPrecision


class Wrapper(Optimizer):
    """A wrapper as Accelerate makes it: `step` does nothing in between and takes no factor."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def step(self, closure: Any = None) -> Any:
        raise AssertionError("the wrapper's own step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        raise AssertionError("the wrapper's own zero_grad")


class Accelerates(Wrapper):
    __module__ = "accelerate.optimizer"


class Lightnings(Wrapper):
    """A wrapper as Lightning's Fabric makes it: it has all attributes of what it wraps."""

    __module__ = "lightning.fabric.wrappers"

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__ = dict(optimizer.__dict__)
        self._optimizer = optimizer


class Lookahead(Wrapper):
    """A wrapper that is part of the rule."""


@pytest.mark.parametrize(
    "wrapper", [Accelerates, Lightnings, lambda o: Accelerates(Accelerates(o))]
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mixed_precision_that_a_trainer_wraps_is_found(
    wrapper: Any, scaled: bool, dtype: torch.dtype
) -> None:
    param = nn.Parameter(torch.zeros((), dtype=dtype))
    scaler = StaticLossScaler(4.0) if scaled else None
    optimizer = MixedPrecision(SGD([param], lr=1.0), loss_scaler=scaler)
    accumulator = GradientAccumulator(wrapper(optimizer), presumed_tokens=8)
    assert accumulator.optimizer is optimizer and accumulator.loss_scaler is scaler
    for last in (False, True):
        accumulator.backward(param * 4.0, 4, last=last)
    accumulator.step()
    assert param.item() == -1.0


@pytest.mark.parametrize("wrapper", [Accelerates, Lightnings])
def test_the_plain_optimizer_that_a_trainer_wraps_is_stepped_itself(wrapper: Any) -> None:
    param = nn.Parameter(torch.zeros(()))
    scaler = StaticLossScaler(4.0)
    wrapped = wrapper(SGD([param], lr=1.0))
    accumulator = GradientAccumulator(wrapped, loss_scaler=scaler)
    accumulator.backward(param * 4.0, 4)
    accumulator.step()
    scaler.multiply(param * 2.0).backward()
    scaler.step(wrapped)
    assert param.item() == -3.0


def test_another_wrapper_around_mixed_precision_is_told_what_to_give() -> None:
    param = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    optimizer = Lookahead(MixedPrecision(SGD([param], lr=1.0)))
    with pytest.raises(TypeError, match=r"Lookahead wraps a MixedPrecision.*MixedPrecision\(Look"):
        GradientAccumulator(optimizer)


@pytest.mark.thirdparty
@pytest.mark.filterwarnings("ignore")
def test_accelerates_own_wrapper_is_opened() -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="needs the thirdparty extra")
    param = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    optimizer = MixedPrecision(SGD([param], lr=1.0), loss_scaler=StaticLossScaler(4.0))
    accumulator = GradientAccumulator(accelerate.Accelerator(cpu=True).prepare(optimizer))
    assert accumulator.optimizer is optimizer
    accumulator.backward(param * 4.0, 4)
    accumulator.step()
    assert param.item() == -1.0
