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


@pytest.mark.parametrize("off, fusible", [(1e-6, True), (1e-5, False)])
def test_a_program_may_be_off_by_two_millionths_of_an_update_and_no_more(
    off: float, fusible: bool
) -> None:
    # 16 operations, each off by 2^-24 = 6e-8, in the program and in the rule: together 2e-6. The
    # spacing of a master of 0.3 is 3e-8, beside updates of 0.1 * 3: nothing to hide behind.
    found = admit_fused(StepsFurtherThanRecorded(params(), off=off), 0)
    assert found.fusible is fusible
    assert fusible or "differs from the rule itself: the parameter after trial step" in found.reason


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


class StepsTwiceIfLarge(Rule):
    """Twice as far where the mean square is above 4: of each gradient, or of any in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            sizes = [p.grad.square().sum() / p.numel() for p in moving]
            for p, own in zip(moving, sizes, strict=True):
                size = own
                for other in sizes if group["together"] else ():
                    size = size if other is own else torch.maximum(size, other)
                p.sub_(p.grad * (1.0 + (size > 4.0).float()) * group["lr"])


def test_a_number_of_another_tensor_is_told_from_its_own_by_gradients_of_other_sizes() -> None:
    # The trial's gradients are 0.1, 1, 3, 10 times normal ones and such. Were all tensors of a step
    # given the same, then both of these, of 24 and 16 elements, were above 2 together or below it.
    weights = params((4, 6))
    assert admit_fused(StepsTwiceIfLarge(weights, together=False), 0).fusible
    assert not admit_fused(StepsTwiceIfLarge(weights, together=True), 0).fusible


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
