"""Rules made to fool the trial: each couples tensors, or escapes its groups, in another way."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import mixprec
from mixprec.optimizer.rule.admission import Admission, accepts_sparse, admit


def low(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or ((8, 6), (6,), (4, 8))
    return [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in shapes]


class Rule(Optimizer):
    """Plain gradient descent, to be bent by subclasses."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def stepped(self) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        return [
            (group, p, p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, p, grad in self.stepped():
            p.add_(grad, alpha=-group["lr"])


class ClipsGlobally(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grads = [grad for _, _, grad in self.stepped()]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.ones(())
        for group, p, grad in self.stepped():
            p.add_(grad, alpha=-group["lr"] / max(1.0, norm.item() / 1000.0))


class CountsOnItself(Rule):
    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        super().step()


class CountsInItsGroup(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        for group, p, grad in self.stepped():
            p.add_(grad, alpha=-group["lr"] / group["k"])


class CountsInATensor(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group.setdefault("k", torch.zeros(())).add_(1)
        for group, p, grad in self.stepped():
            p.sub_(grad * group["lr"] / group["k"])


class AdaptsItsGroup(Rule):
    """Like Prodigy: a step size from all gradients, kept in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            group["d"] = group.get("d", 0.0) + sum(float(g.abs().sum()) for g in grads)
        for group, p, grad in self.stepped():
            p.add_(grad, alpha=-group["lr"] / (1.0 + group["d"]))


class KeysStateByName(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        shared: dict[str, int] = self.state["shared"]  # pyright: ignore[reportArgumentType]
        shared["k"] = shared.get("k", 0) + 1
        for group, p, grad in self.stepped():
            p.add_(grad, alpha=-group["lr"] / shared["k"])


class KeepsItsOwnList(Rule):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.own = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.own:
            if p.grad is not None:
                p.add_(p.grad, alpha=-0.1)


class UsesTheLoss(Rule):
    """Like the Polyak step size; a counter moves only with a loss."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            self.mean_loss = 0.5 * getattr(self, "mean_loss", 0.0) + 0.5 * float(closure())
        for _, p, grad in self.stepped():
            p.add_(grad, alpha=-getattr(self, "mean_loss", 0.0))


class HasModes(Rule):
    """Like the schedule-free rules: steps in train mode, and shows other weights in eval mode."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.defaults["training"] = False
        for group in self.param_groups:
            group["training"] = False

    @torch.no_grad()
    def switch(self, training: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group["training"] != training and "away" in self.state[p]:
                    p.add_(self.state[p]["away"], alpha=-1.0 if training else 1.0)
            group["training"] = training

    def train(self) -> None:
        self.switch(True)

    def eval(self) -> None:
        self.switch(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self.param_groups[0]["training"]:
            raise RuntimeError("not in train mode")
        for group, p, grad in self.stepped():
            self.state[p].setdefault("away", torch.full_like(p, 1e-4))
            p.add_(grad, alpha=-group["lr"])


class RebindsData(Rule):
    """Gives its parameters new memory, as some packages' rules do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, p, grad in self.stepped():
            p.data = p.data - group["lr"] * grad


class LooksTwice(Rule):
    """Like sharpness-aware rules: uses the gradients that are there, then asks for new ones."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for _, p, grad in self.stepped():
            p.add_(grad)
        with torch.enable_grad():
            closure()
        for group, p, grad in self.stepped():
            p.sub_(grad * group["lr"])
        return closure()


class EvaluatesTwice(Rule):
    """Wants two losses of the same weights, as for two draws of a dropout."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
            closure()
        super().step()


class CouplesMatrices(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        matrices = sum(float(grad.sum()) for _, p, grad in self.stepped() if p.ndim == 2)
        for group, p, grad in self.stepped():
            p.sub_((grad + matrices) * group["lr"])


class HasMomentum(Rule):
    """A rule that torch does not know, with state in its parameter's dtype."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        for group, p, grad in self.stepped():
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            p.sub_(velocity.mul_(0.9).add_(grad) * group["lr"])


class SavesACounter(Rule):
    """Keeps what matters on itself and saves it beside its state, as some packages' rules do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.age = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.age += 1
        for group, p, grad in self.stepped():
            p.sub_(grad * group["lr"] / self.age)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "age": self.age}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.age = state_dict["age"]


class LooksItselfUp(Rule):
    """Keeps no state until it is told to, then makes it for parameters that have no entry."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, p, grad in self.stepped():
            p.sub_(grad * group["lr"])
            if group.get("anchored"):
                if p not in self.state:
                    self.state[p] = {"anchor": p.detach().clone()}
                p.lerp_(self.state[p]["anchor"], 0.01)


class RefusesToLoad(SavesACounter):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        raise KeyError("age")


class CannotRun(Rule):
    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError("updates happen in backward")


class DrawsNoise(Rule):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, p, grad in self.stepped():
            p.add_(grad + torch.randn_like(p), alpha=-group["lr"] * random.random())


@pytest.mark.parametrize("rule", [Rule, CountsInItsGroup, CountsInATensor, DrawsNoise, SGD, AdamW])
def test_rules_that_treat_tensors_one_by_one_run_in_buckets(rule: Any) -> None:
    assert admit(rule(low(), lr=0.1)).per_parameter


@pytest.mark.parametrize(
    "rule", [ClipsGlobally, CountsOnItself, AdaptsItsGroup, KeysStateByName, torch.optim.LBFGS]
)
def test_rules_that_couple_tensors_run_whole_and_say_why(rule: Any) -> None:
    admission = admit(rule(low(), lr=0.1))
    assert not admission.per_parameter
    assert admission.reason


@pytest.mark.parametrize("rule", [ClipsGlobally, CountsOnItself, AdaptsItsGroup, KeysStateByName])
def test_coupled_rules_equal_the_bare_rule_on_fp32_parameters(rule: Any) -> None:
    params = low()
    reference = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, bare = mixprec.MixedPrecision(rule(params), bucket_numel=8), rule(reference)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(params, reference, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        bare.step()
    masters = [master for _, master in optimizer.masters()]
    torch.testing.assert_close(masters, [q.detach() for q in reference], rtol=0, atol=0)


def test_rule_that_keeps_its_own_list_of_parameters_is_refused() -> None:
    with pytest.raises(TypeError, match=r"KeepsItsOwnList cannot run on FP32 masters.*outside of"):
        admit(KeepsItsOwnList(low()))


def test_rule_that_cannot_be_tried_is_refused_with_its_own_words() -> None:
    with pytest.raises(TypeError, match=r"could not be tried.*updates happen in backward"):
        admit(CannotRun(low()))


def test_refused_rule_changes_no_weight() -> None:
    params = low()
    before = [p.detach().clone() for p in params]
    optimizer = mixprec.MixedPrecision(KeepsItsOwnList(params))
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="cannot run on FP32 masters"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not optimizer.state


def test_rule_that_uses_the_loss_gets_it_and_is_tried_with_it() -> None:
    assert admit(UsesTheLoss(low())).per_parameter
    assert not admit(UsesTheLoss(low()), with_loss=True).per_parameter
    params = low()
    optimizer = mixprec.MixedPrecision(UsesTheLoss(params))

    def closure() -> float:
        for p in params:
            p.grad = torch.ones_like(p)
        return 2.0

    before = [p.detach().float() for p in params]
    optimizer.step(closure)
    for (_, master), start in zip(optimizer.masters(), before, strict=True):
        torch.testing.assert_close(master, start - 1.0, rtol=0, atol=0)


@pytest.mark.parametrize("masters", ["split", "full"])
def test_modes_of_a_rule_move_masters_and_survive_a_checkpoint(masters: Any) -> None:
    def made() -> tuple[list[nn.Parameter], mixprec.MixedPrecision]:
        params = low()
        inner = HasModes(params)
        return params, mixprec.MixedPrecision(inner, masters=masters, bucket_numel=8)

    params, optimizer = made()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="not in train mode"):
        optimizer.step()
    optimizer.train()
    assert not optimizer.state
    optimizer.step()
    trained = [master.clone() for _, master in optimizer.masters()]
    optimizer.eval()
    for (_, master), before in zip(optimizer.masters(), trained, strict=True):
        torch.testing.assert_close(master, before + 1e-4, rtol=0, atol=0)
    resumed_params, resumed = made()
    for p, q in zip(params, resumed_params, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        each.train()
    ours = [master for _, master in optimizer.masters()]
    theirs = [master for _, master in resumed.masters()]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_a_change_of_mode_tells_of_weights_that_it_found_written() -> None:
    params = low()
    optimizer = mixprec.MixedPrecision(HasModes(params), masters="full")
    optimizer.train()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[0].detach().fill_(3.0)
    with pytest.warns(RuntimeWarning, match=r"written outside of step\(\)"):
        optimizer.eval()


def test_trial_leaves_optimizer_and_random_state_alone() -> None:
    params = low()
    optimizer = AdamW(params, lr=0.1)
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.randn(3), random.random()
    torch.manual_seed(3)
    random.seed(3)
    before = [p.detach().clone() for p in params]
    group = dict(optimizer.param_groups[0])
    admit(optimizer)
    assert torch.equal(torch.randn(3), expected[0]) and random.random() == expected[1]
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert dict(optimizer.param_groups[0]) == group
    assert not optimizer.state


def test_learning_rate_that_a_warm_up_starts_at_zero_does_not_hide_coupling() -> None:
    assert not admit(CouplesMatrices(low(), lr=0.0)).per_parameter


class BearsNoLargeGradient(Rule):
    """As a rule that decomposes a matrix, which fails once it overflows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group, p, grad in self.stepped():
            if grad.abs().max() > 100:
                raise ArithmeticError("it did not converge")
            p.add_(grad, alpha=-group["lr"])
        return loss


def test_rule_that_fails_at_large_gradients_is_tried_with_small_ones() -> None:
    found = admit(BearsNoLargeGradient(low()))
    assert found.per_parameter and not found.calls_closure


def test_rule_that_has_stepped_is_tried_afresh() -> None:
    params = low()
    rule = CountsInItsGroup(params)
    for p in params:
        p.grad = torch.ones_like(p)
    rule.step()
    rule.state[params[0]]["anything"] = torch.zeros(8, 6)
    assert admit(rule).per_parameter
    assert rule.param_groups[0]["k"] == 1


def test_sparse_gradients_are_accepted_where_the_rule_takes_them() -> None:
    table = low((6, 4))
    assert accepts_sparse(SGD(table, lr=0.1))
    assert accepts_sparse(torch.optim.SparseAdam(table))
    assert not accepts_sparse(AdamW(table))


def test_reason_is_part_of_the_answer() -> None:
    assert admit(Rule(low())) == Admission(
        True, False, "each tensor's update depends on that tensor alone"
    )


def step_with(optimizer: Optimizer, params: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("masters", ["split", "full"])
def test_rule_may_give_parameters_new_memory(masters: Any) -> None:
    params = low()
    reference = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = mixprec.MixedPrecision(RebindsData(params), masters=masters)
    for seed in range(3):
        step_with(optimizer, params, seed)
        step_with(RebindsData(reference), reference, seed)
    ours = [master for _, master in optimizer.masters()]
    torch.testing.assert_close(ours, [q.detach() for q in reference], rtol=0, atol=0)


def test_rule_that_begins_with_gradients_from_before_its_closure_gets_them() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(LooksTwice([weight], lr=1.0))
    seen: list[float] = []

    def closure() -> float:
        seen.append(weight[0].item())
        weight.grad = torch.full_like(weight, 8.0)
        return 0.0

    weight.grad = torch.full_like(weight, 3.0)
    optimizer.step(closure)
    assert seen == [3.0, -5.0]


def test_rule_that_evaluates_its_closure_twice_calls_it_itself() -> None:
    assert not admit(EvaluatesTwice(low())).calls_closure
    assert admit(EvaluatesTwice(low()), with_loss=True).calls_closure


def test_group_added_later_is_tried_anew() -> None:
    vectors, matrices = low((5,), (3,)), low((4, 4), (4, 3))
    optimizer = mixprec.MixedPrecision(CouplesMatrices(vectors))
    step_with(optimizer, vectors)
    assert "bucket by bucket" in optimizer.explain()
    optimizer.add_param_group({"params": matrices})
    step_with(optimizer, vectors + matrices)
    assert "whole" in optimizer.explain()
    assert {s["master"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_16_bit_state_of_a_bare_rule_that_torch_does_not_know_is_widened() -> None:
    params = low()
    bare = HasMomentum(params)
    step_with(bare, params)
    optimizer = mixprec.MixedPrecision(HasMomentum(params))
    optimizer.load_state_dict(bare.state_dict())
    assert {s["velocity"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_init_state_leaves_the_rules_own_counters_alone() -> None:
    params = low()
    optimizer = mixprec.MixedPrecision(HasMomentum(params))
    step_with(optimizer, params[:1])
    before = vars(optimizer.inner)["count"]
    optimizer.init_state()
    assert vars(optimizer.inner)["count"] == before
    assert all("velocity" in optimizer.state[p] for p in params)


def test_what_a_rule_saves_beside_its_state_comes_back() -> None:
    params = low()
    optimizer = mixprec.MixedPrecision(SavesACounter(params))
    loaded: list[int] = []
    for seed in range(3):
        step_with(optimizer, params, seed)
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = mixprec.MixedPrecision(SavesACounter(other_params))
    other.register_load_state_dict_post_hook(lambda _: loaded.append(1))
    groups, saved = other.param_groups, optimizer.state_dict()
    assert saved["age"] == 3
    other.load_state_dict(saved)
    assert loaded == [1] and other.param_groups is groups is other.inner.param_groups
    step_with(optimizer, params, 3)
    step_with(other, other_params, 3)
    ours, theirs = ([m for _, m in each.masters()] for each in (optimizer, other))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_rule_that_looks_itself_up_in_the_state_finds_no_empty_entry() -> None:
    params = low()
    optimizer = mixprec.MixedPrecision(LooksItselfUp(params))
    step_with(optimizer, params)
    assert all({"master"} == set(optimizer.state[p]) for p in params)
    optimizer.param_groups[0]["anchored"] = True
    step_with(optimizer, params, 1)
    assert all({"anchor", "master"} == set(optimizer.state[p]) for p in params)


def test_load_that_the_rule_itself_refuses_changes_nothing() -> None:
    params = low()
    optimizer = mixprec.MixedPrecision(RefusesToLoad(params))
    step_with(optimizer, params)
    state, groups = optimizer.state, optimizer.param_groups
    with pytest.raises(KeyError, match="age"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.inner.state is state and optimizer.inner.param_groups is groups
    step_with(optimizer, params, 1)
