"""Guarantees of MixedPrecision that do not depend on the rule; `test_optim_db` has the rules."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import mixprec
from mixprec import formats
from mixprec.gradients import grad_norm

Masters = Literal["auto", "full", "split"]
STORAGES: list[tuple[torch.dtype, Masters]] = [
    (torch.bfloat16, "full"),
    (torch.bfloat16, "split"),
    (torch.float16, "full"),
]
SHAPES = [(8, 6), (6,), (), (4, 4), (2, 3, 2)]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_grads(params: list[nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad.to(dtype or p.dtype).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_grads(params, step)
        optimizer.step()


def masters_of(optimizer: mixprec.MixedPrecision) -> list[Tensor]:
    return [master.clone() for _, master in optimizer.masters()]


def everything(optimizer: mixprec.MixedPrecision) -> list[Any]:
    """Copies of weights, masters, states and groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [{k: copy.deepcopy(v) for k, v in optimizer.state.get(p, {}).items()} for p in params]
    names = ("params", "param_names")
    groups = [{k: v for k, v in g.items() if k not in names} for g in optimizer.param_groups]
    return [[p.detach().clone() for p in params], masters_of(optimizer), states, groups]


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def wrapped(
    dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[mixprec.MixedPrecision, list[nn.Parameter]]:
    params = parameters(dtype)
    return mixprec.MixedPrecision(AdamW(params, lr=1e-2), **options), params


# ---------------------------------------- what it is for


def test_updates_that_16_bits_cannot_see_reach_the_weight_in_the_end() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1e-3))
    bare_weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    bare = SGD([bare_weight], lr=1e-3)
    for _ in range(100):
        weight.grad, bare_weight.grad = torch.ones_like(weight), torch.ones_like(bare_weight)
        optimizer.step()
        bare.step()
    assert bare_weight.item() == 1.0
    assert weight.item() == pytest.approx(0.9, rel=2**-8)


def test_split_and_full_masters_are_bit_identical() -> None:
    split, left = wrapped(masters="split")
    full, right = wrapped(masters="full")
    for step in range(8):
        give_grads(left, step)
        give_grads(right, step)
        split.step()
        full.step()
        assert_same(masters_of(split), masters_of(full))


def test_mixed_dtypes_in_a_group_each_get_what_they_need() -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    params = [nn.Parameter(torch.full((3,), 0.5, dtype=d)) for d in dtypes]
    fp32 = [nn.Parameter(torch.full((3,), 0.5, dtype=torch.float32)) for _ in range(3)]
    fp64 = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
    optimizer, bare = mixprec.MixedPrecision(AdamW(params)), AdamW([*fp32, fp64])
    for step in range(4):
        give_grads(params, step, torch.bfloat16)
        give_grads([fp32[0], fp32[1], fp32[2], fp64], step, torch.bfloat16)
        optimizer.step()
        bare.step()
    masters = masters_of(optimizer)
    assert [m.dtype for m in masters] == [torch.float32] * 3 + [torch.float64]
    assert_same(masters, [p.detach() for p in (*fp32, fp64)])
    assert "master" not in optimizer.state[params[1]]
    kept = [optimizer.state[p]["master"].dtype for p in (params[0], params[2])]
    assert kept == [torch.int16, torch.float32]


def test_bucket_size_changes_nothing() -> None:
    results: list[list[Any]] = []
    for bucket_numel in (1, 16, 50, 10**6, None):
        optimizer, params = wrapped(bucket_numel=bucket_numel)
        train(optimizer, params, range(4))
        results.append(everything(optimizer))
    for result in results[1:]:
        assert_same(result, results[0])


# ---------------------------------------- parameters of every kind


def test_zero_size_frozen_and_gradless_parameters_are_left_alone() -> None:
    empty = nn.Parameter(torch.empty(0, 3, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    resting = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    moving = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(AdamW([empty, frozen, resting, moving], lr=0.1))
    for _ in range(3):
        empty.grad, moving.grad = torch.empty_like(empty), torch.ones_like(moving)
        optimizer.step()
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert torch.equal(resting, torch.ones_like(resting))
    assert (moving < 1).all()
    assert resting not in optimizer.state and frozen not in optimizer.state


@pytest.mark.parametrize("masters", ["split", "full"])
def test_non_contiguous_parameters_equal_the_rule_on_the_same_strides(masters: Masters) -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = nn.Parameter(values.t())
    reference = nn.Parameter(values.float().t())
    strided = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16)[::2])
    optimizer = mixprec.MixedPrecision(AdamW([weight, strided]), masters=masters)
    bare = AdamW([reference])
    for step in range(3):
        grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
        weight.grad, reference.grad = grad, grad.float()
        strided.grad = torch.ones(5, dtype=torch.bfloat16)
        optimizer.step()
        bare.step()
    assert_same(masters_of(optimizer)[0], reference.detach())
    assert (strided < 0).all()


def test_tied_parameters_are_stepped_once() -> None:
    embedding = nn.Embedding(5, 3, dtype=torch.bfloat16)
    head = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    optimizer = mixprec.MixedPrecision(SGD(model.parameters(), lr=1.0))
    before = embedding.weight.detach().float()
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer.step()
    assert_same(masters_of(optimizer)[0], before - 1)
    saved = optimizer.fp32_state_dict(model)
    assert_same(saved["0.weight"], saved["1.weight"])


def test_empty_groups_and_groups_added_later_are_stepped() -> None:
    first, second = parameters(torch.bfloat16, [(3,)]), parameters(torch.float16, [(2, 2)])
    optimizer = mixprec.MixedPrecision(AdamW([{"params": []}, {"params": first}], lr=0.1))
    train(optimizer, first, range(2))
    optimizer.add_param_group({"params": second, "lr": 0.5})
    before = second[0].detach().clone()
    train(optimizer, first + second, range(2, 4))
    assert (second[0] != before).all()
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert [float(optimizer.state[p]["step"]) for p in first + second] == [4.0, 2.0]


def test_group_with_a_refused_parameter_is_not_added() -> None:
    optimizer, _ = wrapped()
    integers = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="is int64; FP32 masters exist for bfloat16 and float16"):
        optimizer.add_param_group({"params": [integers]})
    assert len(optimizer.param_groups) == 1


def test_rules_see_the_marks_that_users_set_on_parameters() -> None:
    class ByMark(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-getattr(p, "lr_mult", 0.0))

    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.lr_mult = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = mixprec.MixedPrecision(ByMark([weight], lr=1.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [-2.0, -2.0]


def test_existing_state_is_adopted_and_widened() -> None:
    params = parameters(torch.bfloat16)
    inner = AdamW(params, lr=1e-2)
    train(inner, params, range(2))
    moments = [inner.state[p]["exp_avg"].float() for p in params]
    weights = [p.detach().float() for p in params]
    optimizer = mixprec.MixedPrecision(inner)
    bare_params = [nn.Parameter(w) for w in weights]
    bare = AdamW(bare_params, lr=1e-2)
    for p, q in zip(params, bare_params, strict=True):
        bare.state[q] = {
            k: v.float().clone() for k, v in optimizer.state[p].items() if k != "master"
        }
    assert_same([optimizer.state[p]["exp_avg"] for p in params], moments)
    give_grads(params, 2)
    give_grads(bare_params, 2, torch.bfloat16)
    optimizer.step()
    bare.step()
    assert_same(masters_of(optimizer), [q.detach() for q in bare_params])


# ---------------------------------------- clip, unscale, skip


def test_clip_equals_torch_on_fp32_parameters_bit_for_bit() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = mixprec.MixedPrecision(AdamW(ours), max_grad_norm=0.5)
    bare = AdamW(theirs)
    for step in range(3):
        give_grads(ours, step)
        give_grads(theirs, step)
        optimizer.step()
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        bare.step()
        assert optimizer.metrics()["grad_norm"] == norm.item()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])


def test_clip_of_fp16_gradients_whose_norm_leaves_fp16() -> None:
    """Torch's own clipping turns such gradients into zeros without a word."""
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 3000.0)
    assert torch.isinf(nn.utils.get_total_norm([weight.grad]))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == pytest.approx(3000 * 1000**0.5)
    assert masters_of(optimizer)[0].norm().item() == pytest.approx(1.0)


def test_finite_gradients_whose_squares_leave_fp32_are_not_an_overflow() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), max_grad_norm=1.0)
    weight.grad = torch.full_like(weight, 2.0**100)
    assert torch.isinf(grad_norm([weight.grad]))
    optimizer.step()
    assert optimizer.grads_finite
    assert_same(masters_of(optimizer)[0], torch.full((4,), -0.5))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("dtype", "masters"), [*STORAGES, (torch.float32, "auto")])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_skipped_step_is_the_identity(
    fused: bool, dtype: torch.dtype, masters: Masters, poison: float
) -> None:
    params = parameters(dtype)
    optimizer = mixprec.MixedPrecision(
        AdamW(params, lr=1e-2, fused=fused), masters=masters, loss_scaler=scaled()
    )
    scaler = optimizer.loss_scaler
    assert scaler is not None
    for step in range(3):
        scaler.multiply(torch.zeros(()))  # pyright: ignore[reportAttributeAccessIssue]
        give_grads(params, step)
        optimizer.step()
    before = everything(optimizer)
    scaler.multiply(torch.zeros(()))  # pyright: ignore[reportAttributeAccessIssue]
    give_grads(params, 3)
    grad = params[3].grad
    assert grad is not None
    grad[1, 2] = poison
    optimizer.step()
    assert_same(everything(optimizer), before)
    assert not optimizer.grads_finite
    assert optimizer.metrics()["skipped_steps"] == 1.0
    assert scaler.get_scale() == 2.0**9


def scaled() -> mixprec.DynamicLossScaler:
    return mixprec.DynamicLossScaler(init_scale=2.0**10)


def test_fused_rule_keeps_nothing_of_what_told_it_to_skip() -> None:
    optimizer, params = wrapped()
    optimizer = mixprec.MixedPrecision(AdamW(params, fused=True))
    train(optimizer, params, range(3))
    assert not hasattr(optimizer.inner, "found_inf")
    assert not hasattr(optimizer.inner, "grad_scale")


def test_skip_of_the_very_first_step_leaves_no_state_behind() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0, momentum=0.9, fused=True))
    weight.grad = torch.full_like(weight, float("nan"))
    with pytest.warns(RuntimeWarning, match="gradients are not finite in .*the step was skipped"):
        optimizer.step()
    assert not optimizer.state
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [0.0] * 3


def test_skips_without_a_scaler_warn_once_and_raise_when_nothing_else_happens() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([("head", weight)], lr=1.0))
    weight.grad = torch.full_like(weight, float("inf"))
    with pytest.warns(RuntimeWarning, match="gradients are not finite in 'head'") as warned:
        for _ in range(49):
            optimizer.step()
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with pytest.raises(FloatingPointError, match=r"50 steps in a row were skipped.*'head'"):
        optimizer.step()


def test_on_nonfinite_raise_names_the_parameter_and_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = mixprec.MixedPrecision(
        AdamW([("block.w", weight)], fused=True), on_nonfinite="raise"
    )
    train(optimizer, [weight], range(2))
    before = everything(optimizer)
    weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite in 'block\.w'; nothing was updated"):
        optimizer.step()
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponent", [0, 8, 16])
def test_power_of_two_loss_scale_leaves_no_trace(dtype: torch.dtype, exponent: int) -> None:
    def run(loss_scaler: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
        optimizer = mixprec.MixedPrecision(
            AdamW(model.parameters(), lr=1e-2), loss_scaler=loss_scaler, max_grad_norm=0.1
        )
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 6).to(dtype)).float().square().mean()
            (loss if loss_scaler is None else loss_scaler.multiply(loss)).backward()
            optimizer.step()
        return masters_of(optimizer)

    scaler = mixprec.StaticLossScaler(2.0**exponent)
    assert_same(run(scaler), run(None))


def test_grad_factor_multiplies_in_fp32_whether_number_or_tensor() -> None:
    grad = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    for factor in (1 / 3, torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(1 / 3)):
        weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0))
        weight.grad = grad.clone()
        optimizer.step(grad_factor=factor)
        expected = grad.float() * torch.tensor(1 / 3)
        assert_same(masters_of(optimizer)[0], -expected)
        assert_same(weight.grad, grad)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("factor", [0.0, torch.zeros((), dtype=torch.float64)])
def test_zero_grad_factor_is_an_empty_window_and_no_overflow(fused: bool, factor: Any) -> None:
    params = parameters(torch.float16)
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**4, growth_interval=4)
    optimizer = mixprec.MixedPrecision(AdamW(params, fused=fused), loss_scaler=scaler)
    for step in range(2):
        scaler.multiply(torch.zeros(()))
        give_grads(params, step)
        optimizer.step()
    before = everything(optimizer)
    scaler.multiply(torch.zeros(()))
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(grad_factor=factor)
    assert_same(everything(optimizer), before)
    assert optimizer.metrics()["skipped_steps"] == 0.0
    assert scaler.state_dict()["_growth_tracker"] == 2
    assert scaler.get_scale() == 2.0**4


def test_step_reads_one_scalar_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def spy(name: str) -> None:
        real: Callable[..., Any] = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(Tensor, name, counted)

    for fused, expected in ((False, ["item"]), (True, [])):
        params = parameters(torch.float16)
        scaler = scaled()
        optimizer = mixprec.MixedPrecision(
            SGD(params, lr=0.1, fused=fused, momentum=0.9), loss_scaler=scaler, max_grad_norm=1.0
        )
        for step in range(2):  # the second step is like all later ones
            scaler.multiply(torch.zeros(()))
            give_grads(params, step)
            for name in ("item", "__bool__", "__float__", "__int__") if step else ():
                spy(name)
            optimizer.step()
        found, reads = reads, []
        monkeypatch.undo()
        assert found == expected


# ---------------------------------------- an external GradScaler


class Driven(mixprec.MixedPrecision):
    """MixedPrecision with the switch on."""

    _step_supports_amp_scaling = True


def test_external_grad_scaler_drives_fp16_parameters() -> None:
    driven_params, plain_params = parameters(torch.float16), parameters(torch.float16)
    driven, plain = Driven(AdamW(driven_params)), mixprec.MixedPrecision(AdamW(plain_params))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        scaler.scale(torch.zeros(()))
        give_grads(driven_params, step)
        give_grads(plain_params, step)
        for p in driven_params:
            assert p.grad is not None
            p.grad.mul_(2.0**4)
        if step == 1:
            grad = driven_params[0].grad
            assert grad is not None
            grad[0, 0] = float("inf")
        else:
            plain.step(grad_factor=2.0**4 / scaler.get_scale())
        scaler.step(driven)
        scaler.update()
    assert_same(masters_of(driven), masters_of(plain))
    assert scaler.get_scale() == 2.0**7


def test_external_grad_scaler_works_with_fp32_parameters_as_with_any_optimizer() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, bare = mixprec.MixedPrecision(AdamW(ours)), AdamW(theirs)
    for params, stepped in ((ours, optimizer), (theirs, bare)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(3):
            scaler.scale(torch.zeros(()))
            give_grads(params, step)
            scaler.step(stepped)
            scaler.update()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])


def test_two_scalers_are_an_error() -> None:
    params = parameters(torch.float16)
    driven = Driven(AdamW(params), loss_scaler=mixprec.DynamicLossScaler())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"would be unscaled twice\. Drop one of the two"):
        scaler.step(driven)
    with pytest.raises(TypeError, match=r"loss_scaler is a torch\.amp\.GradScaler"):
        mixprec.MixedPrecision(AdamW(params), loss_scaler=torch.amp.GradScaler("cpu"))  # pyright: ignore[reportArgumentType]


def test_forgotten_loss_scale_is_an_error_that_says_what_to_call() -> None:
    params = parameters(torch.float16)
    optimizer = mixprec.MixedPrecision(AdamW(params), loss_scaler=mixprec.DynamicLossScaler())
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"no loss was scaled.*65536\.0.*multiply\(loss\)"):
        optimizer.step()
    assert optimizer.loss_scaler is not None
    optimizer.loss_scaler.multiply(torch.zeros(()))  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    with pytest.raises(RuntimeError, match="no loss was scaled since the last step"):
        optimizer.step()


# ---------------------------------------- closures and hooks


def test_closure_runs_once_with_the_models_parameters_in_place() -> None:
    params = parameters(torch.bfloat16)
    optimizer = mixprec.MixedPrecision(AdamW(params))
    calls: list[bool] = []

    def closure() -> float:
        calls.append(optimizer.param_groups[0]["params"] == params and torch.is_grad_enabled())
        optimizer.zero_grad()
        give_grads(params, 0)
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert calls == [True]
    assert optimizer.state[params[0]]["step"] == 1


def test_closure_that_a_trainer_made_is_told_of_too() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), loss_scaler=scaled())
    with pytest.raises(RuntimeError, match=r"Where a trainer made the closure .* training step"):
        optimizer.step(lambda: 1.0)


def test_closure_that_does_not_scale_is_an_error() -> None:
    params = parameters(torch.float16)
    optimizer = mixprec.MixedPrecision(AdamW(params), loss_scaler=mixprec.DynamicLossScaler())
    with pytest.raises(RuntimeError, match="the closure differentiated a loss that it did not"):
        optimizer.step(lambda: 0.0)


def lbfgs_fit(loss_scaler: Any = None) -> tuple[mixprec.MixedPrecision, list[float]]:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    target = torch.tensor([0.5, -1.0, 2.0, 0.25])
    inner = torch.optim.LBFGS([weight], lr=0.5, max_iter=5)
    optimizer = mixprec.MixedPrecision(inner, loss_scaler=loss_scaler)
    losses: list[float] = []

    def closure() -> Tensor:  # torch's LBFGS calls float() on it
        assert optimizer.param_groups[0]["params"][0] is weight
        optimizer.zero_grad()
        loss = (weight.float() - target).square().sum()
        (loss if loss_scaler is None else loss_scaler.multiply(loss)).backward()
        losses.append(loss.item())
        return loss

    for _ in range(4):
        optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return optimizer, losses


def test_lbfgs_sees_updated_weights_in_its_closure() -> None:
    _, losses = lbfgs_fit()
    assert losses[-1] < 1e-5
    assert losses[0] > losses[2] > losses[-1]


def test_lbfgs_unscales_every_evaluation() -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**5)
    (left, _), (right, _) = lbfgs_fit(scaler), lbfgs_fit()
    assert_same(masters_of(left), masters_of(right))


def test_lbfgs_without_a_closure_is_an_error() -> None:
    params = parameters(torch.bfloat16)
    optimizer = mixprec.MixedPrecision(torch.optim.LBFGS(params))
    with pytest.raises(TypeError, match="LBFGS evaluates the loss itself: pass a closure"):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        (
            torch.bfloat16,
            {"fused": True},
            "fused=True, but LBFGS cannot run as one kernel: it call",
        ),
        (
            torch.bfloat16,
            {"state_formats": "8bit"},
            "state_formats='8bit', but LBFGS cannot run as",
        ),
        (torch.float32, {"fused": True}, "fused=True, but LBFGS cannot run as one kernel: "),
    ],
)
def test_a_rule_that_calls_its_closure_is_not_fused_in_silence(
    dtype: torch.dtype, options: dict[str, Any], said: str
) -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = mixprec.MixedPrecision(torch.optim.LBFGS([weight]), **options)

    def closure() -> Tensor:
        weight.grad = torch.ones_like(weight)
        return torch.tensor(1.0)

    assert said in optimizer.explain()
    with pytest.raises(TypeError, match=re.escape(said)):
        optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert bool((weight == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closure_may_look_at_the_state_of_the_rule(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = mixprec.MixedPrecision(torch.optim.LBFGS([param], lr=0.125, max_iter=3))

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.float().square().sum()
        loss.backward()
        optimizer.inner.state_dict()
        return loss.item()

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and optimizer.state_dict()["state"]


def test_a_rule_that_diverges_inside_its_step_is_stopped_unless_told_to_go_on() -> None:
    def run(wrapped: bool, **options: Any) -> Tensor:
        weight = nn.Parameter(torch.ones(3))
        optimizer: Any = torch.optim.LBFGS([weight], lr=1.0, max_iter=30)
        if wrapped:
            optimizer = mixprec.MixedPrecision(optimizer, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -(weight**4).sum()  # without a lower bound
            loss.backward()
            return loss.detach()

        for _ in range(3):
            optimizer.step(closure)
        return weight.detach()

    bare = run(wrapped=False)
    assert not bool(bare.isfinite().any())
    assert torch.equal(bare.isnan(), run(wrapped=True, on_nonfinite="ignore").isnan())
    with pytest.raises(FloatingPointError, match=r"of the closure in one step of LBFGS: it gave"):
        run(wrapped=True)


def test_lbfgs_skips_a_first_evaluation_that_overflows_and_refuses_a_later_one() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    inner = torch.optim.LBFGS([("w", weight)], lr=1.0, max_iter=4)
    optimizer = mixprec.MixedPrecision(inner, on_nonfinite="skip")
    evaluations = 0
    bad = 1

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        weight.grad = torch.full_like(weight, float("nan") if evaluations == bad else 1.0)
        return torch.tensor(float(evaluations))

    with pytest.warns(RuntimeWarning, match="the step was skipped"):
        loss = optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert weight.tolist() == [1.0, 1.0] and evaluations == 1 == loss
    evaluations, bad = 0, 2
    with pytest.raises(FloatingPointError, match=r"evaluation 2 of the closure.* in w"):
        optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert optimizer.param_groups[0]["params"][0] is weight


def test_every_hook_fires_once_whoever_it_was_registered_on() -> None:
    params = parameters(torch.bfloat16)
    inner = AdamW(params)
    fired: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: fired.append(name)

    inner.register_step_pre_hook(note("inner before"))
    optimizer = mixprec.MixedPrecision(inner, bucket_numel=8)
    optimizer.register_step_pre_hook(note("outer before"))
    inner.register_step_post_hook(note("inner after"))
    optimizer.register_step_post_hook(note("outer after"))
    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
    ]
    give_grads(params, 0)
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert sorted(fired) == sorted(
        f"{who} {when}" for who in ("inner", "outer", "global") for when in ("before", "after")
    )
    fired.clear()
    optimizer.register_state_dict_pre_hook(note("saving"))
    optimizer.register_state_dict_post_hook(note("saved"))
    optimizer.register_load_state_dict_pre_hook(note("loading"))
    optimizer.register_load_state_dict_post_hook(note("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == ["saving", "saved", "loading", "loaded"]


def test_step_of_a_rule_that_calls_its_parents_step_fires_hooks_once() -> None:
    class Child(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    params = parameters(torch.bfloat16)
    optimizer = mixprec.MixedPrecision(Child(params), bucket_numel=8)
    fired: list[int] = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    train(optimizer, params, range(2))
    assert fired == [1, 1]


# ---------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        o, 2
    ),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 1e-3, 1e-1, step_size_up=2, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-1, total_steps=10),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [2],
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ExponentialLR(o, 0.9), torch.optim.lr_scheduler.StepLR(o, 2)]
    ),
}


@pytest.mark.parametrize("attach", ["wrapper", "inner after", "inner before"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_acts_wherever_it_is_attached(name: str, attach: str) -> None:
    params, bare_params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    fp32 = [nn.Parameter(p.detach().float()) for p in bare_params]
    inner, bare = AdamW(params, lr=0.1), AdamW(fp32, lr=0.1)
    make = SCHEDULERS[name]
    if attach == "inner before":
        schedule = make(inner)
        optimizer = mixprec.MixedPrecision(inner)
    else:
        optimizer = mixprec.MixedPrecision(inner)
        schedule = make(optimizer if attach == "wrapper" else inner)
    bare_schedule = make(bare)
    for step in range(5):
        give_grads(params, step)
        give_grads(fp32, step, torch.bfloat16)
        optimizer.step()
        bare.step()
        schedule.step()
        bare_schedule.step()
        assert optimizer.param_groups[0]["lr"] == bare.param_groups[0]["lr"]
    assert_same(masters_of(optimizer), [p.detach() for p in fp32])


def test_plateau_scheduler_and_averaging_work_on_the_wrapper() -> None:
    optimizer, params = wrapped()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        train(optimizer, params, range(1))
        plateau.step(1.0)
    assert optimizer.inner.param_groups[0]["lr"] < 1e-2


def test_tensor_learning_rate_is_followed_and_keeps_its_identity() -> None:
    params = parameters(torch.bfloat16)
    lr = torch.tensor(0.1)
    optimizer = mixprec.MixedPrecision(AdamW(params, lr=lr), bucket_numel=8)
    train(optimizer, params, range(2))
    before = masters_of(optimizer)
    lr.fill_(0.0)
    train(optimizer, params, range(2, 3))
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same(masters_of(optimizer), before)


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
@pytest.mark.parametrize(
    "what", ["mixprec.optimizer.master_run.nn.Parameter", "torch._foreach_copy_"]
)
def test_running_out_of_memory_in_a_step_loses_no_master(
    dtype: torch.dtype, masters: Masters, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a rule with state of its own and for one whose masters are all there is."""
    for momentum in (0.0, 0.9):
        params = parameters(dtype)
        inner = SGD(params, lr=0.01, momentum=momentum)
        optimizer = mixprec.MixedPrecision(inner, masters=masters, bucket_numel=64)
        train(optimizer, params, range(2))
        before = everything(optimizer)
        with monkeypatch.context() as context, pytest.raises(MemoryError):
            context.setattr(what, fails)
            train(optimizer, params, range(2, 3))
        assert_same(everything(optimizer), before)
        train(optimizer, params, range(2, 3))


def fails(*_: Any, **__: Any) -> None:
    raise MemoryError


# ---------------------------------------- edits from outside


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
def test_model_checkpoint_loaded_before_the_first_step_is_what_masters_start_from(
    dtype: torch.dtype, masters: Masters
) -> None:
    model = nn.Linear(3, 2).to(dtype)
    optimizer = mixprec.MixedPrecision(SGD(model.parameters(), lr=0.0), masters=masters)
    model.load_state_dict({k: torch.full_like(v, 0.75) for k, v in model.state_dict().items()})
    give_grads(list(model.parameters()), 0)
    optimizer.step()
    assert all((m == 0.75).all() for m in masters_of(optimizer))


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
def test_untouched_masters_keep_their_bits_when_the_model_is_loaded_again(
    dtype: torch.dtype, masters: Masters
) -> None:
    model = nn.Linear(6, 5).to(dtype)
    params = list(model.parameters())
    optimizer = mixprec.MixedPrecision(AdamW(params, lr=1e-2), masters=masters)
    train(optimizer, params, range(3))
    before = masters_of(optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_same(masters_of(optimizer), before)
    give_grads(params, 3)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert_same(masters_of(optimizer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edited_weights_are_noticed_and_the_others_keep_their_bits(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype))
    inner = AdamW([("w", weight)], lr=1e-2)
    optimizer = mixprec.MixedPrecision(inner, masters="full")
    train(optimizer, [weight], range(3))
    before = masters_of(optimizer)[0]
    with torch.no_grad():
        weight[:8] = 3.0
    assert_same(masters_of(optimizer)[0][:8], torch.full((8,), 3.0))
    optimizer.param_groups[0]["lr"] = 0.0
    give_grads([weight], 3)
    with pytest.warns(RuntimeWarning, match=r"w was written outside of step\(\)"):
        optimizer.step()
    after = masters_of(optimizer)[0]
    assert_same(after[:8], torch.full((8,), 3.0))
    assert_same(after[8:], before[8:])
    train(optimizer, [weight], range(4, 6))


def test_weights_that_nobody_wrote_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = wrapped(masters="full")
    train(optimizer, params, range(2))
    monkeypatch.setattr("mixprec.optimizer.masters.agree", None)
    train(optimizer, params, range(2, 4))


def test_adagrad_starts_from_its_initial_value_in_fp32() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    inner = torch.optim.Adagrad([weight], initial_accumulator_value=0.1)
    optimizer = mixprec.MixedPrecision(inner)
    assert optimizer.state[weight]["sum"].tolist() == torch.full((2,), 0.1).tolist()


def test_split_masters_follow_edits_and_a_pruned_weight_is_exactly_zero() -> None:
    weight = nn.Parameter(torch.randn(256, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1e-2), masters="split")
    train(optimizer, [weight], range(3))
    before = masters_of(optimizer)[0]
    weight.data[:128] = 0.0  # torch counts no version for a write through .data
    weight.data[128:130] = 5.0
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [weight], range(3, 5))
    after = masters_of(optimizer)[0]
    # A remainder that zero cannot have counts as 0; one that it can have stays a subnormal.
    assert (after[:128].abs() < 2.0**-126).all() and (weight[:128] == 0).all()
    assert (after[128:130] - 5.0).abs().max() <= 2.0**-6  # half of the spacing at 5
    assert_same(after[130:], before[130:])


def test_adopt_params_reads_full_masters_again_where_weights_were_written_and_no_others() -> None:
    for dtype, masters in STORAGES:
        if masters == "split" or dtype == torch.float32:
            continue
        optimizer, params = wrapped(dtype, masters=masters)
        train(optimizer, params, range(3))
        before = masters_of(optimizer)
        for p in params:
            p.data.view(-1)[0] = 0.5
        optimizer.adopt_params()
        for p, master, old in zip(params, masters_of(optimizer), before, strict=True):
            assert master.view(-1)[0] == 0.5 and p.view(-1)[0] == 0.5
            assert torch.equal(master.view(-1)[1:], old.view(-1)[1:])


@pytest.mark.parametrize("masters", ["full", "split"])
def test_adopt_params_at_every_step_loses_no_update(masters: Any) -> None:
    weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=2.0**-12), masters=masters)
    for _ in range(1024):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.adopt_params([weight])
    assert weight == 0.75


def test_weight_averaging_swap_loses_no_bits() -> None:
    """Weights go out, an average comes in, and the same weights come back."""
    for dtype, masters in STORAGES:
        optimizer, params = wrapped(dtype, masters=masters)
        train(optimizer, params, range(3))
        before = masters_of(optimizer)
        own = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.fill_(0.125)
            for p, value in zip(params, own, strict=True):
                p.copy_(value)
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, params, range(3, 4))
        assert_same(masters_of(optimizer), before)


def test_changed_dtype_is_refused_by_name_and_nothing_is_updated() -> None:
    for convert, was, now in (("half", "bfloat16", "float16"), ("float", "bfloat16", "float32")):
        model = nn.Linear(2, 2, dtype=torch.bfloat16)
        optimizer = mixprec.MixedPrecision(AdamW(model.named_parameters()))
        train(optimizer, list(model.parameters()), range(1))
        getattr(model, convert)()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=f"weight was torch.{was} .* is torch.{now} now"):
            train(optimizer, list(model.parameters()), range(1, 2))
        assert_same(model.state_dict(), before)


# ---------------------------------------- masters in the model


def test_looking_at_masters_leaves_the_gradient_mode_alone() -> None:
    (left, _), (right, _) = wrapped(), wrapped()
    modes = [torch.is_grad_enabled() for _ in zip(left.masters(), right.masters(), strict=True)]
    assert all(modes) and torch.is_grad_enabled()
    assert not any(master.requires_grad for _, master in left.masters())


def test_masters_in_model_reach_through_fp32_islands() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    fp32 = copy.deepcopy(model)
    mixprec.cast_model(model, "bf16")
    optimizer = mixprec.MixedPrecision(AdamW(model.parameters()))
    optimizer.load_fp32_state_dict(model, fp32.state_dict())
    tokens = torch.arange(7)
    with optimizer.masters_in_model():
        assert_same(model(tokens).detach(), fp32(tokens).detach())
    assert model(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
def test_masters_in_model_evaluates_in_fp32_and_puts_everything_back(
    dtype: torch.dtype, masters: Masters
) -> None:
    model = nn.Linear(6, 5).to(dtype)
    optimizer = mixprec.MixedPrecision(AdamW(model.parameters(), lr=1e-2), masters=masters)
    train(optimizer, list(model.parameters()), range(3))
    before = everything(optimizer)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with optimizer.masters_in_model():
        inside = model(x)
    weight, bias = before[1]
    assert_same(inside.detach(), nn.functional.linear(x, weight, bias))
    assert model.weight.dtype == dtype
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
@pytest.mark.parametrize("stepped", [False, True])
def test_edits_inside_masters_in_model_are_kept(
    dtype: torch.dtype, masters: Masters, stepped: bool
) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.0), masters=masters)
    if stepped:
        train(optimizer, [weight], range(1))
    with optimizer.masters_in_model(), torch.no_grad():
        weight.add_(1e-4)
    assert_same(masters_of(optimizer)[0], torch.full((3,), 1.0) + 1e-4)
    train(optimizer, [weight], range(1, 2))
    assert_same(masters_of(optimizer)[0], torch.full((3,), 1.0) + 1e-4)


def test_step_inside_masters_in_model_is_an_error() -> None:
    optimizer, params = wrapped()
    give_grads(params, 0)
    with (
        pytest.raises(RuntimeError, match=r"step\(\) inside masters_in_model\(\)"),
        optimizer.masters_in_model(),
    ):
        optimizer.step()


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
def test_fp32_state_dict_round_trips_every_bit(dtype: torch.dtype, masters: Masters) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)
    optimizer = mixprec.MixedPrecision(AdamW(model.parameters(), lr=1e-2), masters=masters)
    train(optimizer, list(model.parameters()), range(3))
    saved = {k: v.clone() for k, v in optimizer.fp32_state_dict(model).items()}
    assert {v.dtype for v in saved.values()} == {torch.float32, torch.int64}
    fresh = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)
    loaded = mixprec.MixedPrecision(AdamW(fresh.parameters(), lr=1e-2), masters=masters)
    loaded.load_fp32_state_dict(fresh, saved)
    assert not loaded.state, "masters wait until the rule has made its state"
    assert_same(loaded.fp32_state_dict(fresh), saved)
    loaded.param_groups[0]["lr"] = 0.0
    train(loaded, list(fresh.parameters()), range(1))
    assert_same(loaded.fp32_state_dict(fresh), saved)
    for p, m in loaded.masters():
        rounded = formats.split(m)[0] if masters == "split" else m.to(dtype)
        assert_same(p.detach(), rounded)


def test_fp32_state_dict_of_the_wrong_model_is_refused_and_nothing_changes() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = mixprec.MixedPrecision(SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Linear holds none of this optimizer's parameters"):
        optimizer.fp32_state_dict(nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    saved = optimizer.fp32_state_dict(model)
    with pytest.raises(ValueError, match=r"lacks \['weight'\] and has \['weights'\]"):
        optimizer.load_fp32_state_dict(model, {"bias": saved["bias"], "weights": saved["weight"]})
    with pytest.raises(ValueError, match=r"'weight' is \[3\] in the state dict and \[2, 2\]"):
        optimizer.load_fp32_state_dict(model, {**saved, "weight": torch.zeros(3)})
    assert_same(model.state_dict(), before)


# ---------------------------------------- copies


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_bit_for_bit(dtype: torch.dtype, masters: Masters, clone: str) -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**3)
    params = parameters(dtype)
    optimizer = mixprec.MixedPrecision(
        AdamW(params, lr=1e-2), masters=masters, loss_scaler=scaler, max_grad_norm=1.0
    )
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(3):
        scaler.multiply(torch.zeros(()))
        give_grads(params, step)
        optimizer.step()
    other, other_params = copied((optimizer, params), clone)
    assert other.param_groups[0]["params"][0] is other_params[0]
    assert other.loss_scaler is not scaler
    for o, ps in ((optimizer, params), (other, other_params)):
        assert o.loss_scaler is not None
        o.loss_scaler.multiply(torch.zeros(()))  # pyright: ignore[reportAttributeAccessIssue]
        give_grads(ps, 3)
        o.step()
    assert_same(everything(other), everything(optimizer))
    assert other.metrics() == optimizer.metrics()


def copied(value: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(value)
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_deepcopy_of_lbfgs_keeps_working() -> None:
    """Torch's own copy of LBFGS loses the parameters that it keeps outside of its groups."""
    optimizer, losses = lbfgs_fit()
    copy.deepcopy(optimizer)
    assert losses


# ---------------------------------------- one weight, one wrapper


def test_only_the_newest_wrapper_of_a_parameter_may_step() -> None:
    params = parameters(torch.bfloat16)
    older = mixprec.MixedPrecision(AdamW([("w", params[0])]))
    newer = mixprec.MixedPrecision(AdamW([("w", params[0])]))
    train(newer, params, range(1))
    with pytest.raises(RuntimeError, match="'w' was given to a MixedPrecision created later"):
        older.step()


def test_wrapper_that_is_gone_blocks_nobody() -> None:
    params = parameters(torch.bfloat16)
    older = mixprec.MixedPrecision(AdamW(params))
    del older
    gc.collect()
    train(mixprec.MixedPrecision(AdamW(params)), params, range(1))


# ---------------------------------------- bad input


def test_not_an_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"instance of torch\.optim\.Optimizer, not list"):
        mixprec.MixedPrecision([])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"not AdamW\. Call the class first"):
        mixprec.MixedPrecision(AdamW)  # pyright: ignore[reportArgumentType]


def test_optimizer_that_borrows_its_groups_is_refused() -> None:
    class Borrower(SGD):
        def __init__(self, base: SGD) -> None:
            self.base = base

        @property
        def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
            return self.base.param_groups

    with pytest.raises(TypeError, match="Borrower has no param_groups and state of its own"):
        mixprec.MixedPrecision(Borrower(SGD(parameters(torch.bfloat16), lr=0.1)))


def test_wrapper_inside_a_wrapper_is_refused() -> None:
    optimizer, _ = wrapped()
    with pytest.raises(TypeError, match="is a MixedPrecision already"):
        mixprec.MixedPrecision(optimizer)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"masters": "none"}, "masters='none'; use 'auto', 'full' or 'split'"),
        ({"on_nonfinite": "allow"}, "on_nonfinite='allow'; use 'skip', 'raise' or 'ignore'"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0; it is the L2 norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan; it is the L2 norm"),
        ({"bucket_numel": 0}, "bucket_numel=0; it is a number of elements"),
        ({"bucket_numel": 1.5}, r"bucket_numel=1\.5; it is a number of elements"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        wrapped(**options)


def test_split_of_fp16_or_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params'\]\[0\] \(8x6\) is float16: 16 more bits cannot"):
        wrapped(torch.float16, masters="split")
    with pytest.raises(ValueError, match="no parameter is bfloat16"):
        wrapped(torch.float32, masters="split")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_parameters_that_no_master_helps_are_refused(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.float32).to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"is {name}; FP32 masters exist for"):
        mixprec.MixedPrecision(SGD([param], lr=0.1))


def test_sharded_parameters_are_refused_by_name() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight._local_tensor = torch.zeros(2)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match=r"head is a DTensor: .*MixedPrecisionPolicy"):
        mixprec.MixedPrecision(SGD([("head", weight)], lr=0.1))


def test_overlapping_parameters_are_refused() -> None:
    buffer = torch.zeros(8, dtype=torch.bfloat16)
    left, right = nn.Parameter(buffer[:5]), nn.Parameter(buffer[4:])
    with pytest.raises(ValueError, match="left and right overlap in memory"):
        mixprec.MixedPrecision(SGD([("left", left), ("right", right)], lr=0.1))
    expanded = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(3))
    with pytest.raises(ValueError, match="is an expanded tensor"):
        mixprec.MixedPrecision(SGD([expanded], lr=0.1))
    halves = nn.Parameter(buffer[:4]), nn.Parameter(buffer[4:])
    mixprec.MixedPrecision(SGD(list(halves), lr=0.1))


def test_parameters_of_lazy_modules_are_refused_until_they_are_made() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that lazy modules are new
        lazy = nn.Sequential(nn.LazyLinear(2))
    for params, name in (
        (lazy.parameters(), r"param_groups\[0\]\['params'\]\[0\]"),
        (lazy.named_parameters(), r"0\.weight"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not initialised.*Run one batch"):
            mixprec.MixedPrecision(SGD(params, lr=1.0))
    optimizer = mixprec.MixedPrecision(SGD([nn.Parameter(torch.ones(2))], lr=1.0))
    with pytest.raises(ValueError, match="is not initialised"):
        optimizer.add_param_group({"params": list(lazy.parameters())})
    assert len(optimizer.param_groups) == 1
    lazy(torch.ones(1, 3))
    mixprec.MixedPrecision(SGD(lazy.parameters(), lr=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_without_elements_can_be_clipped(dtype: torch.dtype) -> None:
    """As a rank of many may hold nothing of a model."""
    params = [nn.Parameter(torch.ones(0, 3, dtype=dtype)), nn.Parameter(torch.ones(0, dtype=dtype))]
    optimizer = mixprec.MixedPrecision(AdamW(params), max_grad_norm=1.0)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.grads_finite and optimizer.metrics()["grad_norm"] == 0.0
    assert optimizer.metrics()["steps"] == 2


def test_a_rate_of_none_is_no_number_to_look_at() -> None:
    """Some rules take their rate from elsewhere."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1.0), loss_scaler=scaled())
    optimizer.param_groups[0]["lr"] = None
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="no loss was scaled since the last step"):
        optimizer.step()


def test_nan_in_weights_is_refused_before_the_first_step() -> None:
    weight = nn.Parameter(torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([("emb.weight", weight)], lr=0.1))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"emb\.weight holds NaN in 1 of 2 elements"):
        optimizer.step()
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer.step()


def test_sparse_gradients_of_a_dense_rule_are_refused_by_name() -> None:
    table = nn.Embedding(6, 2, sparse=True, dtype=torch.bfloat16)
    optimizer = mixprec.MixedPrecision(AdamW([("table", table.weight)]))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of table is sparse and AdamW does not take"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("masters", ["full", "split"])
@pytest.mark.parametrize("sparse_dims", [1, 2])
def test_sparse_gradients_reach_the_elements_that_they_name(sparse_dims: int, masters: Any) -> None:
    weights = [nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = mixprec.MixedPrecision(SGD(weights, lr=0.25), masters=masters)
    for place, weight in enumerate(weights):
        grad = torch.zeros(4, 2, dtype=torch.bfloat16)
        grad[place] = 1.0
        weight.grad = grad.to_sparse(sparse_dims)
    optimizer.step()
    for place, (weight, master) in enumerate(optimizer.masters()):
        expected = torch.ones(4, 2)
        expected[place] = 0.75
        assert_same([weight.detach().float(), master], [expected, expected])


def test_split_masters_of_a_rule_that_couples_tensors_are_refused() -> None:
    params = parameters(torch.bfloat16)
    optimizer = mixprec.MixedPrecision(torch.optim.LBFGS(params), masters="split")
    with pytest.raises(TypeError, match=r"masters='split' keeps no FP32.*LBFGS.*masters='full'"):
        optimizer.step(lambda: 0.0)


# ---------------------------------------- what it says


def test_explain_says_how_the_rule_runs_and_why() -> None:
    params = [*parameters(torch.bfloat16), nn.Parameter(torch.zeros(3))]
    text = mixprec.MixedPrecision(AdamW(params), max_grad_norm=1.0).explain()
    assert "bucket by bucket: each tensor's update depends on that tensor alone" in text
    assert "5 bfloat16 tensors, 83 parameters: split masters, 2 B/param" in text
    assert "1 float32 tensor, 3 parameters: no masters" in text
    assert "clipped to norm 1.0" in text
    text = mixprec.MixedPrecision(torch.optim.LBFGS(parameters(torch.bfloat16))).explain()
    assert "whole: the rule sees all masters at once, because it calls its closure itself" in text
    assert "FP32 masters, 4 B/param" in text
    assert "the rule runs as it is" in mixprec.MixedPrecision(SGD([params[-1]], lr=1.0)).explain()


def test_explain_prints_the_rule_as_a_formula_or_why_it_is_none() -> None:
    params = parameters(torch.bfloat16)
    sgd = SGD([{"params": params[:1]}, {"params": []}, {"params": params[1:2]}], lr=0.1)
    text = mixprec.MixedPrecision(sgd).explain(formula=True)
    assert "param_groups[0] computes\n    master' = master + s0 * grad" in text
    assert "param_groups[1]" not in text and "param_groups[2] computes" in text
    text = mixprec.MixedPrecision(torch.optim.Adafactor(params[3:4])).explain(formula=True)
    assert "param_groups[0] has no formula: its Python code looks at a number of the data" in text


def test_metrics_are_floats() -> None:
    scaler = mixprec.DynamicLossScaler(init_scale=4.0)
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.1), loss_scaler=scaler)
    scaler.multiply(torch.zeros(()))
    weight.grad = torch.tensor([12.0, 16.0], dtype=torch.float16)
    optimizer.step()
    assert optimizer.metrics() == {
        "grad_norm": 5.0,
        "steps": 1.0,
        "skipped_steps": 0.0,
        "skips_in_a_row": 0.0,
        "empty_steps": 0.0,
        "loss_scale": 4.0,
    }
    assert all(type(value) is float for value in optimizer.metrics().values())


def test_step_without_any_gradient_does_nothing() -> None:
    optimizer, params = wrapped()
    before = [p.detach().clone() for p in params]
    with pytest.warns(RuntimeWarning, match="none of the optimizer's 5 parameters has a gradient"):
        optimizer.step()
    assert_same([p.detach() for p in params], before)
    assert not optimizer.state


def test_init_state_is_the_state_before_a_first_step() -> None:
    for dtype, masters in [*STORAGES, (torch.float32, "auto")]:
        ready, ready_params = wrapped(dtype, masters=masters)
        lazy, lazy_params = wrapped(dtype, masters=masters)
        ready.init_state()
        assert all(set(ready.state[p]) >= {"step", "exp_avg"} for p in ready_params)
        assert {float(ready.state[p]["step"]) for p in ready_params} == {0.0}
        for optimizer, params in ((ready, ready_params), (lazy, lazy_params)):
            train(optimizer, params, range(3))
        assert_same(everything(ready), everything(lazy))
    with pytest.raises(RuntimeError, match="LBFGS makes its state from a closure's loss"):
        mixprec.MixedPrecision(torch.optim.LBFGS(parameters(torch.bfloat16))).init_state()


# Torch says so of every copy of an optimizer and its schedule.
@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step..:UserWarning")
@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_a_schedule_over_the_inner_rule_is_copied_with_it(
    copied: Any, schedule_first: bool
) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(AdamW([weight], lr=0.5))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.inner, 0.5)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [schedule, optimizer] if schedule_first else [optimizer, schedule]
    made: Any = copied(held)
    other, following = made[schedule_first], made[not schedule_first]
    assert following.optimizer is other.inner and other.inner is not optimizer.inner
    assert other.state is other.inner.state
    following.step()
    assert other.param_groups[0]["lr"] == 0.25 and optimizer.param_groups[0]["lr"] == 0.5


# ---------------------------------------- casts behind the optimizer's back

READS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "state_dict": lambda optimizer, model: optimizer.state_dict(),
    "masters": lambda optimizer, model: list(optimizer.masters()),
    "fp32_state_dict": lambda optimizer, model: optimizer.fp32_state_dict(model),
    "load_fp32_state_dict": lambda optimizer, model: optimizer.load_fp32_state_dict(
        model, {name: torch.ones(value.shape) for name, value in model.state_dict().items()}
    ),
    "masters_in_model": lambda optimizer, model: optimizer.masters_in_model().__enter__(),
    "adopt_params": lambda optimizer, model: optimizer.adopt_params(),
    "init_state": lambda optimizer, model: optimizer.init_state(),
    "deepcopy": lambda optimizer, model: copy.deepcopy(optimizer),
    "step": lambda optimizer, model: optimizer.step(),
}


def _cast_run(how: str, fused: bool) -> tuple[nn.Module, Any]:
    """A BF16 model whose masters are not its weights, however they came."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    optimizer = mixprec.MixedPrecision(AdamW(model.named_parameters(), lr=1e-3), fused=fused)
    if how == "fp32 weights":
        weights = {name: torch.rand(value.shape) for name, value in model.state_dict().items()}
        optimizer.load_fp32_state_dict(model, weights)
        return model, optimizer
    model(torch.ones(2, 4).bfloat16()).float().square().sum().backward()
    optimizer.step()
    if how == "loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = mixprec.MixedPrecision(AdamW(model.named_parameters(), lr=1e-3), fused=fused)
        optimizer.load_state_dict(saved)
    if how == "copied":
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    return model, optimizer


@pytest.mark.parametrize("how", ["stepped", "loaded", "copied", "fp32 weights"])
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.float64])
def test_nothing_is_read_from_masters_whose_parameters_were_cast(how: str, to: torch.dtype) -> None:
    for fused in (False, True)[: 1 + (how == "stepped")]:
        model, optimizer = _cast_run(how, fused)
        before = optimizer.fp32_state_dict(model)
        model.to(to)
        text = (
            rf"weight was torch\.bfloat16 when its optimizer state was made and is {to} now, so "
            r"its master is lost to it; nothing was done\. Cast it back, model\.to\(torch\.bfloat16"
            r"\), which is exact where it has become FP32\. For FP32 weights call "
            r"fp32_state_dict\(model\) before a cast"
        )
        for name, read in READS.items():
            if name == "step" and fused and to == torch.float64:
                continue  # refused for that alone
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            with pytest.raises(RuntimeError, match=text):
                read(optimizer, model)
        model.bfloat16()
        after = optimizer.fp32_state_dict(model)
        assert to == torch.float16 or all(torch.equal(after[key], before[key]) for key in before)


def test_fp32_parameters_that_were_cast_save_no_master() -> None:
    model = nn.Linear(4, 3)
    optimizer = mixprec.MixedPrecision(AdamW(model.parameters(), lr=1e-3))
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    model.half()  # to export it
    assert not any("master" in entry for entry in optimizer.state_dict()["state"].values())
