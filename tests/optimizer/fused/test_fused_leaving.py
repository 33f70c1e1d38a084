"""Rules that stop being what their programs are, in the middle of training."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from parts import judge_on_device, params_of
from torch import Tensor, nn
from torch.optim import Optimizer

import mixprec
from mixprec.optimizer.fused.eligible import FusedGroups
from mixprec.optimizer.fused.members import Members
from mixprec.optimizer.fused.pending import Pending

SHAPES = [(12, 8), (50,), (3, 4, 5), (7,), (6, 2), (5,)]


class Switching(Optimizer):
    """Momentum; groups whose number is in `mixed` add up their gradients along a dimension."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})
        self.mixed = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    grad = p.grad.cumsum(0) if group["name"] in self.mixed else p.grad
                    entry = self.state[p]
                    entry["step"] = entry.get("step", 0) + 1
                    entry.setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(grad)
                    p.sub_(entry["momentum"], alpha=group["lr"] / entry["step"])


@pytest.fixture(autouse=True)
def fuse_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" fuse here what it fuses on a GPU."""

    def takes(groups: FusedGroups, param: Tensor) -> bool:
        return groups.fused is not False and param.dtype == torch.bfloat16

    monkeypatch.setattr(FusedGroups, "_takes", takes)


def made(fused: Any, **options: Any) -> mixprec.MixedPrecision:
    """Three groups of two parameters."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in SHAPES]
    groups = [{"params": weights[2 * i : 2 * i + 2], "name": str(i)} for i in range(3)]
    return mixprec.MixedPrecision(Switching(groups), fused=fused, **options)


def mix(optimizer: mixprec.MixedPrecision, names: str) -> None:
    vars(optimizer.inner)["mixed"] = names


def take_step(optimizer: mixprec.MixedPrecision, step: int, *, overflow: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    scaler: Any = optimizer.loss_scaler
    loss_scale = 1.0 if scaler is None else float(scaler.multiply(torch.ones(())))
    for p in params_of(optimizer):
        p.grad = (torch.randn(p.shape, generator=generator) * loss_scale).bfloat16()
    if overflow:
        last: Any = list(params_of(optimizer))[-1]
        last.grad[0] = math.inf
    optimizer.step()


def assert_same(ours: mixprec.MixedPrecision, plain: mixprec.MixedPrecision) -> None:
    for (left, master), (right, expected) in zip(ours.masters(), plain.masters(), strict=True):
        assert torch.equal(left, right) and torch.equal(master, expected)
    assert difference(frozen(ours.state_dict()), frozen(plain.state_dict())) == ""


def fused_groups(optimizer: mixprec.MixedPrecision) -> list[bool]:
    text = optimizer.explain()
    return [f"param_groups[{i}] is fused (tier 1" in text for i in range(3)]


@pytest.mark.parametrize("mixed", ["0", "2", "02", "012"])
def test_a_group_that_cannot_be_fused_any_more_leaves_and_everybody_steps_once(mixed: str) -> None:
    ours, plain = made("auto"), made(False)
    for step in range(7):
        for optimizer in (ours, plain):
            if step == 3:
                mix(optimizer, mixed)
            take_step(optimizer, step)
        assert_same(ours, plain)
    assert fused_groups(ours) == [str(i) not in mixed for i in range(3)]
    assert "not fused (tier 2): torch.cumsum is not element-wise" in ours.explain()
    assert {entry["step"] for entry in ours.state.values()} == {7}


def test_what_stays_fused_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = made("auto")
    take_step(optimizer, 0)
    plans: list[int] = []
    make = optimizer._fused._planned

    def counted(members: Members, pending: Pending) -> Any:
        plans.append(len(members.params))
        return make(members, pending)

    monkeypatch.setattr(optimizer._fused, "_planned", counted)
    for step in range(1, 5):
        if step == 2:
            mix(optimizer, "0")
        take_step(optimizer, step)
    assert plans == [4]


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mixed", ["0", "012"])
def test_a_verdict_of_the_device_is_read_for_a_rule_that_would_not_obey_it(
    mixed: str, scaled: bool, overflow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaler() -> Any:
        return mixprec.DynamicLossScaler(init_scale=2.0**8) if scaled else None

    ours, plain = made("auto", loss_scaler=scaler()), made(False, loss_scaler=scaler())
    for optimizer in (ours, plain):
        take_step(optimizer, 0)
        mix(optimizer, mixed)
    before = frozen([ours.state_dict()["state"], [p.detach() for p in params_of(ours)]])
    with monkeypatch.context() as patch:
        judge_on_device(ours, patch)
        for optimizer in (ours, plain):
            with told_of_a_skip() if overflow and not scaled else nullcontext():
                take_step(optimizer, 1, overflow=overflow)
    if overflow:
        after = frozen([ours.state_dict()["state"], [p.detach() for p in params_of(ours)]])
        assert difference(before, after) == ""
    assert ours.grads_finite != overflow
    assert ours.metrics() == plain.metrics()
    for step in range(2, 5):
        for optimizer in (ours, plain):
            take_step(optimizer, step)
        assert_same(ours, plain)
    assert ours.metrics() == plain.metrics()
    assert fused_groups(ours) == [str(i) not in mixed for i in range(3)]


def told_of_a_skip() -> Any:
    text = "gradients are not finite in .param_groups.2.*; the step was skipped"
    return pytest.warns(RuntimeWarning, match=text)


def test_insisting_on_a_fused_step_says_what_has_changed() -> None:
    optimizer = made(True)
    take_step(optimizer, 0)
    mix(optimizer, "1")
    before = [master.clone() for _, master in optimizer.masters()]
    for step in (1, 2):
        with pytest.raises(TypeError, match=r"fused=True, but Switching.*torch\.cumsum is not"):
            take_step(optimizer, step)
    for (_, master), old in zip(optimizer.masters(), before, strict=True):
        assert torch.equal(master, old)
    mix(optimizer, "")
    take_step(optimizer, 1)
    plain = made(False)
    for step in (0, 1):
        take_step(plain, step)
    assert_same(optimizer, plain)


def test_a_replay_of_what_the_rule_no_longer_does_is_refused() -> None:
    optimizer = made(True)
    for step in range(2):
        take_step(optimizer, step)
    assert optimizer._fused._plan is not None
    optimizer._fused._captured = optimizer._fused._plan, None  # as a capture leaves it
    mix(optimizer, "1")
    with pytest.raises(RuntimeError, match="the captured step is no longer what the rule does"):
        optimizer.prepare_replay()
