"""explain(), metrics() and grads_finite change nothing, and say what a step will do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from parts import params_of
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW

import mixprec
from mixprec.optimizer.fused import eligible as groups


class Rebound(torch.optim.Optimizer):
    """A rule that keeps its parameters to itself, where no master reaches it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.125})
        self.mine = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.mine:
            p.sub_(p.grad, alpha=0.125)


class Couples(torch.optim.Optimizer):
    """A rule whose update of one tensor depends on the others."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.125})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = sum(p.grad.norm() for p in params)
        for p in params:
            p.sub_(p.grad / norm, alpha=0.125)


def made(rule: Any = AdamW, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    params = [nn.Parameter(torch.ones(*shape, dtype=dtype)) for shape in ((8, 8), (5,))]
    return params, mixprec.MixedPrecision(rule(params), **options)


def step(params: Any, optimizer: Any) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def seen(optimizer: mixprec.MixedPrecision) -> Any:
    """All that a step of the optimizer would go by."""
    parts = optimizer._fused, optimizer._store, optimizer._calls, optimizer._setup, optimizer.inner
    kept = [vars(part) for part in (optimizer, *parts)]
    plain = [
        {k: v for k, v in values.items() if isinstance(v, (int, float, str, dict, set, list))}
        for values in kept
    ]
    sizes = [{k: len(v) for k, v in p.items() if isinstance(v, (dict, set, list))} for p in plain]
    values = [
        {k: v for k, v in p.items() if not isinstance(v, (dict, set, list)) and k != "_plan"}
        for p in plain
    ]
    entries = [dict(optimizer.state.get(p, {})) for p in params_of(optimizer)]
    rng = torch.get_rng_state(), random.getstate()
    return frozen([sizes, values, entries, optimizer.state_dict(), list(map(str, rng))])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: made(),
        lambda: made(fused=True),
        lambda: made(state_formats="8bit"),
        lambda: made(Adafactor),
        lambda: made(dtype=torch.float32),
        lambda: made(lambda ps: SGD(ps, lr=0.125, momentum=0.5), masters="full"),
    ],
)
def test_looking_changes_nothing(make: Callable[[], Any], steps: int) -> None:
    params, optimizer = make()
    for _ in range(steps):
        step(params, optimizer)
    before = seen(optimizer)
    entries = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
    for _ in range(2):
        optimizer.explain()
        optimizer.explain(formula=True, source=True)
        optimizer.metrics()
        assert optimizer.grads_finite
    assert difference(before, seen(optimizer)) == ""
    for param, entry in entries.items():
        assert all(optimizer.state[param][name] is value for name, value in entry.items())


def test_states_in_8_bits_stay_so_and_are_tried_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made(state_formats="8bit")
    step(params, optimizer)
    optimizer._fused.groups.reset()  # as a group that is added does
    tried: list[torch.dtype] = []
    real = groups.admit_fused

    def spy(inner: Any, index: int, *others: Any) -> Any:
        tried.extend(inner.state[p]["exp_avg"].dtype for p in params)
        return real(inner, index, *others)

    monkeypatch.setattr(groups, "admit_fused", spy)
    before = {p: dict(optimizer.state[p]) for p in params}
    assert {entry["exp_avg"].dtype for entry in before.values()} == {torch.int8}
    assert "fused (tier 1" in optimizer.explain() and set(tried) == {torch.float32}
    assert all(optimizer.state[p][k] is v for p in params for k, v in before[p].items())


def test_explaining_a_rule_that_runs_whole_makes_no_master_full() -> None:
    _, optimizer = made(LBFGS)
    text = optimizer.explain()
    assert "FP32 masters, 4 B/param" in text and "not fused (tier 3)" in text
    assert not optimizer._store.whole and not optimizer.state


@pytest.mark.parametrize(
    "make",
    [
        lambda: made(LBFGS, masters="split"),
        lambda: made(Couples, fused=True),
        lambda: made(Couples, state_formats="8bit"),
        lambda: made(Rebound),
        lambda: made(Adafactor, fused=True),
        lambda: made(Adafactor, state_formats="8bit"),
    ],
    ids=["split", "fused-whole", "formats-whole", "rebound", "fused", "formats"],
)
def test_what_a_step_refuses_is_explained_in_the_same_words(make: Callable[[], Any]) -> None:
    params, optimizer = make()
    text = optimizer.explain(source=True)
    for p in params:
        p.grad = torch.ones_like(p)
    closure = (lambda: 1.0,) if isinstance(optimizer.inner, LBFGS) else ()
    with pytest.raises(TypeError) as error:
        optimizer.step(*closure)
    assert str(error.value) in text
    assert "step() will refuse: " in text or "refused by step(): " in text
    assert "B/param" not in text or "refused by step(): " in text


def test_frozen_parameters_have_no_masters_until_they_step() -> None:
    params, optimizer = made()
    params[0].requires_grad_(False)
    text = optimizer.explain()
    assert "1 bfloat16 tensor, 64 parameters: frozen, no masters until they step" in text
    assert "1 bfloat16 tensor, 5 parameters: split masters, 2 B/param" in text
    params[0].requires_grad_(True)
    step(params, optimizer)
    params[0].requires_grad_(False)
    assert "2 bfloat16 tensors, 69 parameters: split masters" in optimizer.explain()


@pytest.mark.parametrize("formats", ["8bit", "bf16"])
def test_a_formula_is_of_the_rule_however_its_states_are_stored(formats: Any) -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(AdamW([weight]), state_formats=formats)
    before = optimizer.explain(formula=True).partition("computes")[2]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = frozen(dict(optimizer.state[weight]))
    assert optimizer.explain(formula=True).partition("computes")[2] == before != ""
    assert difference(frozen(dict(optimizer.state[weight])), kept) == ""
