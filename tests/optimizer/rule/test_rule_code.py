"""What a rule's code can name."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
from small_rules import Rule, params
from torch import Tensor

from mixprec.optimizer.rule.code import RuleCode, code_of


def helper(p: Any) -> float:
    return deeper(p).of_the_helper


def deeper(p: Any) -> Any:
    return p


class Tool:
    def use(self, p: Any) -> float:
        return p.of_the_tool

    def leave(self, p: Any) -> float:
        return p.of_nobody


REGISTRY = {"a": helper}


def of(update: Any, **attributes: Any) -> RuleCode:
    class Bent(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            update(self, group, p, grad, state)

        @property
        def shown(self) -> float:
            return self.of_a_property  # type: ignore[attr-defined]

        @classmethod
        def made(cls) -> float:
            return cls.of_a_classmethod  # type: ignore[attr-defined]

        def unused(self, p: Any) -> float:
            return p.of_an_unused_method

    rule = Bent(params())
    vars(rule).update(attributes)
    return code_of(rule)


def test_names_are_followed_to_all_that_they_may_mean() -> None:
    def update(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.sub_(grad, alpha=group["of_a_group"] * helper(p) * rule.tool.use(p))
        p.mul_(rule.shown * rule.made() * rule.part() * rule.call(p))

    code = of(update, tool=Tool(), part=functools.partial(helper), call=lambda p: p.of_a_lambda)
    names = ("of_the_helper", "of_the_tool", "of_a_group", "of_a_property", "of_a_classmethod")
    assert all(code.names_any([name]) for name in (*names, "of_a_lambda"))
    assert not code.names_any(["of_nobody", "of_an_unused_method"]) and not code.everything
    assert {helper, deeper, Tool.use} <= {*code.functions}
    assert {"of_the_helper", "of_the_tool", "of_a_lambda"} <= code.marks


@pytest.mark.parametrize(
    ("update", "everything"),
    [
        (lambda rule, group, p, grad, state: getattr(p, "a", 1.0), False),
        (lambda rule, group, p, grad, state: getattr(p, group["name"], 1.0), True),
        (lambda rule, group, p, grad, state: rule.tool(p, [1]).a, False),
        (lambda rule, group, p, grad, state: hasattr(p, f"a{group['k']}"), True),
        (lambda rule, group, p, grad, state: vars(p), True),
        (lambda rule, group, p, grad, state: p.__dict__, True),
        (lambda rule, group, p, grad, state: operator.attrgetter("a")(p), True),
        (lambda rule, group, p, grad, state: eval("p.a"), True),
        (lambda rule, group, p, grad, state: REGISTRY["a"](p), True),
        (lambda rule, group, p, grad, state: p.a.b["c"], False),
    ],
)
def test_code_that_makes_up_names_may_look_at_everything(update: Any, everything: bool) -> None:
    code = of(update)
    assert code.everything is everything
    assert code.names_any(["anything"]) is everything and code.names_any(["a"])


def test_a_length_is_a_size_unless_it_is_compared_with_nothing() -> None:
    asks = [
        lambda rule, group, p, grad, state: 1.0 if len(state) == 0 else 2.0,
        lambda rule, group, p, grad, state: 1.0 if len(state) > 0 else 2.0,
        lambda rule, group, p, grad, state: 1.0 if len(state) else 2.0,
        lambda rule, group, p, grad, state: 1.0 / len(p),
        lambda rule, group, p, grad, state: len(p) if group["k"] else 1,
        lambda rule, group, p, grad, state: len(p.shape) > 1,
    ]
    assert ["len" in of(update).words for update in asks] == [False] * 3 + [True] * 3


def test_groups_are_seen_where_code_does_more_than_go_through_them() -> None:
    def loops(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        for other in rule.param_groups:
            p.sub_(grad, alpha=other["lr"])

    sees = [
        lambda rule, group, p, grad, state: any(g["lr"] for g in rule.param_groups),
        lambda rule, group, p, grad, state: [g["lr"] for g in rule.param_groups],
        lambda rule, group, p, grad, state: rule.param_groups[0]["lr"],
        lambda rule, group, p, grad, state: dict(enumerate(rule.param_groups)),
        lambda rule, group, p, grad, state: len(rule.param_groups),
    ]
    assert [of(update).sees_groups for update in (loops, *sees)] == [False] * 3 + [True] * 3


def test_rules_of_torch_read_no_mark_and_have_no_names_of_their_own_making() -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        code = code_of(kind(params(), lr=0.1))  # type: ignore[arg-type]
        assert not code.marks and not code.everything and not code.sees_groups
        assert code.holds()


def test_what_decorators_of_torch_do_is_no_question_of_the_rule() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    before = code_of(torch.optim.AdamW([weight]))
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))  # wraps more of torch.optim
    assert code_of(torch.optim.AdamW([weight])).words == before.words
