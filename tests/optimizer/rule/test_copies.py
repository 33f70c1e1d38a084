"""Copies of what a rule keeps: they share nothing that could change, and tell every change."""

from __future__ import annotations

import io
import itertools
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mixprec.optimizer.rule.copies import LARGEST, Copier, IdOfParameter, Opaque, by_value


class Plain:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def method(self) -> Any:
        return vars(self)

    def __eq__(self, other: object) -> bool:
        raise AssertionError("nobody's own comparison is asked")

    __hash__ = None  # type: ignore[assignment]


class Slots:
    __slots__ = ("unset", "x")

    def __init__(self) -> None:
        self.x = [1]


class Table(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("nobody's own methods are called")


class Triple(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    parts: list[int]


Case = tuple[Any, Callable[[Any], Any]]


def plain() -> Plain:
    return Plain(items=[1], deep={"a": [1]})


CASES: dict[str, Callable[[], Case]] = {
    "list": lambda: ([1, [2]], lambda c: c[1].append(3)),
    "flat list": lambda: ([1.0, 2.0], lambda c: c.append(3)),
    "tuple": lambda: ((1, [2]), lambda c: c[1].append(3)),
    "dict": lambda: ({"a": {"b": 1}}, lambda c: c["a"].update(b=2)),
    "flat dict": lambda: ({"a": 1}, lambda c: c.update(a=2)),
    "dict of tuples": lambda: ({"betas": (0.9, 0.99)}, lambda c: c.update(betas=(0.9, 0.95))),
    "key of a dict": lambda: ({"a": [1]}, lambda c: c.update(b=c.pop("a"))),
    "set": lambda: ({1, 2}, lambda c: c.add(3)),
    "deque": lambda: (deque([1, [2]], maxlen=2), lambda c: c[1].append(3)),
    "ordered": lambda: (OrderedDict(a=[1]), lambda c: c["a"].append(1)),
    "default": lambda: (defaultdict(list, {1: [2]}), lambda c: c[5]),
    "counter": lambda: (Counter("aab"), lambda c: c.update("a")),
    "object": lambda: (plain(), lambda c: c.items.append(1)),
    "object, deep": lambda: (plain(), lambda c: c.deep["a"].append(1)),
    "new attribute": lambda: (plain(), lambda c: setattr(c, "more", 1)),
    "no attribute": lambda: (plain(), lambda c: delattr(c, "items")),
    "slots": lambda: (Slots(), lambda c: c.x.append(2)),
    "unset slot": lambda: (Slots(), lambda c: setattr(c, "unset", 1)),
    "subclass": lambda: (Table(a=[1]), lambda c: c["a"].append(2)),
    "named tuple": lambda: (Triple(1, [2]), lambda c: c.second.append(2)),
    "frozen": lambda: (Frozen([1]), lambda c: c.parts.append(2)),
    "namespace": lambda: (SimpleNamespace(a=[1]), lambda c: c.a.append(2)),
    "tensor": lambda: (torch.ones(2), lambda c: c.add_(1)),
    "tensor of a number": lambda: (torch.tensor(1.0), lambda c: c.add_(1)),
    "array": lambda: (np.ones(2), lambda c: c.__setitem__(0, 3)),
    "view": lambda: (MappingProxyType({"a": [1]}), lambda c: c["a"].append(1)),
    "partial": lambda: (partial(sorted, [1]), lambda c: c.args[0].append(1)),
    "method": lambda: (plain().method, lambda c: c()["items"].append(1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_copy_is_the_same_until_it_changes_and_never_changes_the_original(name: str) -> None:
    value, change = CASES[name]()
    again, _ = CASES[name]()
    copier = Copier({})
    copy = copier.copy(value)
    assert type(copy) is type(value) and copy is not value
    assert copier.same(value, copy) and Copier({}).same(value, again)
    assert by_value(value) == by_value(again) == by_value(copy)
    change(copy)
    assert not copier.same(value, copy) and copier.same(value, again)
    assert by_value(copy) != by_value(value)


@pytest.mark.parametrize(
    "value",
    [1, 1.5, "a", None, (1, 2.0), torch.float32, torch.device("cpu"), len, Plain, range(3), np],
)
def test_what_cannot_change_is_shared(value: Any) -> None:
    copier = Copier({})
    assert copier.copy(value) is value and copier.same(value, value)


def test_numbers_are_told_apart_by_kind_and_by_every_bit() -> None:
    copier = Copier({})
    for left, right in ((1, 1.0), (0.0, -0.0), (True, 1), ([0.0], [-0.0]), ((1,), [1])):
        assert by_value(left) != by_value(right)
        assert not copier.same(left, right) or left == right == 0.0
    assert copier.same(float("nan"), float("nan")) and copier.same([float("nan")], [float("nan")])


def test_one_object_has_one_copy_wherever_it_is() -> None:
    shared = [1]
    loop: dict[str, Any] = {"a": shared, "b": Plain(shared=shared)}
    loop["itself"] = loop
    copier = Copier({})
    copy = copier.copy(loop)
    assert copy["a"] is copy["b"].shared and copy["itself"] is copy and copy["a"] is not shared
    assert copier.same(loop, copy) and by_value(loop) == by_value(copy)


def test_what_stands_for_an_object_is_put_in_its_place() -> None:
    owner, stand_in = Plain(x=1), Plain(x=2)
    copier = Copier({id(owner): stand_in})
    copy = copier.copy({"owner": owner, "method": owner.method})
    assert copy["owner"] is stand_in and copy["method"]() == {"x": 2}
    assert copier.same({"owner": owner, "method": owner.method}, copy)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (random.Random(0), "a random.Random"),
        (threading.Lock(), "a _thread.lock"),
        (io.StringIO(), "a _io.StringIO"),
        (itertools.count(), "a itertools.count"),
        ((n for n in ()), "a builtins.generator"),
        (torch.Generator(), "a torch._C.Generator"),
        (np.random.default_rng(), "a numpy.random._generator.Generator"),
        (torch.zeros(LARGEST + 1), "a tensor of 4,097 elements"),
        ([0] * (LARGEST + 1), "a list of 4,097 items"),
        (np.zeros(LARGEST + 1), "an array of 4,097 elements"),
        (torch.zeros(2, device="meta"), "a Tensor on meta"),
        (torch.eye(2).to_sparse(), "a Tensor on cpu (torch.sparse_coo)"),
    ],
)
def test_what_has_hidden_parts_has_no_copy(value: Any, text: str) -> None:
    for held in (value, [value], {"a": Plain(x=value)}):
        with pytest.raises(Opaque) as raised:
            Copier({}).copy(held)
        assert text in str(raised.value)


def test_parameters_have_no_copy_by_themselves_or_by_their_ids() -> None:
    param = torch.zeros(2)
    params = frozenset([id(param)])
    for held in (param, [param], {param: 1.0}):
        with pytest.raises(Opaque, match="one of the parameters"):
            Copier({}, params).copy(held)
    for held in ({id(param): 1.0}, {id(param): [1.0]}, [id(param)]):
        with pytest.raises(IdOfParameter, match="the id of one of the parameters"):
            Copier({}, params).copy(held)


def test_functions_and_classes_that_were_met_are_named() -> None:
    copier = Copier({})
    hook = lambda: 1  # noqa: E731
    copier.copy({"hook": hook, "of": [Plain(x=1).method]})
    assert hook in copier.code and Plain in copier.code and Plain.method in copier.code
