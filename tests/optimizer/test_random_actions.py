"""Random sequences of what users do to an optimizer, beside the bare rule on FP32 parameters.

What may be done is in `side_by_side.Pair`, which compares everything after every action; here
Hypothesis chooses. A failure prints the shortest sequence of actions found.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import Build, Setup
from side_by_side import Pair
from small_rules import Rule
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

NOT_YET: tuple[str, ...] = ()
"""What is right in the oracle and not yet in mixprec."""


class Lion(Rule):
    def update(self, group: dict[str, Any], p: Any, grad: Tensor, state: dict[str, Any]) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(momentum.lerp(grad, 0.1).sign_(), alpha=-group["lr"])
        momentum.lerp_(grad, 0.01)


def _schedule_free(groups: Any) -> Any:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=0.01, warmup_steps=3)


RULES: dict[str, Build] = {
    "SGD": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": partial(AdamW, lr=0.01),
    "Lion": partial(Lion, lr=0.01, weight_decay=0.1),
    "Adafactor": partial(Adafactor, lr=0.01),
    "Muon": partial(torch.optim.Muon, lr=0.02),
    "schedule-free AdamW": _schedule_free,
}
EXACT_IF_FUSED = ("SGD", "Lion")

WAYS: list[Any] = [
    *(pytest.param(name, False, None, id=name) for name in RULES),
    *(pytest.param(name, True, None, id=f"{name}, fused") for name in ("SGD", "AdamW", "Lion")),
    pytest.param("schedule-free AdamW", True, None, id="schedule-free AdamW, fused"),
    pytest.param("AdamW", True, "8bit", id="AdamW, fused, 8-bit states"),
]

DTYPES = ((BF16, FP32), (FP16,), (BF16, FP16, FP32), (FP32,), (BF16,))

seeds = st.integers(0, 2**16)
places = st.integers(0, 5)
ways_to_write = st.sampled_from(["no_grad", "data"])


class Actions(RuleBasedStateMachine):
    """One optimizer and its oracle, and every action in any order."""

    way: ClassVar[tuple[str, bool, Any]]
    pair: Pair

    @initialize(
        dtypes=st.sampled_from(DTYPES),
        full=st.booleans(),
        scaled=st.booleans(),
        clipped=st.booleans(),
        named=st.booleans(),
        bucket_numel=st.sampled_from(["auto", 20, None]),
    )
    def begin(
        self, dtypes: Any, full: bool, scaled: bool, clipped: bool, named: bool, bucket_numel: Any
    ) -> None:
        name, fused, state_formats = self.way
        self.pair = Pair(
            Setup(
                RULES[name],
                dtypes,
                masters="full" if full else "auto",
                fused=fused,
                exact=not fused or name in EXACT_IF_FUSED,
                matrices=name == "Muon",
                state_formats=state_formats,
                bucket_numel=bucket_numel,
                scaled=scaled,
                max_grad_norm=2.0 if clipped else None,
                named=named,
            )
        )

    @rule(seed=seeds, bad=st.sampled_from([None, None, None, float("inf"), float("nan")]))
    def backward(self, seed: int, bad: float | None) -> None:
        self.pair.backward(seed, bad)

    @rule(factor=st.sampled_from([None, None, 0.5, 0.3, 0.0, "tensor"]))
    def step(self, factor: Any) -> None:
        self.pair.step(torch.tensor(0.7) if factor == "tensor" else factor)

    @rule(seed=seeds, steps=st.integers(1, 3))
    def train(self, seed: int, steps: int) -> None:
        for number in range(steps):
            self.pair.zero_grad(True)
            self.pair.backward(seed + number)
            self.pair.step()

    @rule(
        seed=seeds,
        tokens=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        bad=st.sampled_from([None, None, None, float("inf")]),
        finish=st.sampled_from([True, True, True, False]),
    )
    def window(self, seed: int, tokens: list[int], bad: float | None, finish: bool) -> None:
        self.pair.window(seed, tokens, bad=bad, finish=finish)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.pair.zero_grad(set_to_none)

    @precondition(lambda self: len(self.pair.model) < 6)
    @rule()
    def add_group(self) -> None:
        self.pair.add_group()

    @rule(index=places)
    def drop_group(self, index: int) -> None:
        self.pair.drop_group(index, is_freed="memory is freed" not in NOT_YET)

    @rule(place=places)
    def replace_param(self, place: int) -> None:
        self.pair.replace_param(place, is_freed="memory is freed" not in NOT_YET)

    @rule(place=places, frozen=st.booleans())
    def freeze(self, place: int, frozen: bool) -> None:
        self.pair.freeze(place, frozen)

    @rule(
        index=places,
        option=st.sampled_from([("lr", 0.005), ("lr", 0.03), ("weight_decay", 0.0), ("lr", 0.0)]),
    )
    def set_option(self, index: int, option: tuple[str, float]) -> None:
        self.pair.set_option(index, *option)

    @rule(on_inner=st.booleans())
    def schedule(self, on_inner: bool) -> None:
        self.pair.schedule(on_inner)

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.pair.mode(training)

    @rule(place=places, seed=seeds, kind=st.sampled_from(["new", "zero"]), how=ways_to_write)
    def edit(self, place: int, seed: int, kind: Any, how: Any) -> None:
        if f"edit by {how}" not in NOT_YET:
            self.pair.edit(place, seed, kind, how)

    @rule(seed=seeds, how=st.sampled_from(["no_grad", "data", "vector"]))
    def edit_masters(self, seed: int, how: Any) -> None:
        if f"edit_masters by {how}" not in NOT_YET:
            self.pair.edit_masters(seed, how)

    @precondition(lambda self: "adopt_params" not in NOT_YET)
    @rule()
    def adopt_params(self) -> None:
        self.pair.adopt_params()

    def can_save(self) -> bool:
        return "bare masters load" not in NOT_YET or not self.pair.holds_bare_masters()

    @precondition(lambda self: self.can_save())
    @rule()
    def save(self) -> None:
        self.pair.save()

    @precondition(lambda self: self.pair.snapshots)
    @rule(number=places, weights_first=st.booleans())
    def load(self, number: int, weights_first: bool) -> None:
        self.pair.load(number, weights_first=weights_first)

    @precondition(lambda self: self.can_save())
    @rule()
    def reload(self) -> None:
        self.pair.reload()

    @precondition(lambda self: self.can_save())
    @rule(how=st.sampled_from(["deepcopy", "pickle"]), seed=seeds, keep_copy=st.booleans())
    def fork(self, how: Any, seed: int, keep_copy: bool) -> None:
        self.pair.fork(how, seed, keep_copy=keep_copy)


def run(way: tuple[str, bool, Any], *, examples: int, actions: int) -> None:
    machine = type("Actions", (Actions,), {"way": way})
    chosen = settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        stateful_step_count=actions,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[phase for phase in Phase if phase != Phase.shrink],  # that takes many minutes
    )
    run_state_machine_as_test(machine, settings=chosen)


# Warnings about edits, skips and the order of a scheduler's steps are part of what is done here.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, fused, state_formats", WAYS)
def test_any_sequence_of_actions_is_that_of_the_bare_rule(
    name: str, fused: bool, state_formats: Any
) -> None:
    run((name, fused, state_formats), examples=2 if fused else 4, actions=25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, fused, state_formats", WAYS)
def test_any_long_sequence_of_actions_is_that_of_the_bare_rule(
    name: str, fused: bool, state_formats: Any
) -> None:
    run((name, fused, state_formats), examples=40, actions=60)
