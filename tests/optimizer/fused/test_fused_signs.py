"""Which states are never negative: every operation against every value that a proof allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_rules import Rule, params
from torch import Tensor

import mixprec
from mixprec.optimizer.fused.program.operations import OPERATIONS, REDUCTIONS
from mixprec.optimizer.fused.program.program import Op, Program
from mixprec.optimizer.fused.program.signs import (
    classes,
    level_of,
    non_negative_levels,
    non_negative_states,
    stay_non_negative,
)

PLUS = [0.0, 1e-45, 0.3, 1.0, 2.5, 1e30, math.inf, math.nan]
ALLOWED = {2: PLUS, 1: [-0.0, *PLUS], 0: [-math.inf, -1e30, -1.5, -0.6, -1e-45, -0.0, *PLUS]}
"""What a value of each level may be."""

FEW = {2: [0.0, 0.3, 1e30, math.nan], 1: [-0.0, 0.3], 0: [-1.5, -0.0, math.inf]}
"""Of them, where three or four are combined."""

SCALARS = [-1.5, -0.0, 0.0, 1e-45, 0.3, 0.7, 1.0, 1.5, math.inf, math.nan]
FEW_SCALARS = [-1.5, -0.0, 0.0, 0.3, 0.7, 1.0, 1.5, math.nan]

Choice = int | float
"""An input: the level of a state, or a number of the host."""


def choices(name: str) -> Iterator[tuple[Choice, ...]]:
    """All levels and scalars that the inputs of an operation may have."""
    arity = len(OPERATIONS[name].needs)
    scalars = SCALARS if arity < 3 else FEW_SCALARS
    kinds: list[tuple[Choice, ...]] = [(0, 1, 2, *scalars)] * arity
    if arity == 4:
        kinds[:2] = [(0, 1, 2)] * 2
    if name.endswith("_scaled"):
        kinds[-1] = tuple(scalars)
    return itertools.product(*kinds)


def given(name: str, inputs: tuple[Choice, ...], *, twice: bool) -> list[Tensor | float]:
    """Every combination of allowed values, scalars as they are; `twice` gives one value to all."""
    values = ALLOWED if len(inputs) < 3 else FEW
    states = [values[level] for level in inputs if type(level) is int]
    if name in REDUCTIONS and states:
        return [torch.tensor(list(itertools.product(states[0], repeat=3))).T]
    if twice:
        columns = [torch.tensor(states[0])] * len(states)
    elif states:
        columns = list(torch.tensor(list(itertools.product(*states))).unbind(1))
    else:
        columns = []
    place = iter(columns)
    numbers = [next(place) if type(level) is int else float(level) for level in inputs]
    return [torch.tensor(n) for n in numbers] if len(numbers) == 1 and not states else numbers


def level(name: str, inputs: tuple[Choice, ...], *, twice: bool) -> int:
    """What is proved of the operation on such inputs."""
    scalars = [value for value in inputs if type(value) is float]
    known = {f"s{index}": found for index, found in enumerate(classes(scalars))}
    number = iter(known)
    names = ["v" if twice else f"v{i}" for i in range(len(inputs))]
    names = [next(number) if type(v) is float else n for v, n in zip(inputs, names, strict=True)]
    levels = [
        known[name][0] if type(value) is float else int(value)
        for value, name in zip(inputs, names, strict=True)
    ]
    return level_of(Op(name, tuple(names), "out"), levels, known)


def lowest(values: Any) -> int:
    """The level that values have."""
    values = torch.as_tensor(values)
    values = values.float()[~values.isnan()]
    if bool((values < 0).any()):
        return 0
    return 1 if bool(torch.signbit(values).any()) else 2


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_makes_a_negative_number_where_the_proof_says_that_it_cannot(
    name: str,
) -> None:
    proved: set[int] = set()
    for inputs in choices(name):
        same = len({value for value in inputs if type(value) is int}) == 1
        for twice in (False, True) if same else (False,):
            found = level(name, inputs, twice=twice)
            proved.add(found)
            if not found:
                continue
            operands = given(name, inputs, twice=twice)
            if name in REDUCTIONS:
                operands = [operands[0]]
            if name == "where":
                operands[0] = torch.as_tensor(operands[0]) > 0.5
            if name.startswith("logical"):
                operands = [torch.as_tensor(operand) > 0.5 for operand in operands]
            assert lowest(OPERATIONS[name].compute(*operands)) >= found, (name, inputs, twice)
    never = {"neg", "sub", "sub_scaled", "log", "log2", "sin", "cos", "tan", "acos"}
    never |= {"log10", "acosh", "lgamma"}
    assert (proved == {0}) == (name in never)


def test_a_root_of_a_negative_zero_is_not_taken_for_a_sum_of_squares() -> None:
    ops = Op("mul", ("v", "s0"), "t0"), Op("reciprocal", ("t0",), "w'")
    program = Program(ops, (("w", "w'"), ("v", "v")), 1)
    assert non_negative_states([(program, [0.5])]) == {"v", "w"}
    assert non_negative_states([(program, [-0.0])]) == {"v"}


def test_nothing_leans_on_a_state_that_is_negative_already() -> None:
    ops = Op("add", ("v", "s0"), "v'"), Op("add", ("w", "v"), "w'")
    program = Program(ops, (("v", "v'"), ("w", "w'")), 1)
    assert non_negative_levels([(program, [1.0])]) == {"v": 2, "w": 2}
    assert non_negative_levels([(program, [1.0])], {"v"}) == {}
    assert non_negative_levels([(program, [1.0])], {"w"}) == {"v": 2}


def test_a_proof_holds_for_scalars_of_the_same_signs() -> None:
    program = Program((Op("lerp", ("v", "t0", "s0"), "v'"),), (("v", "v'"),), 1)
    program = Program((Op("square", ("grad",), "t0"), *program.ops), program.outputs, 1)
    levels = non_negative_levels([(program, [0.1])])
    holds = {s: stay_non_negative(levels, program, classes([s])) for s in (0.2, 1.0, 1.01, -0.1)}
    assert holds == {0.2: True, 1.0: True, 1.01: False, -0.1: False}
    assert classes([1e39]) == classes([math.inf]) and classes([1e-60]) == classes([0.0])


class Fills(Rule):
    """A number known in advance is written over one of the data."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        size = grad.norm().fill_(group["fill"])
        v = state.setdefault("v", torch.zeros_like(p)).copy_(grad.abs() * size)
        p.add_(v, alpha=-group["lr"])


class Sums(Rule):
    """`v` is a sum of squares for as long as `gain` is positive."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        v = state.setdefault("v", torch.zeros_like(p))
        v.mul_(0.5).addcmul_(grad, grad, value=group["gain"])
        p.add_(v, alpha=-group["lr"])


def kind_of_v(optimizer: mixprec.MixedPrecision) -> torch.dtype:
    kinds = {entry["v"].dtype for entry in optimizer.state.values()}
    (kind,) = kinds
    return kind


def stepped(rule: Rule, formats: Any) -> mixprec.MixedPrecision:
    optimizer = mixprec.MixedPrecision(rule, fused=True, state_formats=formats)
    step(optimizer, 0)
    return optimizer


def step(optimizer: mixprec.MixedPrecision, turn: int) -> None:
    generator = torch.Generator().manual_seed(turn)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(("fill", "kind"), [(-0.5, torch.int8), (0.5, torch.uint8)])
def test_a_negative_number_that_is_filled_in_has_a_sign(fill: float, kind: torch.dtype) -> None:
    optimizer = stepped(Fills(params(), fill=fill), {"v": "int8"})
    assert kind_of_v(optimizer) == kind
    values = optimizer.state_dict()["state"][0]["v"]
    assert float(values.min() if fill < 0 else values.max()) * fill > 0.1


def test_codes_get_a_sign_when_a_number_changes_its_own() -> None:
    coded = stepped(Sums(params(), gain=1.0), {"v": "int8"})
    plain = stepped(Sums(params(), gain=1.0), None)
    assert kind_of_v(coded) == torch.uint8
    for turn in (1, 2, 3):
        if turn == 2:
            for optimizer in (coded, plain):
                optimizer.param_groups[0]["gain"] = -3.0
        step(coded, turn)
        step(plain, turn)
    assert kind_of_v(coded) == torch.int8
    for ours, theirs in zip(coded.state.values(), plain.state.values(), strict=True):
        values = coded._fused.held.decoded(ours, ours["v"])["v"]
        assert float((values - theirs["v"]).abs().max()) < 0.02 * float(theirs["v"].abs().max())
