"""Rules recorded as programs: all of torch.optim, and rules made to fool the recorder."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import UPDATE
from frozen import difference, frozen
from rules import Recipe, torch_recipes
from small_rules import Rule, params, recordings
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

from mixprec.optimizer.fused.program.operations import OPERATIONS
from mixprec.optimizer.fused.program.program import Op, Program
from mixprec.optimizer.fused.recording.probe import Probe, RuleState
from mixprec.optimizer.fused.recording.recorder import NotFusible, Recorder
from mixprec.optimizer.fused.self_check import admit_fused

# ---------------------------------------- torch.optim

REFUSED = {
    "Adafactor": "its Python code looks at a number of the data, by item() or in an if",
    "LBFGS": "step() missing 1 required positional argument: 'closure'",
    "Muon": "torch._to_copy computes in bfloat16, and kernels compute in FP32",
    "SparseAdam": "SparseAdam does not support dense gradients",
}
REORDERED = {"ASGD", "NAdam", "RAdam"}
"""Whose foreach form computes the same in another order; fused kernels all do."""

RECIPES = [r for r in torch_recipes() if not r.unable and "for-loop" not in r.name]


def built(recipe: Recipe) -> Optimizer:
    return recipe.build([{"params": params((4, 6), (3, 5))}])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_rule_of_torch_is_recorded_right_or_refused_for_its_reason(recipe: Recipe) -> None:
    rule, options = recipe.name.split(":", 1)
    admission = admit_fused(built(recipe), 0)
    if rule in REFUSED:
        assert not admission.fusible and REFUSED[rule] in admission.reason
        return
    assert admission.fusible, admission.reason
    reordered = "fused" in options or ("foreach" in options and rule in REORDERED)
    assert admission.exact or reordered, admission.reason
    if rule == "SGD" and "fused" not in options:
        assert admission.exact


def test_differentiable_rules_are_refused_as_they_cannot_run() -> None:
    admission = admit_fused(AdamW(params(), differentiable=True), 0)
    assert not admission.fusible and "a leaf Variable that requires grad" in admission.reason


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "SGD", "NAdam", "RMSprop", "Adagrad", "ASGD"])
def test_all_implementations_of_a_rule_are_one_program(rule: str) -> None:
    cls: Any = getattr(torch.optim, rule)
    try:
        loop = recordings(cls(params(), foreach=False), 3)
    except KeyError:
        assert cls(params()).state, "made at construction: only then it may be missed"
        pytest.skip("this torch's rule cannot begin without the state it made; the probe does")
    assert recordings(cls(params(), foreach=True), 3) == loop
    if rule in ("Adam", "AdamW", "SGD", "Adagrad"):
        assert recordings(cls(params(), fused=True), 3) == loop


def test_adamw_reads_as_its_formula() -> None:
    optimizer = AdamW(params(), lr=0.5, betas=(0.75, 0.875), weight_decay=0.25, eps=2.0**-20)
    first, second = recordings(optimizer, 2)
    assert str(second.program).splitlines() == [
        "exp_avg' = lerp(exp_avg, grad, s1)",
        "exp_avg_sq' = exp_avg_sq * s2 + s3 * grad * grad",
        "master' = master * s0 + s6 * exp_avg' / (sqrt(exp_avg_sq') / s4 + s5)",
    ]
    assert "s5 = 9.5367432e-07" in second.program.formula(second.scalars)
    assert str(first.program).splitlines()[0] == "exp_avg' = lerp(0, grad, s1)"
    assert set(first.program.reads) == {"master", "grad"}
    assert set(second.program.reads) == {"master", "grad", "exp_avg", "exp_avg_sq"}


# ---------------------------------------- scalars


def adamw_scalars(lr: float, betas: tuple[float, float], decay: float, step: int) -> list[float]:
    first, second = betas
    return [
        1 - lr * decay,
        1 - first,
        second,
        1 - second,
        math.sqrt(1 - second**step),
        1e-8,
        -lr / (1 - first**step),
    ]


def test_scalars_follow_schedules_betas_and_step_counts_under_one_program() -> None:
    optimizer = AdamW(params(), lr=0.1, weight_decay=0.2)
    group, probe = optimizer.param_groups[0], Probe(optimizer, 0, params()[0])
    state = probe.step(RuleState()).state
    programs: set[Program] = set()
    for step, lr in enumerate([0.1, 0.07, 0.0, 1.0], start=2):
        group["lr"], group["betas"] = lr, (0.9 - lr / 10, 0.99 - lr / 10)
        recording = probe.step(state)
        state = recording.state
        programs.add(recording.program)
        assert state.numbers["step"].item() == step
        assert recording.scalars == pytest.approx(
            adamw_scalars(lr, group["betas"], 0.2, step), rel=1e-15
        )
    assert len(programs) == 1


def test_a_tensor_learning_rate_is_a_scalar_too() -> None:
    rate = torch.tensor(0.25)
    optimizer = SGD(params(), lr=rate)
    probe = Probe(optimizer, 0, params()[0])
    before = probe.step(RuleState())
    rate.mul_(2)
    after = probe.step(RuleState())
    assert (before.scalars, after.scalars) == ((-0.25,), (-0.5,))
    assert before.program == after.program
    assert rate.item() == 0.5 and optimizer.param_groups[0]["lr"] is rate


def test_a_count_kept_in_the_group_is_lifted_and_returned_not_written() -> None:
    optimizer = CountsInItsGroup(params())
    probe = Probe(optimizer, 0, params()[0])
    first = probe.step(RuleState())
    assert first.group == {"k": 1} and "k" not in optimizer.param_groups[0]
    optimizer.param_groups[0].update(first.group)
    second = probe.step(first.state)
    assert second.group == {"k": 2}
    assert (first.scalars, second.scalars) == ((-0.1,), (-0.05,))
    assert first.program == second.program


def test_a_count_kept_in_shared_state_is_lifted_and_returned_not_written() -> None:
    optimizer: Any = CountsInSharedState(params())
    recording = Probe(optimizer, 0, params()[0]).step(RuleState())
    assert recording.shared == {"k": 1} and not optimizer.state
    assert admit_fused(optimizer, 0).fusible


def test_a_step_that_is_thrown_away_needs_no_undoing() -> None:
    optimizer = Adam(params())
    first = recordings(optimizer, 1)[0]
    probe = Probe(optimizer, 0, params()[0])
    assert probe.step(first.state) == probe.step(first.state)
    assert first.state.numbers["step"].item() == 1


def test_radam_has_one_program_for_its_warm_up_and_another_for_later() -> None:
    found = recordings(RAdam(params()), 12)
    programs = [recording.program for recording in found]
    assert programs[1:5] == programs[1:2] * 4 and programs[5:] == programs[5:6] * 7
    assert "sqrt" not in str(programs[1]) and "sqrt" in str(programs[5])
    assert len({*programs}) == 3  # the first step makes its states


def test_a_state_taken_from_a_checkpoint_goes_on_at_its_age() -> None:
    weight = params((4, 6))[0]
    optimizer = Adam([weight])
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = RuleState.of({**optimizer.state[weight], "master": torch.ones_like(weight)}, weight)
    assert state.elements == ("exp_avg", "exp_avg_sq")
    assert Probe(optimizer, 0, params()[0]).step(state) == recordings(optimizer, 4)[3]
    assert admit_fused(optimizer, 0).exact


def test_a_rule_that_has_stepped_is_tried_from_its_start_and_from_where_it_is() -> None:
    optimizer = RAdam(params(), lr=0.1)
    optimizer.param_groups[0]["note"] = 3.0
    assert len(admit_fused(optimizer, 0).programs) == 3
    for _ in range(20):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert admit_fused(optimizer, 0).exact
    weight = optimizer.param_groups[0]["params"][0]
    recording = Probe(optimizer, 0, weight).step(RuleState.of(optimizer.state[weight], weight))
    assert recording.program in admit_fused(optimizer, 0).programs


def test_a_step_like_the_last_one_is_played_and_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorders: list[Recorder] = []

    class Counted(Recorder):
        def __init__(self, *roots: Any) -> None:
            super().__init__(*roots)
            recorders.append(self)

    monkeypatch.setattr("mixprec.optimizer.fused.recording.probe.Recorder", Counted)
    probe = Probe(AdamW(params()), 0, params()[0])
    state = RuleState()
    for _ in range(50):
        state = probe.step(state).state
    assert len(recorders) == 2  # the step that makes the states, and the first that reads them


# ---------------------------------------- programs beside the rule


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "NAdam", "RAdam", "Adadelta", "RMSprop", "Lion"])
def test_fifty_steps_of_a_program_stay_within_tolerance_of_the_rule(
    rule: str, foreach: bool
) -> None:
    cls: Any = Lion if rule == "Lion" else getattr(torch.optim, rule)
    weight = params((300,))[0]
    optimizer = cls([weight], lr=1e-2, weight_decay=0.1, foreach=foreach)
    probe, begin = Probe(optimizer, 0, weight), weight.detach().clone()
    master, states, state = begin, dict[str, Tensor](), RuleState()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        weight.grad = torch.randn(300, generator=generator)
        recording = probe.step(state)
        program, state = recording.program, recording.state
        master, made = program.run(master, weight.grad.clone(), states, recording.scalars)
        states.update(made)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.98
    distance = (master - weight.detach()).abs().max()
    # Each step may round the master once otherwise, by half its spacing.
    spacing = 50 * 2.0**-24 * weight.detach().abs().max()
    assert distance <= UPDATE * (weight.detach() - begin).abs().max() + spacing
    if not foreach or rule in ("SGD", "Lion"):
        assert distance == 0


POINTWISE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arithmetic": lambda p, g: (2 - g) * 3 + (1 / (g.square() + 1)) - 0.5 / (g.abs() + 1),
    "scaled sums": lambda p, g: torch.sub(p, g, alpha=3).add(p, alpha=0.1).sub(g),
    "reversed": lambda p, g: torch.rsub(g, p, alpha=2) + torch.rsub(g, 1.5),
    "powers": lambda p, g: g.abs() ** 0.5 + g**2 + g**3 + (g.abs() + 1) ** -0.5 + 2**g,
    "inverse": lambda p, g: (g.abs() + 1) ** -1 + (g.abs() + 1).rsqrt() + (g + 9).reciprocal(),
    "addcmul": lambda p, g: p.addcmul(p, g).addcmul(g, g, value=0.3),
    "addcdiv": lambda p, g: p.addcdiv(g, g.abs() + 1).addcdiv(g, g.square() + 1, value=0.3),
    "lerp": lambda p, g: p.lerp(g, 0.2) + g.lerp(p, 0.8) + p.lerp(g, g.sigmoid()),
    "bounds": lambda p, g: g.clamp(-0.5, 0.7) + g.clamp(min=0) + g.clamp_max(0.1) + g.clamp_min(p),
    "maximum": lambda p, g: torch.maximum(p, g) + torch.minimum(g, torch.tensor(0.3)),
    "functions": lambda p, g: (
        g.exp().log1p() + g.tanh() + g.sin() * g.cos() + g.sigmoid() + g.erf()
    ),
    "more functions": lambda p, g: g.atan() + g.relu() + torch.atan2(p, g) + torch.copysign(p, g),
    "steps": lambda p, g: g.sign() + g.floor() + g.ceil() + g.round() + g.trunc() + -g,
    "floor division": lambda p, g: torch.div(g, 0.3, rounding_mode="floor"),
    "comparison": lambda p, g: (g > 0) * p + (g <= p).float() + (g != 0).to(g.dtype).mul_(2),
    "where": lambda p, g: torch.where(g > p, g, 0.1) + torch.where((g > 0) & (p > 0), p, g),
    "logic": lambda p, g: ((g > 0) | ~(p > 0)) * g + g.logical_not() + (g > 0).logical_xor(p > 0),
    "masks": lambda p, g: g.masked_fill(g < 0, 0.5).masked_fill(p > g, torch.tensor(2.0)),
    "mask written in place": lambda p, g: g.clone().gt_(0) * p,
    "truth of numbers": lambda p, g: g.relu().bool() * p,
    "not finite": lambda p, g: (g / g.relu()).nan_to_num(0.5, 2.0, -2.0) + g.isfinite() * g,
    "not finite, by default": lambda p, g: (g / g.relu()).nan_to_num().clamp(-1, 1),
    "made": lambda p, g: torch.zeros_like(g) + torch.ones_like(g) * g + torch.full_like(g, 0.2),
    "made of a size": lambda p, g: torch.ones(g.shape) + g.new_full(g.shape, 2.0) + g,
    "made in place": lambda p, g: torch.empty_like(g).copy_(g).add_(torch.empty_like(g).fill_(2)),
    "views": lambda p, g: (g.view(-1) * p.flatten()).view_as(p) + g.unsqueeze(0).squeeze(0),
    "aliases": lambda p, g: g.detach().add_(1) * g,
    "out": lambda p, g: torch.mul(p, g, out=torch.empty_like(p)),
    "0-d tensors": lambda p, g: g * torch.tensor(0.3) + torch.tensor(2.0) / (g.abs() + 1),
    "scalars alone": lambda p, g: g.mul(torch.tensor(1.0) * 0.3 + 1).add_(torch.tensor([0.5])),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_element_wise_operations_are_recorded_bit_by_bit(name: str) -> None:
    class Computes(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            p.add_(POINTWISE[name](p.clone(), grad), alpha=-1e-3)

    admission = admit_fused(Computes(params()), 0)
    assert admission.exact, admission.reason


def test_a_mask_in_arithmetic_is_cast_in_the_program() -> None:
    class Masks(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            p.sub_((grad > 0) * grad)

    assert (
        str(recordings(Masks(params()), 1)[0].program)
        == "master' = master - float(grad > s0) * grad"
    )


def test_every_operation_has_a_template_for_its_inputs() -> None:
    for name, operation in OPERATIONS.items():
        inputs = tuple(f"x{i}" for i in range(len(operation.needs)))
        text = str(Program((Op(name, inputs, "master'"),), (("master", "master'"),), 0))
        assert all(i in text for i in inputs), text


def test_parentheses_stand_where_they_matter() -> None:
    ops = (
        Op("add", ("master", "grad"), "t0"),
        Op("sub", ("master", "grad"), "t1"),
        Op("mul", ("t0", "s0"), "t2"),
        Op("div", ("t2", "t1"), "t3"),
        Op("sub", ("grad", "t3"), "t4"),
        Op("sub", ("master", "t4"), "master'"),
    )
    program = Program(ops, (("master", "master'"),), 1)
    assert str(program) == "master' = master - (grad - (master + grad) * s0 / (master - grad))"


def test_a_program_refuses_another_number_of_scalars() -> None:
    program = recordings(SGD(params(), lr=0.1), 1)[0].program
    with pytest.raises(ValueError, match="reads 1 scalars and 2 were given; take them from the"):
        program.run(torch.ones(2), torch.ones(2), {}, [1.0, 2.0])


def test_running_a_program_changes_nothing_in_place() -> None:
    second = recordings(SGD(params(), lr=0.1, weight_decay=0.1, momentum=0.9), 2)[1]
    given = torch.ones(3), torch.ones(3), {"momentum_buffer": torch.ones(3)}
    before = copy.deepcopy(given)
    second.program.run(*given, second.scalars)
    assert difference(frozen(before), frozen(given)) == ""


# ---------------------------------------- what is left alone


@pytest.mark.parametrize("rule", [AdamW, SGD, RAdam, torch.optim.Adagrad])
def test_recording_leaves_groups_state_gradients_and_random_state_untouched(rule: Any) -> None:
    optimizer = rule(params(), lr=torch.tensor(0.1), weight_decay=0.1)
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    group = optimizer.param_groups[0]
    grads = [p.grad for p in group["params"]]

    def everything() -> Any:
        seen = [group, optimizer.state_dict(), grads, torch.get_rng_state(), random.getstate()]
        return frozen(seen)

    before = everything()
    assert admit_fused(optimizer, 0).fusible
    bias = group["params"][1]
    Probe(optimizer, 0, bias).step(RuleState.of(optimizer.state.get(bias, {}), bias))
    assert difference(before, everything()) == ""
    assert all(p.grad is grad for p, grad in zip(group["params"], grads, strict=True))


def test_a_refused_draw_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    with pytest.raises(NotFusible, match=r"it draws random numbers \(torch.rand_like\)"):
        recordings(AddsNoise(params()), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_no_recording(dtype: torch.dtype) -> None:
    optimizer, adamw, usual = Lion(params()), AdamW(params()), torch.get_default_dtype()
    plain = recordings(optimizer, 2)
    torch.set_default_dtype(dtype)
    try:
        assert recordings(optimizer, 2) == plain
        assert admit_fused(optimizer, 0).exact
        assert admit_fused(adamw, 0).exact
        given = torch.ones(3, dtype=torch.float32)
        master, _ = plain[0].program.run(given, given, {}, plain[0].scalars)
        assert master.dtype == torch.float32
    finally:
        torch.set_default_dtype(usual)


def test_parameters_in_fp64_are_left_to_the_rule() -> None:
    admission = admit_fused(SGD([nn.Parameter(torch.ones(3).double())], lr=0.1), 0)
    assert admission.reason == "a parameter is float64, and kernels compute in FP32"


def test_groups_are_recorded_apart() -> None:
    weights = params()
    optimizer = SGD([{"params": weights[:1], "momentum": 0.5}, {"params": weights[1:]}], lr=0.1)
    probes = [Probe(optimizer, index, weights[index]) for index in (0, 1)]
    written = [probe.step(RuleState()).program.writes for probe in probes]
    assert written == [("master", "momentum_buffer"), ("master",)]
    assert admit_fused(optimizer, 1).fusible


# ---------------------------------------- rules


class Lion(Rule):
    def __init__(
        self, params: Any, lr: float = 0.1, weight_decay: float = 0.1, foreach: bool = False
    ) -> None:
        super().__init__(params, lr, weight_decay=weight_decay, foreach=foreach)

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(momentum.lerp(grad, 0.1).sign_(), alpha=-group["lr"])
        momentum.lerp_(grad, 0.01)


class LionOfLists(Rule):
    """The same, and all in lists."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in moving]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in moving]
            torch._foreach_mul_(moving, 1 - group["lr"] * 0.1)
            signs = torch._foreach_sign(torch._foreach_lerp(momenta, grads, 0.1))
            torch._foreach_add_(moving, signs, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 0.01)


def test_lion_is_exact_and_its_lists_record_like_its_loop() -> None:
    loop, lists = Lion(params()), LionOfLists(params())
    assert admit_fused(loop, 0).exact and admit_fused(lists, 0).exact
    assert recordings(loop, 2) == recordings(lists, 2)


class AlternatesMomenta(Rule):
    """Like PNM: the parity of a count decides which of two states is updated."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        count = state["step"] = state.get("step", 0) + 1
        pair = [state.setdefault(name, torch.zeros_like(p)) for name in ("positive", "negative")]
        new, old = pair if count % 2 else reversed(pair)
        new.mul_(0.9).add_(grad)
        p.add_(2 * new - old, alpha=-group["lr"])


class SwapsMomenta(Rule):
    """Two states trade places at each step."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        old = state.setdefault("old", torch.zeros_like(p))
        new = state.setdefault("new", torch.zeros_like(p))
        old.add_(grad)
        p.add_(old - 0.5 * new, alpha=-group["lr"])
        state["old"], state["new"] = new, old


@pytest.mark.parametrize("rule, programs", [(AlternatesMomenta, 4), (SwapsMomenta, 2)])
def test_states_that_trade_places_are_followed(rule: type[Rule], programs: int) -> None:
    admission = admit_fused(rule(params()), 0)
    assert admission.exact
    # Of the first kind: the first two steps, where states are still zeros or untouched.
    assert len(admission.programs) <= programs


class FirstGradient(Rule):
    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if "first" not in state:
            state["first"] = grad.clone()
        p.add_(grad * state["first"], alpha=-group["lr"])


def test_a_state_made_of_the_first_gradient_is_two_programs() -> None:
    admission = admit_fused(FirstGradient(params()), 0)
    assert admission.exact
    first, later = admission.programs
    assert first.writes == ("master", "first") and later.writes == ("master",)


class CountsInItsGroup(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / group["k"])


class CountsInSharedState(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        shared: Any = self.state
        shared["k"] = shared.get("k", 0) + 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.add_(p.grad, alpha=-0.1 / shared["k"])


class AddsNoise(Rule):
    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.add_(torch.rand_like(p))


# ---------------------------------------- rules made to fool it


class Kept:
    last: Tensor


Update = Callable[[Any, dict[str, Any], Any, Tensor, dict[str, Any]], None]


def reads_its_first_norm(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if "gain" not in state:
        state["gain"] = grad.std()
    p.add_(grad, alpha=-float(state["gain"]))


def reads_its_norm(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=-group["lr"] * min(1.0, 1 / float(grad.norm())))


def branches_on_its_norm(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad if grad.norm() > 1 else 2 * grad, alpha=-group["lr"])


def keeps_its_norm_in_its_group(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    group["norm"] = grad.norm()
    p.add_(grad / group["norm"], alpha=-group["lr"])


def keeps_its_norm_on_itself(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    norm = getattr(rule, "norm", torch.ones(()))
    p.add_(grad / norm, alpha=-group["lr"])
    rule.norm = grad.norm()


def lists_its_norms(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state.setdefault("norms", []).append(grad.norm())
    p.add_(grad / state["norms"][0], alpha=-group["lr"])


def couples_tensors(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """The norm of all gradients looks like that of one, for one parameter."""
    grads = [p.grad for p in group["params"] if p.grad is not None]
    total = torch.stack(torch._foreach_norm(grads)).norm()
    p.add_(grad / total, alpha=-group["lr"])


def lets_the_last_norm_win(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """Coupled by way of a list that one parameter makes look like its own."""
    grads = [p.grad for p in group["params"] if p.grad is not None]
    p.add_(grad / torch._foreach_norm(grads)[-1], alpha=-group["lr"])


def counts_its_mask(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad / ((grad > 0).sum() + 1), alpha=-group["lr"])


def sums_copies(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad / grad.norm().expand(p.shape).sum(), alpha=-group["lr"])


def fans_its_norm_out(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad / grad.norm().expand(5).sum(), alpha=-group["lr"])


def sums_in_double(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad / grad.sum(dtype=torch.float64).float(), alpha=-group["lr"])


def takes_the_name_of_a_norm(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["r0"] = grad.norm()
    p.add_(grad / state["r0"], alpha=-group["lr"])


def takes_the_name_of_the_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["numel"] = grad + 1
    p.add_(grad, alpha=-group["lr"])


def balances_rows(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """Like Nero."""
    p.sub_(p.mean(dim=-1, keepdim=True))


def lists_its_norm(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """Reads the gradient by a way that no dispatch sees."""
    norm = math.sqrt(sum(float(x) ** 2 for x in grad.numpy().reshape(-1)))
    p.add_(grad, alpha=-group["lr"] / norm)


def lists_its_first_norm(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if "gain" not in state:
        state["gain"] = float(abs(grad.numpy()).sum())
    p.add_(grad, alpha=-state["gain"])


def changes_its_way_when_large(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad if p.numel() < 4096 else grad.sign(), alpha=-group["lr"])


def reads_values_when_slow(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=-1.0 if group["lr"] > 0.06 else -float(abs(grad.numpy()).sum()))


def throws_dice(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=-random.random())


def looks_at_its_sign(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if grad.view(-1)[0] > 0:
        p.add_(grad)


def asks_an_item(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=grad.view(-1).select(0, 0).item())


def compares(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if not torch.equal(p, grad):
        p.add_(grad)


def sorts(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad.sort().values)


def multiplies_matrices(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_((grad.flatten().outer(grad.flatten()) @ grad.flatten()).view_as(p))


def transposes(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad.mT.reshape(p.shape))


def flips(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad.flip(0))


def broadcasts(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_((grad.unsqueeze(0) * grad.unsqueeze(1)).sum(0))


def indexes(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p[torch.tensor([0])] = 0.5


def writes_a_row(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p[0].add_(1)


def halves_precision(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad.bfloat16().float())


def goes_through_numpy(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(torch.from_numpy(grad.numpy() * 2))


def keeps_an_object(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state.setdefault("kept", Kept()).last = grad.clone()
    p.add_(state["kept"].last)


def keeps_it_in_its_group(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    group["last"] = grad.clone()
    p.add_(grad)


def keeps_a_truth(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["up"] = grad > 0
    p.add_(grad)


def takes_a_name(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["t0"] = grad + 1
    p.add_(grad)


def counts_on_itself(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    rule.count = getattr(rule, "count", 0) + 1
    p.add_(grad, alpha=-1.0 / rule.count)


def brings_its_own(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(torch.arange(p.numel()).view_as(p).float())


def gives_new_data(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.data = torch.from_numpy(p.detach().numpy().copy())


def takes_complex_steps(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_((grad * 1j).abs())


def wants_fused_bessel(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad.digamma())


def aliases_its_weights(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """A state that is the parameter itself: it moves whenever the parameter does."""
    state.setdefault("same", p.detach())
    p.add_(grad * state["same"], alpha=-group["lr"])


FOOLS: dict[Update, str] = {
    reads_its_first_norm: "its Python code looks at a number of the data, by item() or in an if",
    reads_its_norm: "its Python code looks at a number of the data, by item() or in an if",
    branches_on_its_norm: "its Python code looks at a number of the data, by item() or in an if",
    keeps_its_norm_in_its_group: "it keeps what depends on data under 'norm', outside of its state",
    keeps_its_norm_on_itself: "it changes its attribute 'norm' as it steps, where only numbers are",
    lists_its_norms: "it keeps a number of the data inside of a collection, as norms[0]",
    couples_tensors: "differs from the rule itself: the parameter after trial step 1",
    lets_the_last_norm_win: "differs from the rule itself: the parameter after trial step 1",
    counts_its_mask: "torch.sum computes in int64, and kernels compute in FP32",
    sums_copies: "torch.sum is not element-wise",
    fans_its_norm_out: "torch.expand is not element-wise",
    sums_in_double: "torch.sum computes in float64, and kernels compute in FP32",
    takes_the_name_of_a_norm: "a state called 'r0' looks like a value of the program",
    takes_the_name_of_the_size: "a state called 'numel' looks like a value of the program",
    balances_rows: "torch.mean reduces over some dimensions only",
    lists_its_norm: "differs from the rule itself: the parameter after trial step 1",
    lists_its_first_norm: "differs from the rule itself: ",
    changes_its_way_when_large: "its step depends on the parameter's sizes, here [128, 64]",
    reads_values_when_slow: "differs from the rule itself: the parameter after trial step 5",
    throws_dice: "differs from the rule itself: the parameter after trial step 1",
    looks_at_its_sign: "torch.select is not element-wise",
    asks_an_item: "torch.select is not element-wise",
    compares: "it reads values of elements (torch.equal)",
    sorts: "torch.sort is not element-wise",
    multiplies_matrices: "torch.mul makes 5929 values of 77: it mixes elements",
    transposes: "torch.transpose is not element-wise",
    flips: "torch.flip is not element-wise",
    broadcasts: "torch.mul makes 539 values of 77: it mixes elements",
    indexes: "torch.index_put is not element-wise",
    writes_a_row: "torch.select is not element-wise",
    halves_precision: "torch._to_copy computes in bfloat16, and kernels compute in FP32",
    goes_through_numpy: "torch.add_ takes a tensor of 77 elements that comes from neither the",
    keeps_an_object: "differs from the rule itself: state['kept'] after trial step 1",
    keeps_it_in_its_group: "it keeps what depends on data under 'last', outside of its state",
    keeps_a_truth: "state['up'] is torch.bool, not FP32",
    takes_a_name: "a state called 't0' looks like a value of the program",
    counts_on_itself: "differs from the rule itself: its attribute 'count' after trial step 1",
    brings_its_own: "takes a tensor of 77 elements that comes from neither the parameter",
    gives_new_data: "it gave the parameter data that does not come from the parameter",
    takes_complex_steps: "it computes with 1j, which is no real number",
    wants_fused_bessel: "torch.digamma has no fused form",
    aliases_its_weights: "differs from the rule itself: ",
}


@pytest.mark.parametrize("update", FOOLS, ids=lambda update: update.__name__)
def test_a_rule_that_is_no_program_is_refused_for_its_reason(update: Update) -> None:
    class Fool(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            update(self, group, p, grad, state)

    admission = admit_fused(Fool(params((128, 64))), 0)
    assert not admission.fusible
    assert re.search(re.escape(FOOLS[update]), admission.reason), admission.reason


def test_a_parameter_of_any_size_costs_no_memory_to_check() -> None:
    optimizer = AdamW(params((4, 6)))
    Probe(optimizer, 0, params((4, 6))[0]).check_size((2**20, 2**20))


class ReadsAMark(Rule):
    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.add_(grad, alpha=-group["lr"] * getattr(p, "multiplier", 1.0))


def test_attributes_that_users_set_on_parameters_are_seen_by_the_rule() -> None:
    marked = params((4, 6))
    vars(marked[0])["multiplier"] = 2.0
    assert recordings(ReadsAMark(marked), 1)[0].scalars == (-0.2,)
    assert admit_fused(ReadsAMark(marked), 0).exact


def test_parameters_without_dimensions_are_not_recorded() -> None:
    optimizer = SGD(params(()), lr=0.1)
    with pytest.raises(NotFusible, match="a parameter of no dimensions looks like the numbers"):
        Probe(optimizer, 0, params(())[0])
    assert "a parameter of no dimensions" in admit_fused(optimizer, 0).reason
    assert admit_fused(SGD(params((), (3,)), lr=0.1), 0).fusible


class AsksWhoIsThere(Optimizer):
    """Makes a state for whom it has no entry: an empty one is an entry."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    self.state[p] = {"sum": torch.zeros_like(p)}
                p.add_(self.state[p]["sum"].add_(p.grad), alpha=-group["lr"])


def test_a_rule_that_asks_for_an_entry_finds_none_before_its_first_step() -> None:
    assert len(recordings(AsksWhoIsThere(params()), 2)) == 2
    assert admit_fused(AsksWhoIsThere(params()), 0).exact
