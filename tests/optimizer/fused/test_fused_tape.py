"""Steps played along a tape, beside the same steps recorded in full."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from rules import Recipe, torch_recipes
from small_rules import Rule, params
from test_fused_record import FOOLS, POINTWISE
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec.optimizer.fused.recording.calls import Call
from mixprec.optimizer.fused.recording.probe import Probe, Recording, RuleState
from mixprec.optimizer.fused.recording.recorder import NotFusible
from mixprec.optimizer.rule.stand_ins import same

STEPS = 12


class Pair:
    """Two probes of one optimizer: one plays along its tape where it can, one never."""

    def __init__(self, optimizer: Optimizer) -> None:
        like = optimizer.param_groups[0]["params"][0]
        self.group = optimizer.param_groups[0]
        self.probes = [Probe(optimizer, 0, like) for _ in range(2)]
        self.states = [RuleState(), RuleState()]
        self.played: list[bool] = []

    def step(self) -> Recording | str:
        """The step of both probes, which has to be the same; why it is refused, if it is."""
        vars(self.probes[1])["_tape"] = None
        before = vars(self.probes[0])["_tape"]
        found = [self._outcome(place) for place in range(2)]
        self.played.append(before is not None and vars(self.probes[0])["_tape"] is before)
        left, right = found
        if isinstance(left, str) or isinstance(right, str):
            assert left == right
            return left
        for name in vars(left):
            assert same(vars(left)[name], vars(right)[name]), name
        self.states = [left.state, right.state]
        return left

    def _outcome(self, place: int) -> Recording | str:
        random.seed(0)
        try:
            return self.probes[place].step(self.states[place])
        except (NotFusible, RuntimeError, TypeError) as error:
            return str(error)


def changed(group: dict[str, Any], step: int) -> None:
    """Another learning rate at each step, other betas at some, weight decay from step 5 to 8."""
    if isinstance(group["lr"], Tensor):
        group["lr"].mul_(0.9)
    else:
        group["lr"] *= 0.9
    if step % 3 == 2 and "betas" in group:
        group["betas"] = tuple(beta * 0.99 for beta in group["betas"])
    if "weight_decay" in group and step in (5, 9):
        group["weight_decay"] = 0.1 if step == 5 else 0


RECIPES = [r for r in torch_recipes() if not r.unable and "foreach" not in r.name]


def needs_its_state(optimizer: Optimizer) -> None:
    """Skip what cannot begin without the state that it made at construction: Adagrad in 2.11."""
    param = optimizer.param_groups[0]["params"][0]
    if optimizer.state:
        twin = copy.deepcopy(optimizer)
        twin.state.clear()
        twin.param_groups[0]["params"][0].grad = torch.ones_like(param)
        try:
            twin.step()
        except KeyError:
            pytest.skip("this torch's rule cannot begin without the state it made; the probe does")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_rule_of_torch_is_played_as_it_is_recorded(recipe: Recipe) -> None:
    optimizer = recipe.build([{"params": params((4, 6), (3, 5))}])
    needs_its_state(optimizer)
    pair = Pair(optimizer)
    refused = False
    for step in range(STEPS):
        refused = isinstance(pair.step(), str) or refused
        changed(pair.group, step)
    # What makes its states, RAdam's change of ways, and weight decay that comes and goes.
    assert refused or sum(pair.played) >= 4


def third(name: str, **options: Any) -> Callable[[Any], Optimizer]:
    """A rule of pytorch-optimizer."""

    def build(params: Any) -> Optimizer:
        package: Any = pytest.importorskip("pytorch_optimizer")
        return vars(package)[name](params, **options)

    return build


RULES: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, weight_decay=0.1),
    "Adam, amsgrad": lambda p: Adam(p, amsgrad=True),
    "SGD, momentum": lambda p: SGD(p, momentum=0.9),
    "NAdam": NAdam,
    "RAdam": RAdam,
}
THIRD: dict[str, Callable[[Any], Optimizer]] = {
    "Lion": third("Lion"),
    "LAMB": third("Lamb"),
    "PNM": third("PNM"),
    "Adan": third("Adan"),
    "Ranger21": third("Ranger21", num_iterations=STEPS),
}


@pytest.mark.parametrize(
    "rule", [*RULES, *(pytest.param(rule, marks=pytest.mark.thirdparty) for rule in THIRD)]
)
def test_what_a_schedule_changes_is_played_without_recording_anew(rule: str) -> None:
    pair = Pair({**RULES, **THIRD}[rule](params()))
    for _ in range(STEPS):
        pair.step()
        pair.group["lr"] *= 0.9
    if rule not in ("PNM", "Ranger21"):
        assert sum(not played for played in pair.played) <= (3 if rule == "RAdam" else 2)


def built(update: Callable[..., None]) -> Optimizer:
    class Bent(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            update(self, group, p, grad, state)

    return Bent(params())


@pytest.mark.parametrize("name", POINTWISE)
def test_every_operation_is_played_as_it_is_recorded(name: str) -> None:
    def update(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.add_(POINTWISE[name](p.clone(), grad), alpha=-group["lr"])

    pair = Pair(built(update))
    for _ in range(4):
        assert not isinstance(pair.step(), str)
        pair.group["lr"] *= 0.9
    assert all(pair.played[1:])


@pytest.mark.parametrize("update", FOOLS, ids=lambda update: update.__name__)
def test_what_is_refused_in_full_is_refused_along_a_tape(update: Any) -> None:
    pair = Pair(built(update))
    for _ in range(6):
        pair.step()
        pair.group["lr"] *= 0.9


# ---------------------------------------- rules made to fool a tape

Update = Callable[[Any, Any, Any, Tensor, Any], None]
LEFT: dict[str, Any] = {}
"""Where a rule keeps things that it should not."""


def swaps_two_buffers(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    a, b = (state.setdefault(k, torch.zeros_like(p)) for k in "ab")
    state["step"] = state.get("step", 0) + 1
    if state["step"] % 2:
        a, b = b, a
    a.mul_(0.5).add_(grad)
    p.add_(a - b, alpha=-group["lr"])


def swaps_what_it_leaves(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    a, b = (state.setdefault(k, torch.zeros_like(p)) for k in "ab")
    a.mul_(0.5).add_(grad)
    p.add_(a + b, alpha=-group["lr"])
    state["step"] = state.get("step", 0) + 1
    if state["step"] % 3 == 0:
        state["a"], state["b"] = b, a


def counts_in_lists(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    counts = state.setdefault("counts", [0, [0.5]])
    counts[0] += 1
    counts[1].append(counts[0] * 0.25)
    p.add_(grad, alpha=-group["lr"] * sum(counts[1]))


def keeps_numbers_as_tensors(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    decay = state.setdefault("decay", torch.ones(()))
    decay.mul_(0.5)
    state["rate"] = decay * group["lr"] + torch.full((), 0.25)
    p.add_(grad * state["rate"]).mul_(decay)
    grad.new_zeros(()).add_(1)


def queues(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    queue = state.setdefault("queue", [])
    queue.append(grad.clone())
    if len(queue) > 2:
        queue.pop(0)
    p.add_(queue[0], alpha=-group["lr"])


def works_on_data(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    ahead = p.data.view(-1).add(grad.data.view(-1))
    p.data.mul_(1 - group["lr"]).add_(ahead.view_as(p))


def gives_itself_data(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", 0) + 1
    ahead = p.data - group["lr"] * grad
    if state["step"] % 4:
        p.data = ahead


def raises_to_its_step(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", 4) - 1
    p.add_(grad.abs() ** state["step"], alpha=-group["lr"])


def fills_in_its_step(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", -2) + 1
    p.add_(grad.nan_to_num(float(state["step"]), 2.0, -2.0), alpha=-group["lr"])


def fills_with_as_many(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", 0) + 1
    full = torch.full(p.shape if state["step"] % 3 else (7,), 0.5 * state["step"])
    p.add_(full.mean() * grad if full.numel() == 7 else full * grad, alpha=0.5)


def swallows_errors(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", 0) + 1
    ahead = grad * 2
    if state["step"] % 3 == 0:
        with suppress(Exception):
            ahead = ahead.sub(p)
    p.add_(ahead, alpha=-group["lr"])


def keeps_one_more_in_time(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", 0) + torch.ones(()) + torch.zeros(())
    if state["step"] == 5:
        state["late"] = torch.zeros(p.shape)
    p.add_(grad, alpha=-group["lr"])


def rounds_in_turn(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = state.get("step", 0) + 1
    mode = "floor" if state["step"] % 3 else "trunc"
    p.add_(torch.div(grad, group["lr"], rounding_mode=mode))


def changes_its_numbers(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["step"] = step = state.get("step", 0) + 1
    p.add_(
        grad * (step, float(step), torch.tensor(step), torch.tensor([step * 0.5]))[step // 3 % 4]
    )


def brings_back_a_temporary(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    ahead = grad * 2
    p.add_(LEFT.get("ahead", ahead), alpha=-group["lr"])
    LEFT["ahead"] = ahead


def brings_back_a_view(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    ahead = (grad * 2).view(-1)
    p.view(-1).add_(LEFT.get("ahead", ahead), alpha=-group["lr"])
    LEFT["ahead"] = ahead


def brings_back_its_gradient(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(LEFT.get("grad", grad), alpha=-group["lr"])
    LEFT["grad"] = grad


def sums_lists(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    step = state.setdefault("step", torch.zeros(()))
    torch._foreach_add_([step], 1)
    ahead = torch._foreach_mul([grad, p], [group["lr"], 0.5 * step.item()])
    torch._foreach_add_(ahead, [grad, grad], alpha=group["lr"])
    torch._foreach_addcdiv_([p], [ahead[0]], [ahead[1]], [-group["lr"]])


MADE_TO_FOOL: list[Update] = [
    swaps_two_buffers,
    swaps_what_it_leaves,
    counts_in_lists,
    keeps_numbers_as_tensors,
    queues,
    works_on_data,
    gives_itself_data,
    raises_to_its_step,
    fills_in_its_step,
    fills_with_as_many,
    swallows_errors,
    keeps_one_more_in_time,
    rounds_in_turn,
    changes_its_numbers,
    sums_lists,
]
HELD: list[Update] = [brings_back_a_temporary, brings_back_a_view, brings_back_its_gradient]
PLAYED: list[Update] = [
    counts_in_lists,
    keeps_numbers_as_tensors,
    queues,
    works_on_data,
    sums_lists,
]


@pytest.mark.parametrize("update", MADE_TO_FOOL, ids=lambda update: update.__name__)
def test_a_rule_that_is_hard_to_play_is_recorded_right(update: Update) -> None:
    pair = Pair(built(update))
    for _ in range(STEPS):
        assert not isinstance(pair.step(), str)
        pair.group["lr"] *= 0.9
    assert any(pair.played) or update not in PLAYED


class HasLists(Rule):
    """A list of options, and one that counts, both made with the optimizer."""

    counts = False

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.base_lrs, self.seen = [0.5], [0]

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        self.seen[0] += self.counts
        p.add_(grad if self.seen[0] < 4 else grad * 2, alpha=-self.base_lrs[0])


def test_a_list_of_the_optimizer_is_an_option_and_no_place_to_count() -> None:
    optimizer = HasLists(params())
    pair = Pair(optimizer)
    for turn in range(6):
        optimizer.base_lrs[0] = 0.5**turn
        recording = pair.step()
        assert not isinstance(recording, str) and recording.scalars == (-(0.5**turn),)
    assert all(pair.played[1:])
    optimizer.counts = True
    assert (
        pair.step() == "it changes its attribute 'seen' as it steps, where only numbers are counted"
    )
    assert optimizer.seen == [0]


@pytest.mark.parametrize("update", HELD, ids=lambda update: update.__name__)
def test_a_tensor_of_an_earlier_step_is_not_taken_for_a_new_one(update: Update) -> None:
    LEFT.clear()
    optimizer = built(update)
    probe = Probe(optimizer, 0, optimizer.param_groups[0]["params"][0])
    state = probe.step(RuleState()).state
    with pytest.raises(NotFusible, match="comes from neither the parameter, nor its gradient"):
        probe.step(state)


def test_a_number_that_is_looked_at_is_more_than_a_scalar() -> None:
    call = Call()
    untouched, compared, computed = (call.lift(value, 0) for value in (2, 3.0, 0.5))
    assert compared == 3 and 1 / computed == 2
    assert [number.looked for number in (untouched, compared, computed)] == [False, True, True]
    assert float(untouched) == 2 and type(float(untouched)) is float


class Counts(TorchDispatchMode):
    """Operations that are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_playing_carries_out_no_operation_on_elements() -> None:
    optimizer = AdamW(params(), weight_decay=0.1)
    probe = Probe(optimizer, 0, params()[0])
    state = probe.step(probe.step(RuleState()).state).state
    vars(probe)["_tape"] = None
    with Counts() as recorded:
        state = probe.step(state).state
    with Counts() as played:
        probe.step(state)
    assert {"aten::lerp_", "aten::addcmul_", "aten::addcdiv_"} <= {*recorded.names}
    assert not {"aten::lerp_", "aten::addcmul_", "aten::addcdiv_", "aten::sqrt"} & {*played.names}
