"""What a step says once: that nothing trains, and what the counts and flags make of it."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from parts import judge_on_device
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

import mixprec
from mixprec.gradients import grad_norm, part_norms
from mixprec.optimizer.reports.culprits import Culprits, owners_of_nonfinite
from mixprec.optimizer.reports.step_counts import Letter, StepCounts
from mixprec.user_warnings import Said

INF = float("inf")


def made(count: int = 3, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    params = [nn.Parameter(torch.ones(2, 2, dtype=dtype)) for _ in range(count)]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    return params, mixprec.MixedPrecision(AdamW(named, lr=0.125), **options)


def give(params: Any, value: float = 1.0) -> None:
    for p in params:
        p.grad = torch.full_like(p, value)


def silently(call: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


# ---------------------------------------- no gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_find_no_gradient_say_so_once(dtype: torch.dtype, fused: bool) -> None:
    params, optimizer = made(dtype=dtype, fused=fused)
    text = (
        r"none of the optimizer's 3 parameters has a gradient, so this step changed nothing\. "
        r"Either backward\(\) was not called .*fully_shard\(model\), .*assign=True.*adapters.* "
        r"call fully_shard\(model\) first, then torch\.optim\.AdamW\(model\.parameters\(\)\)"
    )
    with pytest.warns(RuntimeWarning, match=text) as told:
        for _ in range(3):
            optimizer.step()
    assert len(told) == 1 and told[0].filename == __file__
    assert not optimizer.grads_finite
    metrics = optimizer.metrics()
    assert (metrics["steps"], metrics["empty_steps"], metrics["skipped_steps"]) == (0, 3, 0)
    give(params)
    optimizer.step()
    assert optimizer.grads_finite and optimizer.metrics()["steps"] == 1


def test_a_model_whose_parameters_were_replaced_is_noticed() -> None:
    model = nn.Linear(2, 2).bfloat16()
    optimizer = mixprec.MixedPrecision(SGD(model.parameters(), lr=1.0))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    with pytest.warns(RuntimeWarning, match="goes on holding the old ones"):
        optimizer.step()


def test_frozen_parameters_are_named_as_the_reason() -> None:
    params, optimizer = made()
    for p in params:
        p.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match=r"All of them are frozen \(requires_grad=False\)"):
        optimizer.step()


def test_an_optimizer_whose_parameters_come_later_is_not_told_of_them() -> None:
    optimizer = mixprec.MixedPrecision(SGD([{"params": []}], lr=1.0))
    silently(optimizer.step)


def test_a_step_without_gradients_says_nothing_about_the_loss_scale() -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=4.0, growth_interval=1)
    _, optimizer = made(dtype=torch.float16, loss_scaler=scaler)
    scaler.multiply(torch.zeros(()))
    with pytest.warns(RuntimeWarning, match="has a gradient"):
        optimizer.step()
    assert scaler.get_scale() == 4.0


# ---------------------------------------- gradients of exactly 0


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_gradients_that_carry_the_loss_scale_is_noticed(scaled: bool) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    scaler = mixprec.DynamicLossScaler() if scaled else None
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), loss_scaler=scaler)
    text = (
        r"every gradient of this step is exactly 0.*somebody clipped gradients that still carry "
        r"the loss scale: torch's norm .* Pass max_grad_norm= to MixedPrecision"
        if scaled
        else r"every gradient of this step is exactly 0.*pass max_grad_norm= to MixedPrecision "
        r"instead.*or the loss does not depend"
    )
    with pytest.warns(RuntimeWarning, match=text) as told:
        for _ in range(3):
            loss = weight.float().sum() * 0.5
            (scaler.multiply(loss) if scaler is not None else loss * 2.0**16).backward()
            norm = nn.utils.clip_grad_norm_([weight], 1.0)
            assert norm.isinf() and weight.grad is not None and not weight.grad.any()
            optimizer.step()
    assert len(told) == 1 and told[0].filename == __file__
    assert optimizer.metrics()["steps"] == 3


def test_small_gradients_whose_squares_vanish_are_not_zero() -> None:
    params, optimizer = made()
    give(params, 1e-30)
    assert float(grad_norm([p.grad for p in params])) == 0.0
    silently(optimizer.step)


def test_one_gradient_that_is_not_zero_is_enough() -> None:
    params, optimizer = made()
    give(params, 0.0)
    params[1].grad[0, 0] = 1.0
    silently(optimizer.step)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_tensors_without_elements_are_not_zero(clip: float | None) -> None:
    params = [nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(0))]
    optimizer = mixprec.MixedPrecision(AdamW(params, lr=0.125), max_grad_norm=clip)
    give(params)
    silently(optimizer.step)
    assert optimizer.grads_finite and optimizer.metrics()["steps"] == 1


def test_steps_that_only_make_state_are_not_told_of_zeros() -> None:
    params, optimizer = made()
    optimizer.param_groups[0]["lr"] = 0.0
    give(params, 0.0)
    silently(optimizer.step)


def test_a_rule_that_has_converged_is_not_told_of_zeros() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = mixprec.MixedPrecision(LBFGS([weight]))

    def closure() -> float:
        weight.grad = torch.zeros_like(weight)
        return 0.0

    silently(lambda: optimizer.step(closure))


# ---------------------------------------- windows without tokens


@pytest.mark.parametrize("factor", [0.0, torch.zeros((), dtype=torch.float64)])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"on_nonfinite": "ignore"}])
def test_windows_without_tokens_are_no_steps(options: dict[str, Any], factor: Any) -> None:
    params, optimizer = made(**options)
    give(params)
    for grad_factor in (1.0, factor, factor):
        optimizer.step(grad_factor=grad_factor)
    assert float(optimizer.state[params[0]]["step"]) == 1.0
    assert not optimizer.grads_finite
    metrics = optimizer.metrics()
    assert (metrics["steps"], metrics["empty_steps"], metrics["skipped_steps"]) == (1, 2, 0)
    optimizer.step(grad_factor=1.0)
    assert optimizer.grads_finite and optimizer.metrics()["steps"] == 2


@pytest.mark.parametrize("device", [False, True])
def test_fifty_windows_in_a_row_without_tokens_are_told_of(
    device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = made(fused=True)
    give(params)
    optimizer.step(grad_factor=1.0)
    if device:
        judge_on_device(optimizer, monkeypatch)

    def windows(count: int) -> None:
        for _ in range(count):
            give(params)
            optimizer.step(grad_factor=torch.zeros(()))

    silently(lambda: windows(49))
    with pytest.warns(RuntimeWarning, match=r"windows in a row held no tokens.*'empty_steps'"):
        windows(20 if device else 1)
    silently(lambda: windows(60))


def test_a_row_of_skips_goes_on_behind_an_empty_window() -> None:
    params, optimizer = made()
    for factor in (None, 0.0, None):
        give(params, INF)
        with pytest.warns(RuntimeWarning) if factor is None else nullcontext():
            optimizer._outcome.said = Said()
            optimizer.step(grad_factor=factor)
    assert optimizer.metrics()["skips_in_a_row"] == 2


# ---------------------------------------- what the device knows first


@pytest.mark.parametrize("prepared", [True, False])
def test_a_skip_that_is_heard_of_late_names_its_tensors(
    prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prepared`: fused. Else torch's own fused rule, which skips when it is told on the device."""
    params = [nn.Parameter(torch.ones(40, 2, dtype=torch.bfloat16)) for _ in range(4)]
    inner = AdamW([(f"w{i}", p) for i, p in enumerate(params)], fused=not prepared)
    optimizer = mixprec.MixedPrecision(inner, fused=prepared)
    give(params)
    optimizer.step()
    judge_on_device(optimizer, monkeypatch)
    give(params[:3])
    for p in params[1:3]:
        p.grad[3, 1] = INF  # pyright: ignore[reportOptionalSubscript]
    before = [p.detach().clone() for p in params]
    silently(optimizer.step)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    optimizer.zero_grad()
    give(params)
    with pytest.warns(RuntimeWarning, match="not finite in 'w1', 'w2'; the step was skipped"):
        optimizer.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("prepared", [True, False])
def test_the_fiftieth_skip_of_a_device_raises_with_names(
    prepared: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16)) for _ in range(3)]
    scaler = mixprec.DynamicLossScaler() if scaled else None
    inner = AdamW([(f"w{i}", p) for i, p in enumerate(params)], fused=not prepared)
    optimizer = mixprec.MixedPrecision(inner, fused=prepared, loss_scaler=scaler)

    def step(value: float) -> None:
        if scaler is not None:
            scaler.multiply(torch.zeros(()))
        optimizer.zero_grad()
        give(params)
        params[1].grad[0, 0] = value  # pyright: ignore[reportOptionalSubscript]
        optimizer.step()

    step(1.0)
    judge_on_device(optimizer, monkeypatch)
    with nullcontext() if scaled else pytest.warns(RuntimeWarning, match="not finite in 'w1'"):
        for _ in range(49):
            step(INF)
    with pytest.raises(FloatingPointError, match=r"50 steps in a row .*in 'w1'"):
        step(INF)
    with pytest.raises(FloatingPointError, match=r"51 steps in a row .*in 'w1'"):
        step(INF)
    before = [master.clone() for _, master in optimizer.masters()]
    step(1.0)  # who catches the error may go on
    assert optimizer.grads_finite
    assert not any(map(torch.equal, before, (master for _, master in optimizer.masters())))


def test_zeros_on_a_device_are_told_of_when_the_host_comes_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, optimizer = made(fused=True)
    judge_on_device(optimizer, monkeypatch, by_kernel=False)
    give(params, 0.0)
    silently(optimizer.step)
    give(params)
    with pytest.warns(RuntimeWarning, match="every gradient of this step is exactly 0"):
        optimizer.step()


def test_a_bad_factor_under_a_loss_scaler_is_told_of_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most skips there are the scaler's, so the host has the counts sent and goes on."""
    scaler = mixprec.DynamicLossScaler(init_scale=4.0)
    params, optimizer = made(fused=True, loss_scaler=scaler)
    judge_on_device(optimizer, monkeypatch, by_kernel=False)

    def step(factor: float) -> None:
        scaler.multiply(torch.zeros(()))
        give(params)
        optimizer.step(grad_factor=torch.tensor(factor))

    for _ in range(5):
        step(1.0)
    silently(lambda: step(INF))
    silently(lambda: step(1.0))
    with pytest.warns(RuntimeWarning, match="grad_factor is inf: .*the step was skipped"):
        step(1.0)
    assert scaler.get_scale() == 4.0 and optimizer.metrics()["skipped_steps"] == 1


def test_steps_of_a_device_that_only_make_state_are_not_told_of_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, optimizer = made(fused=True)
    judge_on_device(optimizer, monkeypatch, by_kernel=False)
    for lr in (0.0, 0.125, 0.125, 0.125):
        optimizer.param_groups[0]["lr"] = lr
        give(params, 1.0 if lr else 0.0)
        silently(optimizer.step)


def test_parts_lead_back_to_the_tensors_that_they_are_of() -> None:
    grads = [
        torch.ones(3),
        torch.ones(0),
        torch.full((2**18,), 1.0, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.float16),
        torch.tensor([1.0, INF]),
    ]
    grads[2][-1] = float("nan")
    parts, owners = part_norms(grads)
    assert len(parts) == len(owners) and sorted(set(owners)) == [0, 2, 3, 4]
    assert owners_of_nonfinite(parts, owners) == [4, 2]
    assert torch.equal(grad_norm(grads[:1]), torch.linalg.vector_norm(torch.ones(3)))


def test_culprits_keep_nothing_alive_and_are_not_copied() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    give(params)
    culprits = Culprits()
    grads: Any = [p.grad for p in params]
    kind = object()
    culprits.note(grads, kind, params, torch.tensor([INF, INF]), [0, 1])
    assert culprits.names([{"params": params, "param_names": ["a", "b"]}]) == ["a", "b"]
    culprits.note(grads, kind, (), torch.tensor([1.0, INF]), [0, 1])
    assert culprits.names([{"params": params, "param_names": ["a", "b"]}]) == ["b"]
    culprits.note(grads[::-1], object(), params, torch.tensor([1.0, INF]), [0, 1])
    assert culprits.names([{"params": params, "param_names": ["a", "b"]}]) == ["a"]
    culprits.note(grads, kind, params, torch.tensor([1.0, INF]), [0, 1])
    params.pop()
    assert culprits.names([{"params": params, "param_names": ["a"]}]) == []
    assert copy.deepcopy(culprits)._params == [] == pickle.loads(pickle.dumps(culprits))._params


# ---------------------------------------- the counts


YES, NO = True, False
EVENTS = [
    # overflowed, counted, zero, usable
    *((YES, YES, NO, YES), (NO, YES, YES, YES), (YES, YES, NO, NO), (NO, NO, YES, NO)),
    *((NO, NO, NO, NO), (YES, YES, YES, NO), (NO, YES, NO, YES), (NO, NO, NO, YES)),
]


def test_counts_of_host_and_device_agree_after_every_step() -> None:
    host, device, mixed = StepCounts(), StepCounts(), StepCounts()
    mixed.on(torch.device("cpu"))
    for flags in EVENTS:
        host.add(*flags)
        device.add(*(torch.tensor(float(flag)) for flag in flags))
        mixed.add(*flags)
        assert host.now() == device.now() == mixed.now()
    assert host.now() == Letter(3, 0, 2, 3, 1, 1, 2)


def test_a_letter_holds_the_counts_of_when_it_was_sent() -> None:
    counts = StepCounts()
    counts.send()
    assert counts.letter() is None  # the host has them
    counts.add(torch.tensor(True))
    counts.send()
    counts.add(torch.tensor(False))
    copied = copy.deepcopy(counts)
    letter = counts.letter()
    assert letter is not None and (letter.skipped_in_a_row, letter.stepped) == (1, 0)
    assert counts.letter() is None is copied.letter()
    assert copied.now() == counts.now() == Letter(1, 0, 1, 0, 0, 0, 0)
