"""What gradients are worth: every combination of finite, counted, scaled and clipped."""

from __future__ import annotations

import pytest
import torch

from mixprec.optimizer.judging.verdict import judge, no_gradients

FINE = torch.tensor([3.0, 4.0])
BAD = torch.tensor([3.0, float("inf")])


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("on_device", [True, False])
def test_flags_agree_on_host_and_device(finite: bool, counted: bool, on_device: bool) -> None:
    verdict = judge(
        [FINE, FINE if finite else BAD], counted=torch.tensor(counted), on_device=on_device
    )
    assert bool(verdict.finite) is finite
    assert bool(verdict.counted) is counted
    assert bool(verdict.overflowed) is (counted and not finite)
    if on_device:
        assert verdict.found_inf is not None and verdict.go
        assert bool(verdict.found_inf) is not (finite and counted)
    else:
        assert verdict.go is (finite and counted)


def test_external_finding_counts_as_overflow() -> None:
    assert not judge([FINE], external_found_inf=torch.ones(1)).go
    assert judge([FINE], external_found_inf=torch.zeros(1)).go


def test_no_gradients_are_nothing_to_skip_for() -> None:
    assert judge([]).go and no_gradients().norm.item() == 0.0


def test_norm_is_the_one_after_the_factor_and_before_the_clip() -> None:
    verdict = judge([FINE], torch.tensor(-0.5), max_grad_norm=1.0)
    assert verdict.norm.item() == 2.5
    assert verdict.factor is not None
    assert verdict.factor.item() == pytest.approx(-0.5 / 2.5, rel=1e-6)


def test_gradients_within_the_limit_are_multiplied_by_exactly_one() -> None:
    verdict = judge([FINE], max_grad_norm=5.1)
    assert verdict.factor is not None and verdict.factor.item() == 1.0


def test_factor_keeps_fp64_until_it_meets_the_gradients() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    verdict = judge([FINE], third)
    assert verdict.factor is not None and verdict.factor.item() == 1 / 3


def test_overflow_of_the_sum_of_squares_alone_is_no_overflow() -> None:
    large = torch.full((4,), 1e30)
    verdict = judge([large], max_grad_norm=1.0)
    assert verdict.go
    assert verdict.norm.item() == pytest.approx(2e30)
    assert verdict.factor is not None and verdict.factor.item() == pytest.approx(5e-31)
