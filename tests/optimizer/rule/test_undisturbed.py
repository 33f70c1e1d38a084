"""Trying a rule leaves no trace: not in random states, not in globals, not for other threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_rules import Rule, params
from torch import Tensor, nn
from torch.optim import AdamW

import mixprec
from mixprec.optimizer.fused.self_check import admit_fused
from mixprec.optimizer.rule import trial
from mixprec.optimizer.rule.admission import admit

Update = Callable[[Any, Any, Any, Tensor, Any], None]

COUNTS: dict[str, Any] = {"steps": 0, "lists": [0]}
total = 0


def low(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().bfloat16()) for p in params(*shapes)]


def bent(update: Update) -> Rule:
    class Bent(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            update(self, group, p, grad, state)

    return Bent(low((4, 6), (5,)))


def draws_from_torch(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad + torch.randn_like(p), alpha=group["lr"])


def draws_from_numpy(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if np.random.rand() < 0.5:  # as Kron updates its preconditioner
        state["drawn"] = float(np.random.normal())
    p.sub_(grad, alpha=group["lr"] * (1 + state.get("drawn", 0.0)))


def draws_from_python(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.sub_(grad, alpha=group["lr"] * random.random())


def draws_and_fails(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    assert torch.rand(1) >= 0 and np.random.rand() >= 0 and random.random() >= 0
    raise RuntimeError("it does not run")


def drawn() -> list[float]:
    """What each generator of the process gives next, and later again."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = [torch.rand(()).item(), random.random(), float(np.random.rand())]
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    return found


DRAWING: list[Update] = [draws_from_torch, draws_from_numpy, draws_from_python]


@pytest.mark.parametrize("update", DRAWING, ids=lambda update: update.__name__)
def test_a_rule_that_draws_is_tried_with_equal_seeds_and_never_refused_by_chance(
    update: Update,
) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = drawn()
        assert admit(bent(update)).per_parameter
        assert drawn() == before
        assert not admit_fused(bent(update), 0).fusible
        assert drawn() == before


@pytest.mark.parametrize("update", [*DRAWING, draws_and_fails], ids=lambda update: update.__name__)
def test_explaining_leaves_every_random_state_as_it_was(update: Update) -> None:
    before = drawn()
    optimizer = mixprec.MixedPrecision(bent(update))
    if update is draws_and_fails:
        assert "could not be tried" in optimizer.explain(formula=True)
    else:
        assert "has no formula" in optimizer.explain(formula=True)
    assert drawn() == before


def test_nobodys_generator_is_touched_for_a_rule_that_draws_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a generator of the process was touched")

    for module, names in (
        (torch, ("manual_seed", "set_rng_state")),
        (random, ("seed", "setstate")),
        (np.random, ("seed", "set_state")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, fail)
    optimizer = mixprec.MixedPrecision(AdamW(low((4, 6))), fused=True)
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_another_thread_that_draws_meanwhile_has_its_own_numbers() -> None:
    def numbers() -> list[tuple[float, ...]]:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        return [
            (torch.rand(()).item(), random.random(), float(np.random.rand())) for _ in range(3000)
        ]

    expected, found = numbers(), list[tuple[float, ...]]()
    thread = threading.Thread(target=lambda: found.extend(numbers()))
    thread.start()
    while thread.is_alive():
        assert admit(AdamW(low((4, 6)))).per_parameter
        assert admit_fused(AdamW(low((4, 6))), 0).exact
    thread.join()
    assert found == expected


# ---------------------------------------- variables outside of the optimizer


def counts_in_a_global(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    global total
    total += 1
    p.sub_(grad, alpha=group["lr"] * total)


def counts_in_a_table(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    COUNTS["lists"][0] += 1
    p.sub_(grad, alpha=group["lr"] * COUNTS["lists"][0])


def counts_in_its_class(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    Counting.total += 1
    p.sub_(grad, alpha=group["lr"] * Counting.total)


class Counting:
    total = 0


def counts_in_a_default(
    rule: Any,
    group: Any,
    p: Any,
    grad: Tensor,
    state: Any,
    seen: list[int] = [0],  # noqa: B006
) -> None:
    seen[0] += 1
    p.sub_(grad, alpha=group["lr"] * seen[0])


def counting() -> Update:
    total = 0

    def counts_around_a_function(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        nonlocal total
        total += 1
        p.sub_(grad, alpha=group["lr"] * total)

    return counts_around_a_function


OUTSIDE: dict[Update, str] = {
    counts_in_a_global: "the global 'total'",
    counts_in_a_table: "the global 'COUNTS'",
    counts_in_its_class: "the attribute 'total' of the class Counting",
    counts_in_a_default: "counts_in_a_default.__defaults__",
    counting(): "the variable 'total' around counting.<locals>.counts_around_a_function",
}


@pytest.mark.parametrize("update", OUTSIDE, ids=lambda update: update.__name__)
def test_a_count_outside_of_the_optimizer_is_put_back_and_seen(update: Update) -> None:
    rule = bent(update)
    for _ in range(2):
        assert admit(rule).per_parameter
        assert not admit_fused(rule, 0).fusible
    assert total == 0 and COUNTS["lists"] == [0] and Counting.total == 0


def test_a_count_that_is_made_and_never_read_is_no_count_of_buckets() -> None:
    def counts(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        COUNTS["steps"] = len(rule.param_groups[0]["params"])
        p.sub_(grad, alpha=group["lr"])

    assert admit(bent(counts)).reason == "the global 'COUNTS' differs"
    found = admit_fused(bent(counts), 0)
    assert found.reason.startswith("it changes the global 'COUNTS' as it steps, which a recording")
    assert COUNTS["steps"] == 0


def test_a_rule_that_knows_parameters_by_their_ids_is_refused() -> None:
    def looks_up(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.sub_(grad, alpha=group["lr"] * rule.rates.get(id(p), 1.0))

    rule = bent(looks_up)
    vars(rule)["rates"] = {id(rule.param_groups[0]["params"][0]): 3.0}
    with pytest.raises(
        TypeError, match=r"'rates' holds the id of one of the parameters.*state\[param"
    ):
        admit(rule)


def test_what_the_rule_never_names_is_not_copied_for_a_trial() -> None:
    class NoCopy:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a model was copied")

    rule = AdamW(low((4, 6)))
    vars(rule)["model"] = NoCopy()
    assert admit(rule).per_parameter and admit_fused(rule, 0).exact


def test_a_thread_that_ends_while_a_trial_begins_has_drawn_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is there when the first state is read, and gone when the last one is."""
    counted = [2]
    monkeypatch.setattr(threading, "active_count", lambda: counted[0])
    known = trial.generators

    def generators(devices: Any) -> Any:
        found = list(known(devices))
        name, read, write, seed = found[-1]

        def last() -> Any:
            state = read()
            if counted[0] == 2:
                torch.rand(())
                counted[0] = 1
            return state

        return [*found[:-1], (name, last, write, seed)]

    monkeypatch.setattr(trial, "generators", generators)
    assert admit_fused(AdamW(low((4, 6))), 0).exact
