"""Whoever saves the optimizer saves its loss scaler: a resumed FP16 run scales as it would have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parts import params_of
from test_checkpoint_moments import FP16, RULES, Run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD

import mixprec


def scale_of(run: Run) -> float:
    assert run.optimizer.loss_scaler is not None
    return run.optimizer.loss_scaler.get_scale()


def scaled(moments: tuple[str, ...] = ("step", "overflow", "step", "step", "step")) -> Run:
    """A run whose scale has fallen and grown again: 2^8, halved, then doubled after two steps."""
    run = Run(RULES["AdamW"], (FP16,), {})
    for moment in moments:
        run.happen(moment)
    return run


def test_resumed_run_has_the_scale_and_its_way_to_the_next_one() -> None:
    for moments in (("step", "overflow", "step"), ("overflow", "overflow", "step", "step", "step")):
        run = scaled(moments)
        other = run.resumed()
        assert scale_of(other) == scale_of(run) != 2.0**8
        for moment in ("step", "overflow", "step", "step"):
            for each in (run, other):
                each.happen(moment)
            assert scale_of(other) == scale_of(run)
            for ours, theirs in zip(run.model, other.model, strict=True):
                assert torch.equal(ours, theirs)


def test_state_dict_holds_what_the_scaler_saves_itself() -> None:
    run = scaled()
    scaler: Any = run.optimizer.loss_scaler
    assert run.optimizer.state_dict()["loss_scaler"] == scaler.state_dict()
    assert "loss_scaler" not in Run(RULES["AdamW"], (torch.bfloat16,), {}).optimizer.state_dict()


@pytest.mark.parametrize("order", ["before", "after", "not"])
def test_scaler_that_is_saved_on_its_own_as_well_loads_in_any_order(order: str) -> None:
    run = scaled()
    weights, state = run.saved()
    own: Any = copy.deepcopy(run.optimizer.loss_scaler).state_dict()  # pyright: ignore
    other = Run(run.build, run.dtypes, run.options, time=run.time)
    scaler: Any = other.optimizer.loss_scaler
    other.model.load_state_dict(weights)
    if order == "before":
        scaler.load_state_dict(own)
    other.optimizer.load_state_dict(state)
    if order == "after":
        scaler.load_state_dict(own)
    for _ in range(3):
        for each in (run, other):
            each.happen("step")
    assert scaler.state_dict() == run.optimizer.loss_scaler.state_dict()  # pyright: ignore
    for ours, theirs in zip(run.model, other.model, strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_without_a_scaler_leaves_the_one_that_is_here() -> None:
    run = scaled()
    saved = copy.deepcopy(run.optimizer.state_dict())
    del saved["loss_scaler"]
    before = scale_of(run)
    run.optimizer.load_state_dict(saved)
    assert scale_of(run) == before


def test_checkpoint_with_a_scaler_loads_where_there_is_none() -> None:
    weights, state = scaled().saved()
    model = nn.ParameterList(nn.Parameter(weight.bfloat16()) for weight in weights.values())
    named = list(model.named_parameters())
    mixprec.MixedPrecision(torch.optim.AdamW(named[:3])).load_state_dict(state)
    bare = torch.optim.AdamW([(n, nn.Parameter(p.float())) for n, p in named[:3]])
    for entry in state["state"].values():
        del entry["master"]
    bare.load_state_dict(state)


def test_scaler_of_another_kind_is_refused_and_nothing_changes() -> None:
    def of(scaler: Any) -> mixprec.MixedPrecision:
        weight = nn.Parameter(torch.ones(2, dtype=FP16))
        return mixprec.MixedPrecision(SGD([("w", weight)], lr=0.1), loss_scaler=scaler)

    dynamic, static = of(mixprec.DynamicLossScaler()), of(mixprec.StaticLossScaler(4.0))
    for here, saved, text in (
        (static, dynamic, "lets the loss scale move from .* nothing was loaded"),
        (dynamic, static, "never moves .*so would that of this DynamicLossScaler not; nothing was"),
    ):
        state, before = saved.state_dict(), here.state_dict()
        state["param_groups"][0]["lr"] = 0.7
        with pytest.raises(ValueError, match=text) as raised:
            here.load_state_dict(state)
        assert "del state_dict['loss_scaler']" in str(raised.value)
        assert here.state_dict() == before
        del state["loss_scaler"]
        here.load_state_dict(state)
        assert here.param_groups[0]["lr"] == 0.7
    broken = dynamic.state_dict()
    broken["loss_scaler"]["scale"] = 3.0
    with pytest.raises(ValueError, match=r"cannot be loaded: scale .* power of two"):
        dynamic.load_state_dict(broken)


def test_scaler_that_two_optimizers_share_comes_back_whole() -> None:
    def made() -> tuple[mixprec.DynamicLossScaler, list[mixprec.MixedPrecision]]:
        scaler = mixprec.DynamicLossScaler(init_scale=2.0**10, growth_interval=2)
        weights = [nn.Parameter(torch.ones(2, dtype=FP16)) for _ in range(2)]
        inners = [SGD([("w", weight)], lr=0.1) for weight in weights]
        return scaler, [mixprec.MixedPrecision(inner, loss_scaler=scaler) for inner in inners]

    def step(scaler: Any, optimizers: list[mixprec.MixedPrecision]) -> None:
        loss = scaler.multiply(torch.ones(()))
        for optimizer in optimizers:
            for param in params_of(optimizer):
                param.grad = (torch.ones_like(param) * loss).half()
            optimizer.step()

    scaler, optimizers = made()
    for _ in range(3):
        step(scaler, optimizers)
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    other_scaler, others = made()
    for other, optimizer, state in zip(others, optimizers, saved, strict=True):
        for ours, theirs in zip(params_of(other), params_of(optimizer), strict=True):
            ours.detach().copy_(theirs)
        other.load_state_dict(state)
    for _ in range(3):
        step(scaler, optimizers)
        step(other_scaler, others)
        assert other_scaler.state_dict() == scaler.state_dict()


def test_gradients_that_carry_the_scale_of_before_are_not_stepped() -> None:
    run = scaled()
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.happen("overflow")
    scaler: Any = run.optimizer.loss_scaler
    for param in run.model:
        param.grad = torch.ones_like(param) * scaler.multiply(torch.ones(())).half()
    run.optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="no loss was scaled since the last step"):
        run.optimizer.step()


def test_gradients_that_carry_the_loaded_scale_are_stepped() -> None:
    run = scaled()
    scaler: Any = run.optimizer.loss_scaler
    before = [master.clone() for _, master in run.optimizer.masters()]
    for param in run.model:
        param.grad = torch.ones_like(param) * scaler.multiply(torch.ones(())).half()
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.optimizer.step()
    after = [master for _, master in run.optimizer.masters()]
    assert not any(map(torch.equal, before, after))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_leave_the_scaler_to_whoever_saves_it(flatten: bool) -> None:
    """Torch drops every key that it does not know; the scaler goes into the dict as it is."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    run = scaled()
    run.optimizer.init_state()
    model = nn.ParameterList(list(run.model)[:3])
    saved = copy.deepcopy(get_optimizer_state_dict(model, run.optimizer, options=options))
    run.happen("overflow")
    before = scale_of(run)
    set_optimizer_state_dict(model, run.optimizer, saved, options=options)
    assert scale_of(run) == before


class _Clashing(SGD):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "loss_scaler": {}}


def test_rule_with_a_loss_scaler_of_its_own_in_its_state_dict_is_refused() -> None:
    optimizer = mixprec.MixedPrecision(_Clashing([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(RuntimeError, match=r"_Clashing.state_dict\(\) has an entry 'loss_scaler'"):
        optimizer.state_dict()


def test_load_in_the_middle_of_a_window_is_refused_and_leaves_the_scaler_alone() -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**4)
    weight = nn.Parameter(torch.ones(2, dtype=FP16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.1), loss_scaler=scaler)
    accumulator = mixprec.GradientAccumulator(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["loss_scaler"]["scale"] = 2.0**8
    accumulator.backward(weight.float().sum(), 2, last=False)
    with pytest.raises(RuntimeError, match="in the middle of a window of 1 micro-batches"):
        optimizer.load_state_dict(saved)
    assert scaler.get_scale() == 2.0**4
    accumulator.backward(weight.float().sum(), 2)
    accumulator.step()
