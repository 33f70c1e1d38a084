"""Whatever a rule's code can read is read anew in each fused step, or the rule is not fused."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rules import Rule, params
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW

import mixprec
from mixprec.optimizer.fused.self_check import admit_fused

# ---------------------------------------- a rule that reads all there is


@dataclass
class Options:
    """An object with attributes."""

    gain: float = 1.0
    parts: list[Any] = field(default_factory=lambda: [1.0, {"deep": [1.0]}])


@dataclass(frozen=True)
class Frozen:
    parts: list[float]


class Slots:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


class Box(dict[str, float]):
    """A dict with an attribute."""

    gain = 1.0


class Pair(NamedTuple):
    first: float
    second: list[float]


GLOBAL = 1.0
TABLE = {"gain": 1.0}


def of_module() -> float:
    return 1.0


def sizes_of(cell: list[float]) -> Callable[[], float]:
    return lambda: cell[0]


class Reads(Rule):
    """Its learning rate is a product of everything that a rule can look at."""

    in_class = 1.0
    table_in_class = MappingProxyType({"gain": 1.0})

    def __init__(self, weights: Any) -> None:
        super().__init__(weights, 0.1, option=1.0, betas=(1.0, 0.5), nested={"a": [1.0]})
        self.param_groups[0].update(tensor=torch.tensor(1.0), space=SimpleNamespace(gain=1.0))
        self.number = 1.0
        self.flag = True
        self.word = "plain"
        self.items: Any = [1.0, [1.0]]
        self.pair: Any = (1.0, [1.0])
        self.table: dict[str, Any] = {"gain": 1.0}
        self.ordered = OrderedDict(gain=1.0)
        self.default: Any = defaultdict(lambda: 1.0)
        self.counted = Counter(gain=1)
        self.names = {"one"}
        self.queue = deque([1.0], maxlen=3)
        self.tensor = torch.tensor(1.0)
        self.levels = torch.tensor([1.0, 2.0])
        self.array = np.array([1.0])
        self.space = SimpleNamespace(gain=1.0, inner=SimpleNamespace(gain=[1.0]))
        self.options, self.frozen, self.slots, self.box = Options(), Frozen([1.0]), Slots(), Box()
        self.named = Pair(1.0, [1.0])
        self.call: Any = lambda: 1.0
        self.part = partial(lambda gain: gain, 1.0)
        self.cell = [1.0]
        self.enclosed = sizes_of(self.cell)
        self.bound = self.gain
        self.of_other = self.options.parts.__getitem__
        self.defaults["kept"] = [1.0]

    def gain(self) -> float:
        return self.number

    def method(self) -> float:
        return 1.0

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        found: list[Any] = [
            *(group["option"], group["betas"][0], group["nested"]["a"][0], group["tensor"].item()),
            *(
                group["space"].gain,
                self.number,
                float(self.flag),
                1.0 if self.word == "plain" else 0.5,
            ),
            *(self.items[0], self.items[1][0], self.pair[0], self.pair[1][0], self.table["gain"]),
            *(self.ordered["gain"], self.default["gain"], self.counted["gain"], len(self.names)),
            *(self.queue[-1], self.tensor.item(), self.levels[0].item(), float(self.array[0])),
            *(self.space.gain, self.space.inner.gain[0], self.options.gain, self.options.parts[0]),
            *(
                self.options.parts[1]["deep"][0],
                self.frozen.parts[0],
                self.slots.gain,
                self.box.gain,
            ),
            *(self.named.first, self.named.second[0], self.call(), self.part(), self.enclosed()),
            *(self.bound(), self.method(), self.in_class, self.table_in_class["gain"]),
            *(
                self.defaults["kept"][0],
                GLOBAL,
                TABLE["gain"],
                of_module(),
                getattr(p, "mark", 1.0),
            ),
            getattr(p, "table", {"gain": 1.0})["gain"],
        ]
        gain = 1.0
        for number in found:
            gain *= number
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(0.5).add_(grad, alpha=gain)
        p.sub_(momentum, alpha=group["lr"])


def set_global(rule: Any, value: float) -> None:
    globals()["GLOBAL"] = value


def set_of_module(rule: Any, value: float) -> None:
    globals()["of_module"] = lambda: value


def fill(tensor: Tensor, value: float) -> None:
    tensor.data.fill_(value)  # which leaves no trace in its version


def mark(rule: Any, value: float) -> None:
    for p in rule.param_groups[0]["params"][:1]:
        p.mark = value


def mark_deeply(rule: Any, value: float) -> None:
    p = rule.param_groups[0]["params"][-1]
    if not hasattr(p, "table"):
        p.table = {}
    p.table["gain"] = value


CHANGES: dict[str, Callable[[Any, float], Any]] = {
    "group": lambda r, v: r.param_groups[0].update(option=v),
    "group, tuple": lambda r, v: r.param_groups[0].update(betas=(v, 0.5)),
    "group, nested": lambda r, v: r.param_groups[0]["nested"]["a"].__setitem__(0, v),
    "group, tensor": lambda r, v: fill(r.param_groups[0]["tensor"], v),
    "group, namespace": lambda r, v: setattr(r.param_groups[0]["space"], "gain", v),
    "number": lambda r, v: setattr(r, "number", v),
    "flag": lambda r, v: setattr(r, "flag", v > 1),
    "word": lambda r, v: setattr(r, "word", f"{v}"),
    "list": lambda r, v: r.items.__setitem__(0, v),
    "list, nested": lambda r, v: r.items[1].__setitem__(0, v),
    "tuple": lambda r, v: setattr(r, "pair", (v, [1.0])),
    "tuple, nested": lambda r, v: r.pair[1].__setitem__(0, v),
    "dict": lambda r, v: r.table.update(gain=v),
    "ordered dict": lambda r, v: r.ordered.update(gain=v),
    "default dict": lambda r, v: r.default.__setitem__("gain", v),
    "counter": lambda r, v: r.counted.update(gain=int(4 * v)),
    "set": lambda r, v: r.names.add(f"{v}"),
    "deque": lambda r, v: r.queue.append(v),
    "tensor": lambda r, v: fill(r.tensor, v),
    "other tensor": lambda r, v: setattr(r, "tensor", torch.tensor(v)),
    "item of a tensor": lambda r, v: fill(r.levels[:1], v),
    "array": lambda r, v: r.array.__setitem__(0, v),
    "namespace": lambda r, v: setattr(r.space, "gain", v),
    "namespace, nested": lambda r, v: r.space.inner.gain.__setitem__(0, v),
    "dataclass": lambda r, v: setattr(r.options, "gain", v),
    "dataclass, nested": lambda r, v: r.options.parts.__setitem__(0, v),
    "dataclass, deep": lambda r, v: r.options.parts[1]["deep"].__setitem__(0, v),
    "frozen dataclass": lambda r, v: r.frozen.parts.__setitem__(0, v),
    "slots": lambda r, v: setattr(r.slots, "gain", v),
    "attribute of a dict": lambda r, v: setattr(r.box, "gain", v),
    "named tuple": lambda r, v: setattr(r, "named", Pair(v, [1.0])),
    "named tuple, nested": lambda r, v: r.named.second.__setitem__(0, v),
    "callable": lambda r, v: setattr(r, "call", lambda: v),
    "partial": lambda r, v: setattr(r, "part", partial(lambda gain: gain, v)),
    "cell of a closure": lambda r, v: r.cell.__setitem__(0, v),
    "bound method": lambda r, v: setattr(r, "bound", partial(float, v)),
    "method of the instance": lambda r, v: setattr(r, "method", lambda: v),
    "method of the class": lambda r, v: setattr(type(r), "method", lambda self: v),
    "attribute of the class": lambda r, v: setattr(type(r), "in_class", v),
    "view in the class": lambda r, v: setattr(
        type(r), "table_in_class", MappingProxyType({"gain": v})
    ),
    "defaults": lambda r, v: r.defaults["kept"].__setitem__(0, v),
    "other defaults": lambda r, v: setattr(r, "defaults", {**r.defaults, "kept": [v]}),
    "global": set_global,
    "global table": lambda r, v: TABLE.update(gain=v),
    "function of the module": set_of_module,
    "mark": mark,
    "mark that is a table": mark_deeply,
    "nothing": lambda r, v: None,
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """Globals and attributes of classes as they were."""
    kept = {name: globals()[name] for name in ("GLOBAL", "of_module")}
    in_class = {name: vars(Reads)[name] for name in ("method", "in_class", "table_in_class")}
    yield
    put_back(kept, in_class)


def put_back(kept: dict[str, Any], in_class: dict[str, Any]) -> None:
    globals().update(kept)
    TABLE["gain"] = 1.0
    for name, value in in_class.items():
        setattr(Reads, name, value)


Plan = list[tuple[int, str, float]]
"""When what becomes which number."""


def masters_after(rule: Rule, plan: Plan, *, fused: bool, steps: int = 6) -> list[Tensor]:
    kept = {name: globals()[name] for name in ("GLOBAL", "of_module")}
    in_class = {name: vars(Reads)[name] for name in ("method", "in_class", "table_in_class")}
    optimizer: Any = mixprec.MixedPrecision(rule, fused=True) if fused else rule
    weights: list[Tensor] = rule.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(0)
    for turn in range(steps):
        for when, what, value in plan:
            if when == turn:
                CHANGES[what](rule, value)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    put_back(kept, in_class)
    return [weight.detach().clone() for weight in weights]


def assert_equal(plan: Plan) -> None:
    left = masters_after(Reads(params((4, 6), (5,))), plan, fused=False)
    right = masters_after(Reads(params((4, 6), (5,))), plan, fused=True)
    for bare, ours in zip(left, right, strict=True):
        assert torch.equal(bare, ours)


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_after_the_first_steps_is_seen_in_the_next(what: str) -> None:
    plan = [(3, what, 3.0)]
    before = masters_after(Reads(params((4, 6), (5,))), [], fused=False)
    after = masters_after(Reads(params((4, 6), (5,))), plan, fused=False)
    assert what in ("nothing", "flag") or not all(map(torch.equal, before, after))
    assert_equal(plan)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(sorted(CHANGES)),
            st.sampled_from([0.0, 0.5, 2.0, -1.0]),
        ),
        max_size=6,
    )
)
def test_fused_steps_equal_the_rule_whatever_changes_when(plan: Plan) -> None:
    assert_equal(plan)


# ---------------------------------------- what cannot be followed


def bent(update: Callable[..., None], **attributes: Any) -> Rule:
    class Bent(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            update(self, group, p, grad, state)

    rule = Bent(params((4, 6), (5,)))
    vars(rule).update(attributes)
    return rule


def counts_in_a_list(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    rule.seen[0] += 1
    p.sub_(grad, alpha=group["lr"] / rule.seen[0])


def counts_in_a_tensor(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    rule.seen.add_(1)
    p.sub_(grad * rule.seen, alpha=group["lr"])


def counts_in_a_namespace(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    rule.seen.count += 1
    p.sub_(grad, alpha=group["lr"] * rule.seen.count)


def makes_a_list(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    rule.seen = [group["lr"]]
    p.sub_(grad, alpha=rule.seen[0])


def deletes(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if hasattr(rule, "seen"):
        del rule.seen
    p.sub_(grad, alpha=group["lr"])


def draws_from_its_own(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * rule.seen.random())


def knows_its_parameters(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * rule.seen.get(p, 1.0))


def knows_their_ids(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * rule.seen.get(id(p), 1.0))


def counts_on_parameters(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.seen = getattr(p, "seen", 0) + 1
    p.sub_(grad, alpha=group["lr"] / p.seen)


def looks_at_names(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    bias = any("bias" in name for name in group.get("param_names", ()))
    p.sub_(grad, alpha=group["lr"] * (2.0 if bias else 1.0))


def counts_in_a_global(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    TABLE["gain"] += 1.0
    p.sub_(grad, alpha=group["lr"])


def counts_in_its_class(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    Reads.in_class += 1.0
    p.sub_(grad, alpha=group["lr"])


def draws_from_numpy(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    np.random.rand()
    p.sub_(grad, alpha=group["lr"])


def draws_from_python(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    random.random()
    p.sub_(grad, alpha=group["lr"])


CHANGED = "it changes its attribute 'seen' as it steps, where only numbers are counted"
NOT_FOLLOWED: list[tuple[Callable[..., None], Any, str]] = [
    (counts_in_a_list, [0], CHANGED),
    (counts_in_a_tensor, torch.zeros(()), CHANGED),
    (counts_in_a_namespace, SimpleNamespace(count=0), CHANGED),
    (makes_a_list, 1.0, CHANGED),
    (deletes, [1.0], "it deletes its attribute 'seen' as it steps"),
    (
        draws_from_its_own,
        random.Random(0),
        "its attribute 'seen' holds a random.Random, which a",
    ),
    (knows_its_parameters, "p", "its attribute 'seen' holds one of the parameters, which a record"),
    (knows_their_ids, "id", "its attribute 'seen' holds the id of one of the parameters, which a"),
    (counts_on_parameters, 0, "it changes the attribute 'seen' of its parameters as it steps"),
    (looks_at_names, 0, "it looks at the names of parameters"),
    (counts_in_a_global, 0, "it changes the global 'TABLE' as it steps, which a recording cannot"),
    (counts_in_its_class, 0, "it changes the attribute 'in_class' of the class Reads as it steps"),
    (draws_from_numpy, 0, "it draws random numbers"),
    (draws_from_python, 0, "it draws random numbers"),
]


@pytest.mark.parametrize(("update", "seen", "reason"), NOT_FOLLOWED)
def test_what_a_recording_cannot_follow_is_not_fused(
    update: Callable[..., None], seen: Any, reason: str
) -> None:
    rule = bent(update, seen=seen)
    weights = rule.param_groups[0]["params"]
    if seen == "p":
        vars(rule)["seen"] = {weights[0]: 3.0}
    if seen == "id":
        vars(rule)["seen"] = {id(weights[0]): 3.0}
    if update is looks_at_names:
        rule.param_groups[0]["param_names"] = ["weight", "bias"]
    found = admit_fused(rule, 0)
    assert not found.fusible and reason in found.reason, found.reason
    assert TABLE["gain"] == 1.0 and Reads.in_class == 1.0


def test_what_no_code_names_may_be_anything() -> None:
    def update(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.sub_(grad, alpha=group["lr"])

    model = nn.Linear(300, 300)
    rule = bent(update, model=model, lock=threading.Lock(), draws=random.Random(0))
    weights = rule.param_groups[0]["params"]
    vars(rule)["by_param"] = {weight: 1.0 for weight in weights}
    assert admit_fused(rule, 0).exact


def test_a_rule_that_begins_to_count_elsewhere_is_left_alone_from_then_on() -> None:
    def update(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if rule.counting:
            rule.seen[0] += 1
        p.sub_(grad, alpha=group["lr"] * (1 + rule.seen[0]))

    weights = [nn.Parameter(p.detach().bfloat16()) for p in params((4, 6))]
    rule = bent(update, counting=False, seen=[0])
    rule.param_groups[0]["params"][:] = weights
    optimizer = mixprec.MixedPrecision(rule, fused=True)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    before, rule.counting = weights[0].detach().clone(), True  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=CHANGED):
        optimizer.step()
    assert torch.equal(weights[0], before) and vars(rule)["seen"] == [0]


# ---------------------------------------- kinds of parameters


def decays_matrices(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if p.ndim > 1:
        p.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
    p.sub_(grad, alpha=group["lr"])


def gains_for_matrices(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    gain = group.get("gain", 1.0) if len(grad.shape) == 2 else 1.0
    p.sub_(grad, alpha=group["lr"] * gain)


def turns_matrices(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad.t() if group.get("turn") else grad, alpha=group["lr"])


def scales_by_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * (1.0 + group.get("by_size", 0.0) * p.numel()))


def scales_by_length(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * (len(p) if group.get("by_length") else 1))


def makes_its_state_of_a_shape(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    momentum = state.setdefault("momentum", torch.zeros(p.shape))
    p.sub_(momentum.mul_(0.5).add_(grad), alpha=group["lr"])


def reads_a_mark(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * getattr(p, "lr_scale", 1.0))


def asks(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    hook = group.get("hook") or rule.hook
    p.sub_(grad, alpha=group["lr"] * (hook(p) if hook else 1.0))


def set_mark(rule: Rule, place: int, value: Any) -> None:
    rule.param_groups[0]["params"][place].lr_scale = value


def shapes_it(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad.view(4, 6) if group.get("six") and p.ndim > 1 else grad, alpha=group["lr"])


LATER: list[tuple[Callable[..., None], Callable[[Any], Any]]] = [
    (decays_matrices, lambda r: r.param_groups[0].update(weight_decay=0.1)),
    (gains_for_matrices, lambda r: r.param_groups[0].update(gain=2.0)),
    (scales_by_size, lambda r: r.param_groups[0].update(by_size=0.5)),
    (scales_by_length, lambda r: r.param_groups[0].update(by_length=True)),
    (makes_its_state_of_a_shape, lambda r: r.param_groups[0].update(lr=0.2)),
    (turns_matrices, lambda r: r.param_groups[0].update(turn=True)),
    (shapes_it, lambda r: r.param_groups[0].update(six=True)),
    (reads_a_mark, lambda r: set_mark(r, 2, 3.0)),
    (reads_a_mark, lambda r: set_mark(r, 0, torch.tensor(2.0))),
    (asks, lambda r: setattr(r, "hook", lambda p: float(p.ndim))),
    (asks, lambda r: r.param_groups[0].update(hook=lambda p: float(p.shape[0]))),
]


@pytest.mark.parametrize(("update", "change"), LATER)
def test_what_tells_parameters_apart_later_is_seen_then(
    update: Callable[..., None], change: Callable[[Any], Any]
) -> None:
    shapes = ((5,), (4, 6), (7, 3), (3,))
    if update in (turns_matrices, shapes_it):
        shapes = ((5,), (4, 4), (6, 6), (3,)) if update is turns_matrices else ((5,), (4, 6))
    outcomes: list[list[Tensor]] = []
    for dtype, fused in ((torch.float32, None), (torch.bfloat16, "auto"), (torch.bfloat16, True)):
        rule = bent(update, hook=None)
        weights = [nn.Parameter(p.detach().bfloat16().to(dtype)) for p in params(*shapes)]
        rule.param_groups[0]["params"][:] = weights
        optimizer: Any = rule
        if fused is not None:
            optimizer = mixprec.MixedPrecision(rule, fused=True)
        generator = torch.Generator().manual_seed(0)
        for turn in range(5):
            if turn == 2:
                change(rule)
                if fused == "auto":
                    optimizer._fused.groups.fused = (
                        "auto"  # as on a GPU, where it may leave a group alone
                    )
                    optimizer._fused.groups._takes = lambda param: True
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).bfloat16().to(dtype)
            try:
                optimizer.step()
            except TypeError as error:
                assert fused is True and "cannot run as one kernel" in str(error)
                break
        else:
            masters = [dict(optimizer.masters())[w] for w in weights] if fused else weights
            outcomes.append([master.detach().clone() for master in masters])
    if update is reads_a_mark:
        assert len(outcomes) == 3
    for outcome in outcomes[1:]:
        for left, right in zip(outcomes[0], outcome, strict=True):
            assert torch.allclose(left, right, rtol=2e-6, atol=2e-6)
    assert len(outcomes) >= 2


HOOK: Any = None


def rate_of(p: Any) -> float:
    return 1.0


class Asks(Rule):
    """Its code is elsewhere: in its module, in its class, in what others may put there."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        rate = rate_of(p) * self.rate_of(p) * (HOOK(p) if HOOK is not None else 1.0)
        late = getattr(self, "late", None)
        p.sub_(grad, alpha=group["lr"] * rate * (late(p) if late else 1.0))

    def rate_of(self, p: Any) -> float:
        return 1.0


def by_dimensions(*arguments: Any) -> float:
    return float(arguments[-1].ndim)


@pytest.mark.parametrize(
    ("where", "name"), [(None, "rate_of"), (None, "HOOK"), (Asks, "rate_of"), (Asks, "late")]
)
def test_code_that_is_put_in_place_of_other_code_is_read(
    where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = params((5,), (4, 6))
    before = [weight.detach().clone() for weight in weights]
    optimizer = mixprec.MixedPrecision(Asks(weights), fused=True)
    for turn in range(3):
        if turn == 2 and where is None:
            monkeypatch.setitem(globals(), name, by_dimensions)
        elif turn == 2:
            monkeypatch.setattr(where, name, by_dimensions, raising=False)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert len(optimizer._fused.groups._probes) == (2 if turn == 2 else 1)
    assert torch.allclose(weights[0], before[0] - 0.3)
    assert torch.allclose(weights[1], before[1] - 0.4)


def probes_of(rule: Rule) -> int:
    optimizer = mixprec.MixedPrecision(rule, fused=True)
    for weight in rule.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return len(optimizer._fused.groups._probes)


def test_rules_that_ask_for_nothing_have_one_probe_for_all_parameters() -> None:
    shapes = ((5,), (4, 6), (3, 2, 2), (7,))
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.RAdam):
        marked = params(*shapes)
        vars(marked[0])["_is_something"] = True
        assert probes_of(kind(marked, lr=0.1)) == 1  # type: ignore[arg-type]
    rule = bent(decays_matrices)
    assert probes_of(rule) == 2
    rule = bent(reads_a_mark)
    vars(rule.param_groups[0]["params"][0])["lr_scale"] = 2.0
    assert probes_of(rule) == 2


def test_what_was_imported_before_mixprec_makes_no_probe() -> None:
    program = """
import torch, torch._dynamo
from torch.nn import Parameter
from mixprec.optimizer.fused.recording.kinds import Kinds
from mixprec.optimizer.rule.code import code_of

code = code_of(torch.optim.AdamW([Parameter(torch.ones(2))]))
assert "_dynamo" in code.words and not Kinds(code).asks_dimensions
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------- the loss


class UsesTheLoss(Rule):
    use = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gain = 1.0 if loss is None or not self.use else float(loss)
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * gain)
        return loss


def test_a_rule_that_begins_to_use_the_loss_is_left_alone() -> None:
    rule = UsesTheLoss([nn.Parameter(p.detach().bfloat16()) for p in params((4, 6), (5,))])
    weights = rule.param_groups[0]["params"]
    optimizer = mixprec.MixedPrecision(rule, fused=True)

    def closure() -> float:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return 3.0

    before = [master.clone() for _, master in optimizer.masters()]
    for use in (False, True):
        rule.use = use
        if use:
            with pytest.raises(TypeError, match="it uses the loss, which is known when the"):
                optimizer.step(closure)
            optimizer._fused.groups.fused = "auto"
        optimizer.step(closure)
        for (_, master), begin in zip(optimizer.masters(), before, strict=True):
            assert torch.allclose(master, begin - (0.4 if use else 0.1))


def test_a_rule_that_uses_the_loss_from_its_first_step_on_cannot_have_to_be_fused() -> None:
    weight = nn.Parameter(torch.ones(4, 6).bfloat16())
    rule = UsesTheLoss([weight])
    rule.use = True

    def closure() -> float:
        weight.grad = torch.ones_like(weight)
        return 3.0

    asked: list[dict[str, Any]] = [{"fused": True}, {"state_formats": "8bit"}]
    for options in asked:
        with pytest.raises(TypeError, match="it uses the loss, which is known when the step is"):
            mixprec.MixedPrecision(rule, **options).step(closure)
    optimizer = mixprec.MixedPrecision(rule)
    optimizer.step(closure)
    ((_, master),) = optimizer.masters()
    assert torch.allclose(master, torch.full_like(master, 0.7))


def test_a_closure_does_not_keep_fp32_parameters_from_being_fused() -> None:
    weights = params((4, 6), (5,))
    optimizer = mixprec.MixedPrecision(AdamW(weights), fused=True, state_formats="8bit")
    calls: list[float] = []

    def closure() -> float:
        calls.append(3.0)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return 3.0

    for step in range(1, 3):
        assert optimizer.step(closure) == 3.0 and len(calls) == step
        assert optimizer.state[weights[0]]["exp_avg"].dtype == torch.int8
    optimizer.step()
    assert "no 16-bit parameters" in optimizer.explain()
    assert float(optimizer.state[weights[0]]["step"]) == 3.0


class Looks(Rule):
    """A rule that looks twice if it can."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        for _ in range(2 if closure is not None else 1):
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss


@pytest.mark.parametrize("rule", [Looks, LBFGS])
def test_fp32_rules_that_call_their_closure_themselves_cannot_have_to_be_fused(rule: Any) -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = mixprec.MixedPrecision(rule([weight]), fused=True)

    def closure() -> float:
        weight.grad = torch.ones_like(weight)
        return 3.0

    with pytest.raises(TypeError, match=r"fused=True, but (Looks|LBFGS) cannot run as one kernel"):
        optimizer.step(closure)
    assert bool((weight == 1).all())


def test_a_group_in_fp64_cannot_have_to_be_fused() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).double())]
    optimizer = mixprec.MixedPrecision(AdamW([{"params": [w]} for w in weights]), fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match="a parameter is float64, and kernels compute in FP32"):
        optimizer.step()
    assert "refused by step(): fused=True, but AdamW" in optimizer.explain()
    assert all(bool((weight == 1).all()) for weight in weights)


@pytest.mark.parametrize("rule", [AdamW, LBFGS])
def test_state_formats_want_a_parameter_that_is_fused(rule: Any) -> None:
    text = (
        r"state_formats='8bit' but no parameter is bfloat16 or float16: .*Pass fused=True as well, "
        r"which fuses FP32 parameters, or drop state_formats"
    )
    with pytest.raises(ValueError, match=text):
        mixprec.MixedPrecision(rule([nn.Parameter(torch.ones(3))]), state_formats="8bit")


# ---------------------------------------- several groups


class PairsGroups(Rule):
    """Like AdaBound, which keeps a number for each group in a list."""

    rates: list[float]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, rate in zip(self.param_groups, self.rates):  # noqa: B905
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=rate)


def test_a_rule_that_counts_its_groups_finds_them_in_their_places() -> None:
    weights = params((4, 6), (5,))
    rule = PairsGroups([{"params": [weight]} for weight in weights])
    rule.rates = [0.1, 0.2]
    optimizer = mixprec.MixedPrecision(rule, fused=True)
    before = [weight.detach().clone() for weight in weights]
    for rate in (0.2, 0.3):
        rule.rates[1] = rate
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.allclose(weights[0], before[0] - 0.2)
    assert torch.allclose(weights[1], before[1] - 0.5)


def test_a_group_that_is_gone_leaves_nothing_to_the_next_one() -> None:
    rule = bent(scales_by_size)
    weights = params((4, 6), (5,))
    rule.param_groups[0]["params"][:] = weights[:1]
    rule.add_param_group({"params": weights[1:], "by_size": 0.5})
    before = [weight.detach().clone() for weight in weights]
    optimizer = mixprec.MixedPrecision(rule, fused=True)
    for turn in range(2):
        if turn == 1:
            del optimizer.param_groups[0]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert [
            found.by_size for _, found in sorted(optimizer._fused.groups._admissions.items())
        ] == ([False, True] if turn == 0 else [True])
    assert torch.allclose(weights[0], before[0] - 0.1)
    assert torch.allclose(weights[1], before[1] - 0.7)


def test_a_weight_that_gets_gaps_in_memory_is_stepped_by_the_rule() -> None:
    weights = [params((4, 6))[0] for _ in range(2)]
    optimizer: Any = mixprec.MixedPrecision(torch.optim.AdamW(weights[:1], lr=0.1), fused=True)
    bare = torch.optim.AdamW(weights[1:], lr=0.1)
    for turn in range(4):
        if turn == 2:
            weights[0].data = torch.stack([weights[0].data, torch.zeros(4, 6)], 2)[..., 0]
        for weight in weights:
            weight.grad = torch.full((4, 6), 1.0 + turn)
        optimizer.step()
        bare.step()
    assert torch.allclose(weights[0], weights[1], rtol=2e-6, atol=2e-6)


def test_a_scheduler_and_hooks_are_no_part_of_the_rule() -> None:
    weights = params((4, 6), (5,))
    rule = torch.optim.AdamW(weights, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.5**step)

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        assert all(p.ndim for p in weights)

    rule.register_step_pre_hook(hook)
    vars(rule)["owner"] = scheduler
    optimizer = mixprec.MixedPrecision(rule, fused=True)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step()
    assert len(optimizer._fused.groups._probes) == 1 and rule.param_groups[0]["lr"] == 0.1 * 0.125
