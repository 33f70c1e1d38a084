"""Steps off the beaten track: sparse gradients with a factor, masters that were set before a first
step that failed, a state that was replaced, a state of the wrong sign."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import pytest
import torch
from small_rules import Rule
from torch import Tensor, nn
from torch.optim import SGD

import mixprec
from mixprec.plain_optimizer import step_plain


def sparse(value: float, dtype: torch.dtype) -> Tensor:
    """A gradient of the second row of three."""
    return torch.tensor([[0.0] * 2, [value] * 2, [0.0] * 2]).to_sparse(1).to(dtype)


@pytest.mark.parametrize("masters", ["full", "split"])
def test_a_sparse_gradient_in_16_bits_is_multiplied_by_the_factor(masters: Any) -> None:
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), masters=masters)
    weight.grad = sparse(2.0, torch.bfloat16)
    optimizer.step(grad_factor=2.0**-12)
    ((_, master),) = optimizer.masters()
    # 1 - 2 * 2^-12: seen in the master alone.
    assert master.tolist() == [[1.0, 1.0], [1 - 2.0**-11] * 2, [1.0, 1.0]]


def test_a_sparse_gradient_in_16_bits_is_unscaled() -> None:
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float16))
    scaler = mixprec.StaticLossScaler(2.0**10)
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), loss_scaler=scaler)
    scaler.multiply(torch.ones((), requires_grad=True))
    weight.grad = sparse(2.0**9, torch.float16)
    optimizer.step()
    assert weight.tolist() == [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sparse_gradient_in_fp32_is_multiplied_by_the_factor(wrapped: bool) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    sgd = SGD([weight], lr=1.0)
    weight.grad = sparse(2.0, torch.float32)
    if wrapped:
        mixprec.MixedPrecision(sgd).step(grad_factor=0.25)
    else:
        assert step_plain(sgd, torch.tensor(0.25)).stepped
    assert weight.tolist() == [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]


class Stops(Rule):
    """Stops at a large tensor, such as no trial has, while it is broken."""

    broken = False

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if self.broken and p.numel() == 50:
            raise KeyboardInterrupt
        state.setdefault("momentum", torch.zeros_like(p)).add_(grad)
        p.add_(state["momentum"], alpha=-group["lr"])


@pytest.mark.parametrize("masters", ["full", "split"])
def test_masters_that_were_set_before_a_first_step_outlive_its_failure(masters: Any) -> None:
    weight = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    rule = Stops([weight])
    optimizer = mixprec.MixedPrecision(rule, masters=masters)
    with optimizer.masters_in_model(), torch.no_grad():
        weight.fill_(1.001)
    set_to = torch.full((50,), 1.001)
    weight.grad = torch.ones_like(weight)
    rule.broken = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, set_to)
    rule.broken = False
    optimizer.step()
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, set_to - 0.1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_that_was_replaced_is_the_rules_too(fused: bool) -> None:
    weight, bare = (nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.bfloat16, torch.float32))
    rule = SGD([weight], lr=2.0**-10, momentum=0.5)
    optimizer = mixprec.MixedPrecision(rule, masters="split", fused=fused)
    plain = SGD([bare], lr=2.0**-10, momentum=0.5)
    for step in range(6):  # a fused step goes its short way from the third on
        if step == 4:  # momentum begins anew, as when a learning rate is restarted
            optimizer.state = defaultdict(dict)
            plain.state = defaultdict(dict)
            with torch.no_grad():
                bare.copy_(weight)  # the masters were part of what was thrown away
        weight.grad, bare.grad = torch.ones_like(weight), torch.ones_like(bare)
        optimizer.step()
        plain.step()
        assert optimizer.inner.state is optimizer.state
    ((_, master),) = optimizer.masters()
    assert torch.equal(master, bare.detach())
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.full((2,), 1.5))


class FollowsSquares(Rule):
    """Keeps a mean of squares, which no step of its own makes negative."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        mean = state.setdefault("mean", torch.zeros_like(p))
        mean.mul_(0.5).addcmul_(grad, grad, value=0.5)
        p.add_(mean, alpha=-group["lr"])


def test_a_negative_state_that_was_loaded_keeps_its_sign_in_8_bits() -> None:
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(FollowsSquares([weight]), fused=True, state_formats="8bit")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert cast(Tensor, optimizer.state[weight]["mean"]).dtype == torch.uint8
    saved = optimizer.state_dict()
    saved["state"][0]["mean"] = torch.linspace(-1.0, 1.0, 64)
    optimizer.load_state_dict(saved)
    weight.grad = torch.full_like(weight, 1e-15)  # whose square is nothing
    optimizer.step()
    mean: Tensor = optimizer.state_dict()["state"][0]["mean"]
    # Codes of either sign follow c^2 / 127^2, and are 2 / 127 apart at the end of the range: half
    # of that, of at most 1, twice for two trips, and halved by the step.
    assert (mean - torch.linspace(-0.5, 0.5, 64)).abs().max() <= 1 / 127 + 2**-8
    assert cast(Tensor, optimizer.state[weight]["mean"]).dtype == torch.int8
