"""Saving, loading and copying while the model holds FP32 masters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from test_checkpoint_moments import BF16, FP16, RULES, Run
from torch import nn

import mixprec

STORAGES: list[dict[str, Any]] = [{"masters": "full"}, {"masters": "split"}]


def run_of(options: dict[str, Any]) -> Run:
    run = Run(RULES["AdamW"], (BF16,), options)
    run.happen("step")
    return run


@pytest.mark.parametrize("options", STORAGES)
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda o: o.load_state_dict(o.state_dict()), r"load_state_dict\(\) inside masters_in_mod"),
        (copy.deepcopy, r"copying inside masters_in_model\(\)"),
        (pickle.dumps, r"copying inside masters_in_model\(\)"),
        (lambda o: o.init_state(), r"init_state\(\) inside masters_in_model\(\)"),
    ],
)
def test_what_would_lose_masters_is_refused_and_changes_nothing(
    options: dict[str, Any], call: Callable[[mixprec.MixedPrecision], object], text: str
) -> None:
    run = run_of(options)
    before = run.look()
    with (
        pytest.raises(RuntimeError, match=text) as raised,
        run.optimizer.masters_in_model(),
    ):
        call(run.optimizer)
    assert "Leave the context first" in str(raised.value)
    assert difference(before, run.look()) == ""
    run.happen("step")


@pytest.mark.parametrize("options", STORAGES)
def test_state_dict_inside_is_the_one_outside(options: dict[str, Any]) -> None:
    run = run_of(options)
    run.happen("load weights")  # the last parameter's master waits outside of the state
    outside = frozen([run.optimizer.state_dict(), run.optimizer.fp32_state_dict(run.model)])
    with run.optimizer.masters_in_model():
        inside = frozen([run.optimizer.state_dict(), run.optimizer.fp32_state_dict(run.model)])
    assert difference(outside, inside) == ""


@pytest.mark.parametrize("options", STORAGES)
def test_fp32_weights_loaded_inside_become_masters(options: dict[str, Any]) -> None:
    run = run_of(options)
    weights = {name: torch.randn_like(p.float()) for name, p in run.model.named_parameters()}
    with run.optimizer.masters_in_model():
        run.optimizer.load_fp32_state_dict(run.model, weights)
    held = dict(run.optimizer.masters())
    for name, param in list(run.model.named_parameters())[:3]:
        assert torch.equal(held[param], weights[name])
        assert torch.equal(param, weights[name].to(param.dtype)) or options["masters"] == "split"


@pytest.mark.parametrize("options", STORAGES)
def test_group_that_is_added_inside_steps_afterwards(options: dict[str, Any]) -> None:
    run = run_of(options)
    other = run_of(options)
    with run.optimizer.masters_in_model():
        run.happen("add")
    other.happen("add")
    for moment in ("step", "rest"):
        for each in (run, other):
            each.happen(moment)
    assert difference(run.look(), other.look()) == ""


def test_fp16_masters_are_refused_a_load_inside_too() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=FP16))
    optimizer = mixprec.MixedPrecision(torch.optim.SGD([weight], lr=1e-3))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="Leave the context"), optimizer.masters_in_model():
        optimizer.load_state_dict({})
    assert [m.tolist() for _, m in optimizer.masters()] == [[pytest.approx(0.999)] * 2]
