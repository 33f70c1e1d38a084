"""How much a trial may overlook: rules that differ from their recording, or from one tensor to the
next, in one respect only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_rules import Rule, params
from torch import Tensor, nn

from mixprec.optimizer.fused.self_check import admit_fused
from mixprec.optimizer.rule.admission import admit


def _is_probe(p: Tensor) -> bool:
    """Whether a rule is being recorded: probes have seven rows, or sizes and no data."""
    return p.shape[0] == 7 or p.device.type == "meta"


class StepsFurtherThanRecorded(Rule):
    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.add_(grad, alpha=-group["lr"] * (1.0 if _is_probe(p) else 1.0 + group["off"]))


@pytest.mark.parametrize("off, fusible", [(1.8e-6, True), (2.4e-6, False)])
def test_a_program_may_be_off_by_two_millionths_of_an_update_and_no_more(
    off: float, fusible: bool
) -> None:
    # 16 operations, each off by 2^-24 = 6e-8, in the program and in the rule: together 2e-6. After
    # the largest update the master is hardly more than that update, and its spacing 1.2e-7 of it.
    found = admit_fused(StepsFurtherThanRecorded(params(), off=off), 0)
    assert found.fusible is fusible
    assert fusible or "differs from the rule itself: the parameter after trial step" in found.reason


class StraysLate(Rule):
    """Off by less than is allowed, from its twentieth step on."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        state["steps"] = state.get("steps", 0) + 1
        strays = state["steps"] >= 20 and not _is_probe(p)
        p.add_(grad, alpha=-group["lr"] * (1.0 + 1e-6 * strays))


def test_a_program_is_exact_if_it_is_so_afresh_and_from_the_state_that_there_is() -> None:
    weights = params()
    optimizer = StraysLate(weights)
    assert admit_fused(optimizer, 0).exact
    for _ in range(20):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    found = admit_fused(optimizer, 0)
    assert found.fusible and not found.exact
    assert "equals the rule within 2e-06 of each update" in found.reason


class EndsOffOne(Rule):
    """Ends at 1, in a recording, and some spacings of 2^-23 further in truth."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.add_(grad).copy_(grad * 0).add_(1.0 if _is_probe(p) else 1.0 + group["off"] * 2.0**-23)


@pytest.mark.parametrize("spacings, fusible", [(1, True), (2, False)])
def test_a_master_that_does_not_move_may_be_off_by_one_spacing(
    spacings: int, fusible: bool
) -> None:
    # From the second step on, the update is 0, and 2e-6 of it too.
    assert admit_fused(EndsOffOne(params(), off=spacings), 0).fusible is fusible


class ReducesTenTimes(Rule):
    """Each minimum leaves the gradient as it is, and takes a reduction."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        for _ in range(10):
            grad = torch.minimum(grad, grad.abs().max())
        p.add_(grad, alpha=-group["lr"] * (1.0 if _is_probe(p) else 1.0 + group["off"]))


@pytest.mark.parametrize("off, fusible", [(6.4e-6, True), (7.4e-6, False)])
def test_a_reduction_may_be_off_by_two_walks_over_its_terms(off: float, fusible: bool) -> None:
    # Tensors of 4 x 4 and no others: ten times 2 * sqrt(16) * 2^-24 = 4.8e-7, beside the 2e-6.
    assert admit_fused(ReducesTenTimes(params((4, 4)), off=off), 0).fusible is fusible


class KeepsMoreThanRecorded(Rule):
    """Its parameters move as recorded; what it keeps does not."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        kept = state.setdefault("kept", torch.zeros_like(p))
        kept.add_(grad, alpha=1.0 if _is_probe(p) else group["times"])
        p.add_(grad, alpha=-group["lr"])


def test_a_program_that_keeps_another_state_is_refused_although_parameters_agree() -> None:
    assert admit_fused(KeepsMoreThanRecorded(params(), times=1.0), 0).fusible
    found = admit_fused(KeepsMoreThanRecorded(params(), times=1.5), 0)
    assert not found.fusible
    assert "differs from the rule itself: state['kept'] after trial step 1" in found.reason


@pytest.mark.parametrize("off, fusible", [(1.8e-6, True), (2.4e-6, False)])
def test_a_state_may_be_off_by_two_millionths_of_itself(off: float, fusible: bool) -> None:
    # At the step with the largest gradient, 30, the state is hardly more than that gradient.
    assert admit_fused(KeepsMoreThanRecorded(params(), times=1.0 + off), 0).fusible is fusible


class FillsAndEmpties(Rule):
    """A state of gradients, and of nothing at every other step: in truth of a millionth."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        kept = state.setdefault("kept", torch.zeros_like(p))
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] % 2:
            kept.add_(grad)
        else:
            kept.mul_(0.0 if _is_probe(p) else group["left"])
        p.add_(grad, alpha=-group["lr"])


@pytest.mark.parametrize("left, fusible", [(1.8e-6, True), (2.4e-6, False)])
def test_a_state_that_cancels_may_be_off_by_as_much_of_what_it_was(
    left: float, fusible: bool
) -> None:
    assert admit_fused(FillsAndEmpties(params(), left=left), 0).fusible is fusible


class KeepsARate(Rule):
    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        rate = 0.5 if _is_probe(p) else 0.5 * (1.0 + group["off"])
        state["rate"] = torch.tensor(rate, dtype=torch.float64)
        p.add_(grad, alpha=-group["lr"])


@pytest.mark.parametrize("off, fusible", [(1.9e-6, True), (2.1e-6, False)])
def test_a_number_in_a_tensor_may_be_off_by_two_millionths(off: float, fusible: bool) -> None:
    assert admit_fused(KeepsARate(params(), off=off), 0).fusible is fusible


class StepsTwiceIfLarge(Rule):
    """Twice as far where a mean square is above `above`: each gradient's, or any in the group's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            sizes = [p.grad.square().sum() / p.numel() for p in moving]
            for p, own in zip(moving, sizes, strict=True):
                size = own
                for other in sizes if group["together"] else ():
                    size = size if other is own else torch.maximum(size, other)
                p.sub_(p.grad * (1.0 + (size > group["above"]).float()) * group["lr"])


def test_a_number_of_another_tensor_is_told_from_its_own_by_gradients_of_other_sizes() -> None:
    # The trial's gradients are 0.1, 1, 3, 10 times normal ones and such. Were all tensors of a step
    # given the same, then both of these, of 24 and 16 elements, were above 2 together or below it.
    weights = params((4, 6))
    assert admit_fused(StepsTwiceIfLarge(weights, together=False, above=4.0), 0).fusible
    assert not admit_fused(StepsTwiceIfLarge(weights, together=True, above=4.0), 0).fusible


def low(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]


class SharesItsLargest(Rule):
    """Divides by the largest element: of each gradient, or of all in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            for p in (p for p in group["params"] if p.grad is not None):
                seen = grads if group["together"] else [p.grad]
                p.sub_(p.grad * group["lr"] / max(float(grad.abs().max()) for grad in seen))


@pytest.mark.parametrize("shapes", [((8, 6),), ((8, 6), (4, 8)), ((5,), (9,))])
def test_coupled_tensors_are_found_where_all_have_as_many_dimensions(shapes: Any) -> None:
    # Two tensors are tried for each number of dimensions: one alone is coupled with nobody.
    found = admit(SharesItsLargest(low(*shapes), together=True))
    assert not found.per_parameter
    assert "parameters differ after trial step" in found.reason
    assert admit(SharesItsLargest(low(*shapes), together=False)).per_parameter


class KeepsHowManyStep(Rule):
    """Its parameters move one by one; what it keeps of each is a number of all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                self.state[p]["together"] = len(moving)
                p.add_(p.grad, alpha=-group["lr"])


def test_a_state_that_couples_tensors_is_found_although_parameters_agree() -> None:
    found = admit(KeepsHowManyStep(low((8, 6), (6,))))
    assert not found.per_parameter
    assert "state differs after trial step 1" in found.reason


def test_a_threshold_on_all_gradients_is_met_by_some_tensors_of_a_trial_alone() -> None:
    # Mean squares of the first step are some 1 and, at a quarter of the size, 0.06. Of one size,
    # all tensors were above 0.25 or none, with and without the others in sight.
    found = admit(StepsTwiceIfLarge(low((8, 6)), together=True, above=0.25))
    assert not found.per_parameter
    assert "parameters differ after trial step 1" in found.reason
    assert admit(StepsTwiceIfLarge(low((8, 6)), together=False, above=0.25)).per_parameter


class CountsInItsGroup(Rule):
    """Its parameters move one by one; its group is told how many did."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            group["together"] = len(moving)
            for p in moving:
                p.add_(p.grad, alpha=-group["lr"])


def test_a_group_that_couples_tensors_is_found_although_parameters_and_states_agree() -> None:
    found = admit(CountsInItsGroup(low((8, 6), (6,))))
    assert not found.per_parameter
    assert "param_groups[...]['together'] differs after trial step 1" in found.reason


class SortsWhenSlow(Rule):
    """Takes another way, which is no program, once a schedule has lowered its learning rate."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        slow = group["lr"] < group["first"]
        p.add_(grad.sort(0).values if slow else grad, alpha=-group["lr"])


def test_what_a_rule_does_at_a_lower_learning_rate_is_tried_too() -> None:
    assert admit_fused(SortsWhenSlow(params(), lr=0.1, first=0.0), 0).fusible
    found = admit_fused(SortsWhenSlow(params(), lr=0.1, first=0.1), 0)
    assert not found.fusible and "torch.sort" in found.reason
