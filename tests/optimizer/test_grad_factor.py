"""A factor that no gradient can be multiplied by: skipped, counted, and said by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from parts import judge_on_device
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

import mixprec
from mixprec.optimizer.judging.grad_factor import checked, complaint, on
from mixprec.optimizer.judging.verdict import judge, unjudged

NAN, INF = math.nan, math.inf
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def made(dtype: torch.dtype, rule: Callable[..., Any] = AdamW, **options: Any) -> Any:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    return weight, mixprec.MixedPrecision(rule([("w", weight)], lr=0.125), **options)


def give(weight: Any, value: float = 1.0) -> None:
    weight.grad = torch.full_like(weight, value)


def all_of(optimizer: mixprec.MixedPrecision, weight: Any) -> Any:
    state = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in optimizer.state.get(weight, {}).items()
    }
    return weight.detach().clone(), state, [m.clone() for _, m in optimizer.masters()]


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "factor",
    [
        *(NAN, INF, torch.tensor(NAN), torch.tensor(INF, dtype=torch.float64)),
        *(torch.tensor(128.0) / 0, 1e300, torch.tensor(1e300, dtype=torch.float64)),
        *(1e-300, 10**400),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"fused": True},
        {"fused": True, "max_grad_norm": 1.0},
        {"on_nonfinite": "ignore"},
        {"on_nonfinite": "ignore", "fused": True},
        {"masters": "full"},
        {"fused": True, "device": True},
        {"fused": True, "device": True, "on_nonfinite": "ignore"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_factor_that_is_no_number_leaves_everything_as_it_was(
    dtype: torch.dtype, options: dict[str, Any], factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, device = {**options}, "device" in options
    options.pop("device", None)
    if dtype == torch.float32 and options.get("masters"):
        options.pop("masters")
    weight, optimizer = made(dtype, **options)
    give(weight)
    optimizer.step(grad_factor=0.5)
    before = all_of(optimizer, weight)
    if device:
        judge_on_device(optimizer, monkeypatch)
    give(weight)
    value = INF if isinstance(factor, int) else float(factor)
    clipped = value == 1e300 and "max_grad_norm" in options
    if clipped:  # the clip coefficient takes it back: the direction is known, and the length is 1
        optimizer.step(grad_factor=factor)
        assert optimizer.grads_finite and math.isfinite(float(weight.detach().float().norm()))
        return
    with pytest.warns(RuntimeWarning, match=r"(grad_factor is|times grad_factor).*was skipped"):
        optimizer.step(grad_factor=factor)
        if device:
            optimizer._outcome.hear()  # the next step, where the host hears of it
    assert_same(all_of(optimizer, weight), before)
    assert not optimizer.grads_finite
    metrics = optimizer.metrics()
    assert (metrics["steps"], metrics["skipped_steps"], metrics["skips_in_a_row"]) == (1, 1, 1)
    give(weight)
    optimizer.step(grad_factor=0.5)
    assert optimizer.grads_finite and optimizer.metrics()["steps"] == 2


def test_the_warning_names_the_factor_and_what_to_give() -> None:
    weight, optimizer = made(torch.bfloat16)
    give(weight)
    with pytest.warns(
        RuntimeWarning,
        match=r"grad_factor is nan: a window of 0 tokens gives P / 0\. Give grad_factor=0\.0 for .*"
        r"GradientAccumulator count; the step was skipped and nothing changed",
    ) as told:
        for _ in range(3):
            optimizer.step(grad_factor=NAN)
    assert len(told) == 1 and told[0].filename == __file__


def test_fifty_such_steps_in_a_row_are_an_error_with_and_without_a_scaler() -> None:
    for scaler in (None, mixprec.StaticLossScaler(4.0)):
        weight, optimizer = made(torch.bfloat16, loss_scaler=scaler)
        with (
            pytest.warns(RuntimeWarning, match="grad_factor is inf"),
            pytest.raises(FloatingPointError, match=r"50 steps in a row were skipped: grad_factor"),
        ):
            for turn in range(50):
                if scaler is not None:
                    scaler.multiply(torch.zeros(()))
                give(weight)
                optimizer.step(grad_factor=torch.tensor(INF))
                assert turn < 49


def test_on_nonfinite_raise_names_the_factor() -> None:
    weight, optimizer = made(torch.bfloat16, on_nonfinite="raise")
    give(weight)
    before = all_of(optimizer, weight)
    with pytest.raises(FloatingPointError, match=r"grad_factor is nan.*nothing was updated"):
        optimizer.step(grad_factor=NAN)
    assert_same(all_of(optimizer, weight), before)


def test_a_factor_that_is_no_number_says_nothing_about_the_loss_scale() -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**8)
    weight, optimizer = made(torch.float16, loss_scaler=scaler)
    scaler.multiply(torch.zeros(()))
    give(weight)
    with pytest.warns(RuntimeWarning, match="grad_factor is nan"):
        optimizer.step(grad_factor=NAN)
    assert scaler.get_scale() == 2.0**8
    scaler.multiply(torch.zeros(()))
    give(weight, INF)
    optimizer.step(grad_factor=1.0)
    assert scaler.get_scale() == 2.0**7


def test_the_product_of_factor_and_loss_scale_is_what_counts() -> None:
    scaler = mixprec.StaticLossScaler(2.0**-100)
    weight, optimizer = made(torch.bfloat16, loss_scaler=scaler)
    for factor, went in ((2.0**40, False), (2.0**-100, True)):
        scaler.multiply(torch.zeros(()))
        give(weight)
        expected = r"gradients times grad_factor .* times 1/loss_scale .* leave the range of FP32"
        with nullcontext() if went else pytest.warns(RuntimeWarning, match=expected):
            optimizer.step(grad_factor=factor)
        assert optimizer.grads_finite == went


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finite_gradients_whose_product_leaves_fp32_are_skipped(dtype: torch.dtype) -> None:
    weight, optimizer = made(dtype)
    give(weight, 2.0**100)
    with pytest.warns(RuntimeWarning, match="gradients times grad_factor .* leave the range"):
        optimizer.step(grad_factor=2.0**100)
    assert weight.tolist() == [1.0, -2.0]


class Driven(mixprec.MixedPrecision):
    _step_supports_amp_scaling = True


@pytest.mark.parametrize("scale", [INF, 0.0, NAN])
def test_a_loss_scale_of_a_grad_scaler_that_ran_away_is_no_step(scale: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float16))
    optimizer = Driven(SGD([weight], lr=0.125))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([scale]), torch.zeros(1)  # pyright: ignore
    give(weight)
    optimizer.step()
    assert weight.tolist() == [1.0, -2.0]
    assert optimizer.metrics()["skipped_steps"] == 1


def test_rules_that_evaluate_closures_skip_too() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        optimizer = mixprec.MixedPrecision(LBFGS([weight], lr=0.5))

        def closure(weight: Any = weight, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = weight.float().square().sum()
            loss.backward()
            return loss

        with pytest.warns(RuntimeWarning, match="grad_factor is nan"):
            optimizer.step(closure, grad_factor=NAN)
        assert weight.tolist() == [1.0, -2.0]
        optimizer.step(closure, grad_factor=torch.tensor(0.5))
        assert weight.tolist() != [1.0, -2.0] and weight.isfinite().all()


class Ascends(torch.optim.Optimizer):
    """A rule that begins with gradients from before its closure, as SAM does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is not None
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in params:
            p.add_(p.grad, alpha=0.125)
        with torch.enable_grad():
            loss = closure()
        for p in params:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


def test_gradients_from_before_the_closure_are_not_multiplied_by_it_either() -> None:
    weight, optimizer = made(torch.bfloat16, Ascends)
    give(weight)

    def closure() -> float:
        give(weight)
        return 1.0

    with pytest.warns(RuntimeWarning, match="grad_factor is inf"):
        optimizer.step(closure, grad_factor=INF)
    assert weight.tolist() == [1.0, -2.0]
    assert [master.tolist() for _, master in optimizer.masters()] == [[1.0, -2.0]]


def test_a_late_evaluation_that_leaves_the_range_says_so() -> None:
    weight, optimizer = made(torch.bfloat16, LBFGS)
    sizes = iter([1.0, 2.0**100])

    def closure() -> torch.Tensor:
        give(weight, next(sizes))
        return torch.tensor(1.0)

    with pytest.raises(
        FloatingPointError, match=r"evaluation 2 of .*: gradients times grad_factor"
    ):
        optimizer.step(closure, grad_factor=2.0**60)


# ---------------------------------------- the edge


@pytest.mark.parametrize(
    ("factor", "error", "text"),
    [
        (-1.0, ValueError, r"grad_factor is -1\.0; below 0 the step would climb.*maximize=True"),
        (torch.tensor(-0.5), ValueError, r"grad_factor is -0\.5; below 0"),
        (-INF, ValueError, r"grad_factor is -inf; below 0"),
        (True, TypeError, r"grad_factor is True, a bool; .*give a number or a 0-d tensor"),
        ("0.5", TypeError, r"grad_factor is '0\.5', a str"),
        (1j, TypeError, r"grad_factor is 1j, a complex"),
        ([0.5], TypeError, r"grad_factor is \[0\.5\], a list"),
        (torch.ones(2), ValueError, r"grad_factor has shape \[2\]; one number multiplies all"),
        (torch.ones(0), ValueError, r"grad_factor has shape \[0\]"),
        (torch.tensor(True), TypeError, r"tensor of torch\.bool, which is no real number"),
        (torch.tensor(1j), TypeError, r"tensor of torch\.complex64, which is no real number"),
        (torch.tensor(0.3).half(), TypeError, r"torch\.float16, which keeps two or three digits"),
        (torch.tensor(0.3).bfloat16(), TypeError, r"compute it in FP32 or FP64"),
        (torch.ones((), device="meta"), ValueError, r"meta device and has no value"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_grad", [True, False])
def test_what_no_factor_can_be_is_refused_before_anything_changes(
    factor: Any, error: type[Exception], text: str, with_grad: bool
) -> None:
    weight, optimizer = made(torch.bfloat16)
    if with_grad:
        give(weight)
    with pytest.raises(error, match=text):
        optimizer.step(grad_factor=factor)
    assert weight.tolist() == [1.0, -2.0] and not optimizer.state


@pytest.mark.parametrize(
    "factor",
    [
        *(0.25, Fraction(1, 4), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)),
        torch.tensor(0.25, requires_grad=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_of_any_kind_multiplies(dtype: torch.dtype, factor: Any) -> None:
    weight, optimizer = made(dtype, SGD)
    give(weight, 2.0)
    optimizer.step(grad_factor=factor)
    assert weight.tolist() == [1.0 - 0.0625, -2.0625]
    assert not any(
        isinstance(f, torch.Tensor) and f.requires_grad for f in optimizer._outcome.factors
    )


def test_whole_numbers_multiply_too() -> None:
    for factor in (2, torch.tensor(2)):
        weight, optimizer = made(torch.bfloat16, SGD)
        give(weight, 2.0)
        optimizer.step(grad_factor=factor)
        assert weight.tolist() == [0.5, -2.5]


def test_fp64_gradients_have_the_range_of_fp64() -> None:
    weight, optimizer = made(torch.float64, SGD)
    give(weight, 1e-280)
    optimizer.step(grad_factor=1e280)
    assert torch.allclose(weight.detach(), torch.tensor([0.875, -2.125], dtype=torch.float64))


def test_a_negative_factor_that_only_the_device_knows_is_skipped() -> None:
    verdict = judge([torch.ones(2)], torch.tensor(-1.0), on_device=True)
    assert verdict.found_inf is not None and float(verdict.found_inf) == 1.0
    assert complaint(torch.tensor(-1.0), None) == (
        "grad_factor is -1.0, and below 0 the step would climb"
    )


def test_gradients_are_to_blame_before_the_factor_is() -> None:
    """A loss scale has to hear of an overflow, whatever the clip coefficient makes of it."""
    for grad in (INF, NAN):
        for on_device in (True, False):
            verdict = judge(
                [torch.tensor([1.0, grad])],
                torch.tensor(0.5),
                max_grad_norm=1.0,
                on_device=on_device,
            )
            assert not bool(verdict.finite) and bool(verdict.usable) and bool(verdict.overflowed)


def test_gradients_that_nobody_looks_at_have_a_factor_all_the_same() -> None:
    for value, go in ((NAN, False), (INF, False), (1e39, False), (0.5, True), (0.0, False)):
        factor = torch.tensor(value, dtype=torch.float64)
        assert unjudged(factor, factor != 0, on_device=False).go is go
        found = unjudged(factor, factor != 0, on_device=True).found_inf
        assert found is not None and bool(found) is not go


def test_complaints_name_the_loss_scale() -> None:
    assert "the loss scale is inf, and" in complaint(None, torch.tensor(0.0))
    assert "the loss scale is 0.0, and" in complaint(1.0, torch.tensor(INF))
    assert "the loss scale is nan, and" in complaint(1.0, torch.tensor(NAN))


def test_numbers_are_filled_in_and_tensors_are_moved() -> None:
    cpu = torch.device("cpu")
    assert on(cpu, 0.1).dtype == torch.float64 and float(on(cpu, 0.1)) == 0.1
    assert float(on(torch.device("meta"), torch.ones(())).numel()) == 1
    assert checked(None) is None
