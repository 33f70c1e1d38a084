"""Linear cross-entropy: the gradient of full logits without them, nowhere worse than 16 bits."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import (
    BF16,
    FP16,
    FP32,
    FP64,
    OPTIONS,
    PADDING,
    case,
    error,
    filled,
    fp32_gradients,
    fp64_twins,
    full_logits,
    gradient_of,
    reference,
    seeded,
    trained_model,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's tests import says things of its own
    from torch.testing._internal import common_methods_invocations as torch_samples
    from torch.testing._internal import common_nn

from mixprec.accumulation import GradientAccumulator
from mixprec.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from mixprec.cross_entropy import chunks as logit_chunks
from mixprec.cross_entropy.chunks import default_chunk_size
from mixprec.loss_scaling import DynamicLossScaler, StaticLossScaler
from mixprec.optimizer import MixedPrecision


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize(
    "how", [{}, {"recompute": True}, {"reduction": "none"}], ids=["forward", "recompute", "none"]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_full_logits(
    name: str, how: dict[str, Any], chunk_size: int | None
) -> None:
    hidden, weight, targets = case()
    options = filled(OPTIONS[name], 37, 50, FP64)
    leaves = [hidden, weight] + ([options["bias"]] if "bias" in options else [])
    losses = reference(hidden, weight, targets, **options)
    if how.get("reduction") != "none":
        losses = losses.sum()
    root = torch.randn(losses.shape, generator=seeded(2), dtype=FP64)
    expected = torch.autograd.grad(losses, leaves, root)

    loss, count = linear_cross_entropy(
        hidden, weight, targets, chunk_size=chunk_size, **options, **how
    )
    torch.testing.assert_close(loss, losses, rtol=1e-12, atol=1e-12)
    assert count.dtype == torch.int64
    assert count == (targets != PADDING).sum()
    found = torch.autograd.grad(loss, leaves, root)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_finite_differences_agree(reduction: Any) -> None:
    hidden, weight, targets = case(5, 3, 6, padding=0.3)
    options = filled(OPTIONS["everything"], 5, 6, FP64)
    bias = options.pop("bias")

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, recompute=True, **options
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


TORCH_SAMPLES = list(
    getattr(torch_samples, "sample_inputs_linear_cross_entropy", lambda *_: [])(
        None, "cpu", FP64, True
    )
    if hasattr(nn, "LinearCrossEntropyOptions")
    else []
)


def inside_our_contract(sample: Any) -> bool:
    """No probabilities as targets, and no weight with more axes than [vocab, width]."""
    weight, target = sample.args
    return not target.dtype.is_floating_point and weight.dim() == 2


def test_samples_of_torch_agree_with_its_reference() -> None:
    if not TORCH_SAMPLES:
        pytest.skip("this torch has no linear_cross_entropy whose samples could be tried")
    tried = 0
    for sample in filter(inside_our_contract, TORCH_SAMPLES):
        weight, target = sample.args
        kwargs = dict(sample.kwargs)
        reduction = kwargs.pop("reduction", "mean")
        leaves = [t for t in (sample.input, weight, kwargs.get("linear_bias")) if t is not None]
        expected = common_nn.linear_cross_entropy_loss_reference(
            sample.input, weight, target, reduction=reduction, **kwargs
        )
        ignore_index = kwargs.get("ignore_index", -100)
        loss, count = linear_cross_entropy(
            sample.input,
            weight,
            target,
            bias=kwargs.get("linear_bias"),
            class_weight=kwargs.get("weight"),
            ignore_index=ignore_index,
            reduction="none" if reduction == "none" else "sum",
        )
        if reduction == "mean" and kwargs.get("weight") is not None:
            # Torch divides by the class weights of the targets; ours returns a count of tokens.
            loss = loss / kwargs["weight"][target[target != ignore_index]].sum()
        elif reduction == "mean":
            loss = loss / count
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), leaves),
            torch.autograd.grad(expected.sum(), leaves),
            rtol=1e-10,
            atol=1e-12,
        )
        tried += 1
    assert tried >= 20


# ------------------------------------------------------------------ details


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize(
    "how",
    [{}, {"recompute": True}, {"reduction": "none"}, {"shift": 1}],
    ids=["forward", "recompute", "none", "shift"],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_details_are_those_of_full_logits(
    name: str, how: dict[str, Any], chunk_size: int | None
) -> None:
    hidden, weight, targets = case()
    options = filled(OPTIONS[name], 37, 50, FP64)
    plain = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size, **options, **how)
    *found, details = linear_cross_entropy(
        hidden, weight, targets, chunk_size=chunk_size, return_details=True, **options, **how
    )
    assert_same(tuple(found), plain)
    leaves = [hidden, weight]
    assert_same(
        torch.autograd.grad(found[0].sum(), leaves), torch.autograd.grad(plain[0].sum(), leaves)
    )
    token_weight = options.get("token_weight", torch.ones(37, dtype=FP64))
    if "shift" in how:
        targets = F.pad(targets[1:], (0, 1), value=PADDING)
        token_weight = F.pad(token_weight[1:], (0, 1))
    kept = targets != PADDING
    logits = full_logits(hidden, weight, **options).detach()
    lse = logits.logsumexp(1).where(kept, 0.0)
    argmax = logits.argmax(1).where(kept, -1)
    torch.testing.assert_close(details.logsumexp, lse, rtol=1e-12, atol=1e-12)
    assert_same(details.argmax, argmax)
    assert_same(details.correct, (argmax == targets) & kept)
    squares = options.get("z_loss", 0.0) * lse.square() * token_weight
    torch.testing.assert_close(details.z_loss, squares.sum(), rtol=1e-12, atol=0)
    class_weight = options.get("class_weight", torch.ones(50, dtype=FP64))
    weights = (class_weight[targets.clamp(min=0)] * token_weight)[kept]
    torch.testing.assert_close(details.weight_sum, weights.sum(), rtol=1e-12, atol=0)
    assert not any(detail.requires_grad for detail in details)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_weight_sum_makes_the_mean_of_torch(label_smoothing: float) -> None:
    hidden, weight, targets = case()
    classes = torch.rand(50, generator=seeded(3), dtype=FP64) + 0.1
    loss_sum, num_tokens, details = linear_cross_entropy(
        hidden,
        weight,
        targets,
        class_weight=classes,
        label_smoothing=label_smoothing,
        return_details=True,
    )
    expected = F.cross_entropy(
        hidden @ weight.T, targets, weight=classes, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(loss_sum / details.weight_sum, expected, rtol=1e-12, atol=0)
    assert abs(loss_sum / num_tokens / expected - 1) > 0.1  # that is another mean


def test_details_have_the_shape_of_targets_and_know_nothing_of_padding() -> None:
    hidden, weight, targets = case(24)
    weights = torch.ones(24, dtype=FP64).masked_fill(targets == PADDING, torch.inf)
    _, count, flat = linear_cross_entropy(
        hidden, weight, targets, token_weight=weights, z_loss=0.1, return_details=True
    )
    assert count < 24 and flat.z_loss.isfinite() and flat.weight_sum == count
    nested = linear_cross_entropy(
        hidden.view(2, 12, 16), weight, targets.view(2, 12), z_loss=0.1, return_details=True
    )[2]
    for one, other in zip(nested[:3], flat[:3], strict=True):
        assert one.shape == (2, 12)
        assert_same(one.flatten(), other)
    assert_same(nested[3:], flat[3:])
    # A target of -1 as padding is no prediction of class -1.
    padded = targets.where(targets != PADDING, -1)
    options: dict[str, Any] = {"ignore_index": -1, "return_details": True}
    assert_same(linear_cross_entropy(hidden, weight, padded, **options)[2].correct, flat.correct)
    for tokens in (0, 5):
        hidden, weight, targets = case(tokens)
        targets.fill_(PADDING)
        found = linear_cross_entropy(hidden, weight, targets, return_details=True)[2]
        assert found.argmax.tolist() == [-1] * tokens and not found.correct.any()
        assert found.logsumexp.tolist() == [0.0] * tokens
        assert found.z_loss == 0 and found.weight_sum == 0


def test_argmax_is_the_first_of_equal_logits_and_that_of_the_exact_target_in_16_bits() -> None:
    hidden, weight, targets = torch.zeros(3, 2), torch.zeros(9, 2), torch.tensor([0, 3, 8])
    details = linear_cross_entropy(hidden, weight, targets, return_details=True)[2]
    assert details.argmax.tolist() == [0, 0, 0]
    assert details.correct.tolist() == [True, False, False]
    # 20 and 20.015625 are one number in BF16; the target's own is kept apart.
    hidden = torch.tensor([[1.0, 0.015625]], dtype=BF16)
    weight = torch.tensor([[20.0, 0.0], [20.0, 1.0]], dtype=BF16)
    details = linear_cross_entropy(
        hidden, weight, torch.tensor([1]), logits_dtype=BF16, return_details=True
    )[2]
    assert details.correct.item()


# ------------------------------------------------------------------ 16 bits against FP64

GRID = [
    (tokens, width, vocab, sharpness, padding)
    for (tokens, width, vocab), sharpness, padding in itertools.product(
        [(252, 507, 123), (512, 64, 2048), (33, 17, 1001)], [0.1, 1.0, 8.0], [0.0, 0.2]
    )
]


@pytest.mark.parametrize("wide_logits", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "width", "vocab", "sharpness", "padding"), GRID)
def test_no_error_is_larger_than_that_of_full_16_bit_logits(
    tokens: int,
    width: int,
    vocab: int,
    sharpness: float,
    padding: float,
    dtype: torch.dtype,
    wide_logits: bool,
) -> None:
    hidden, weight, targets = case(
        tokens, width, vocab, dtype, sharpness=sharpness, padding=padding
    )
    fp32_gradients(weight)
    exact = fp64_twins(hidden, weight)
    exact_loss = reference(exact[0], exact[1], targets).sum()
    exact_loss.backward()

    eager = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    logits = (eager[0] @ eager[1].T).float()
    eager_loss = F.cross_entropy(logits, targets, reduction="sum")
    eager_loss.backward()

    loss, _ = linear_cross_entropy(
        hidden, weight, targets, chunk_size=100, logits_dtype=FP32 if wide_logits else dtype
    )
    loss.backward()
    truth = exact_loss.item()
    if wide_logits:
        bound = abs(eager_loss.item() - truth) + 1e-7 * truth  # the spacing of the FP32 sums
        assert abs(loss.item() - truth) <= bound
    # Rounded logits err at random, and by luck their sum may come out small for one of the two. Of
    # single tokens both round the same logits, and ours that of the target less.
    each, _ = linear_cross_entropy(
        hidden,
        weight,
        targets,
        chunk_size=100,
        logits_dtype=FP32 if wide_logits else dtype,
        reduction="none",
    )
    assert abs(each.double().sum().item() - loss.item()) <= 1e-6 * truth
    exact_each = reference(exact[0], exact[1], targets)
    eager_each = F.cross_entropy(logits, targets, reduction="none")
    assert error(each, exact_each) <= error(eager_each, exact_each) + 1e-7
    for ours, plain, right in zip((hidden, weight), eager, exact, strict=True):
        # 2 %: on flat logits both round the same logit gradients, and luck differs by as much.
        assert error(ours.grad, right.grad) <= 1.02 * error(plain.grad, right.grad)
    # Rounding the result is 1.7e-3 in BF16; where the weight's rows cancel in the product, what the
    # logit gradients lost besides their targets shows too.
    if dtype == BF16 and wide_logits:
        assert error(hidden.grad, exact[0].grad) <= 2.2e-3


@pytest.mark.parametrize("how", [{}, {"reduction": "none"}], ids=["forward", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_hold_where_logits_are_16_bits_and_those_of_targets_apart(
    name: str, how: dict[str, Any]
) -> None:
    """As by default on a GPU."""
    hidden, weight, targets = case(100, dtype=BF16)
    options = filled(OPTIONS[name], 100, 50, BF16)
    fp32_gradients(hidden, weight)
    exact = fp64_twins(hidden, weight)
    wide: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()
    }
    losses = reference(exact[0], exact[1], targets, **wide)
    losses.sum().backward()
    loss, _, details = linear_cross_entropy(
        hidden, weight, targets, logits_dtype=BF16, return_details=True, **options, **how
    )
    loss.sum().backward()
    # A logit z rounds by up to 2^-9 |z|, so a loss moves by up to twice that, and so does the
    # logarithm of a probability. Results in BF16 round by 2^-9 more.
    multiplier = options.get("logit_multiplier", 1.0)
    products = (exact[0] @ exact[1].T).abs().max().item() * multiplier
    bound = 2.0**-8 * products + 2.0**-9
    expected = losses if how else losses.sum()
    assert error(loss, expected) <= bound
    assert error(hidden.grad, exact[0].grad) <= bound
    assert error(weight.grad, exact[1].grad) <= bound
    lse = full_logits(exact[0], exact[1], **wide).logsumexp(1).where(targets != PADDING, 0.0)
    assert (details.logsumexp - lse).abs().max() <= bound


@pytest.mark.parametrize(
    ("logits_dtype", "learnt", "by_hidden", "by_weight"),
    [
        (FP32, 4.5, 1.75e-3, 5e-5),
        (BF16, 4.5, 1.8e-3, 1e-4),
        (FP32, 12.0, 1.75e-3, 3e-4),
        (BF16, 12.0, 2.2e-3, 1.5e-3),
    ],
)
def test_errors_stay_within_their_bounds_on_a_model_that_has_learnt(
    logits_dtype: torch.dtype, learnt: float, by_hidden: float, by_weight: float
) -> None:
    """Rounding the hidden states' gradient to BF16 is 1.66e-3 of it; there is hardly more."""
    hidden, weight, targets = trained_model(learnt)
    fp32_gradients(weight)
    exact = fp64_twins(hidden, weight)
    exact_loss = reference(exact[0], exact[1], targets).sum()
    exact_loss.backward()
    loss, count = linear_cross_entropy(hidden, weight, targets, logits_dtype=logits_dtype)
    loss.backward()
    low, high = (2.5, 3.5) if learnt == 4.5 else (0.1, 0.3)
    assert low < loss / count < high
    assert abs(loss.item() / exact_loss.item() - 1) < (1e-6 if logits_dtype == FP32 else 1e-4)
    assert error(hidden.grad, exact[0].grad) <= by_hidden
    assert error(weight.grad, exact[1].grad) <= by_weight


def test_probability_of_an_unexpected_target_is_not_rounded_away() -> None:
    """Beside 1, a p of 1/1000 is less than half the spacing of BF16."""
    hidden = torch.ones(1, 1, dtype=BF16, requires_grad=True)
    weight = torch.ones(1000, 1, dtype=BF16, requires_grad=True)
    bias = torch.zeros(1000, dtype=BF16, requires_grad=True)
    fp32_gradients(hidden, weight, bias)
    linear_cross_entropy(hidden, weight, torch.tensor([7]), bias=bias)[0].backward()
    for leaf in (weight, bias):
        assert abs(gradient_of(leaf).flatten()[7] - (0.001 - 1)) < 1e-6
    # Of the others each is rounded, by up to 2^-9 of 1/1000, here all the same way.
    assert abs(gradient_of(hidden).item()) < 2e-3
    rounded = torch.full((999,), 0.001, dtype=FP32).bfloat16().float().sum() + (0.001 - 1)
    torch.testing.assert_close(gradient_of(hidden)[0, 0], rounded.bfloat16().float())


def test_loss_and_weight_gradient_do_not_depend_on_the_number_of_chunks() -> None:
    hidden, weight, targets = case(1024, 32, 512, BF16, padding=0.0)
    fp32_gradients(weight)
    exact = fp64_twins(hidden, weight)
    reference(exact[0], exact[1], targets).sum().backward()
    losses: list[float] = []
    errors: list[float] = []
    for chunks in (1, 4, 64, 1024):
        hidden.grad = weight.grad = None
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=1024 // chunks)
        loss.backward()
        losses.append(loss.item())
        errors.append(error(weight.grad, exact[1].grad))
    assert max(losses) - min(losses) <= 1e-6 * losses[0]
    assert max(errors) - min(errors) <= 1e-3 * errors[0]


def test_a_mean_in_bf16_is_off_the_same_way_for_every_token_and_our_sum_is_not() -> None:
    """Row sums of logit gradients are 0; a column of ones in the weight shows them."""
    tokens = 253  # 1/253 is 0.37 % below its BF16 rounding
    hidden, weight, targets = case(tokens, 8, 20_000, BF16, padding=0.0)
    with torch.no_grad():
        weight[:, 0] = 1.0
    F.cross_entropy((hidden @ weight.T).float(), targets).backward()
    biased = gradient_of(hidden)[:, 0].float() * tokens
    hidden.grad = None
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    unbiased = gradient_of(hidden)[:, 0].float()
    # Probabilities round up as often as down, so the error of 1/T is left.
    assert -4.5e-3 < biased.mean() < -3e-3
    assert abs(unbiased.mean()) < 1e-4


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"reduction": "none"}])
def test_fp16_keeps_the_gradients_of_unseen_classes(how: dict[str, Any]) -> None:
    vocab, tokens = 32_000, 48
    hidden, weight, targets = case(tokens, 8, vocab, FP16, sharpness=0.5, padding=0.0)
    exact = fp64_twins(hidden, weight)
    reference(exact[0], exact[1], targets).sum().backward()

    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    (F.cross_entropy(logits.float(), targets, reduction="sum") / 8192).backward()
    assert (gradient_of(logits) == 0).float().mean() > 0.99  # 1/V/T is below 2^-25

    fp32_gradients(weight)
    scaler = StaticLossScaler(2.0**16)
    loss, _ = linear_cross_entropy(hidden, weight, targets, **how)
    scaler.multiply(loss.sum() / 8192).backward()
    factor = 2.0**16 / 8192
    assert (gradient_of(weight) != 0).any(1).all()
    assert error(gradient_of(weight) / factor, exact[1].grad) < 1e-3
    assert error(gradient_of(hidden).double() / factor, exact[0].grad) < 1e-3


def test_fp16_per_token_losses_may_carry_factors_that_fp16_cannot_hold() -> None:
    hidden, weight, targets = case(64, 8, 100, FP16)
    fp32_gradients(weight)
    losses, _ = linear_cross_entropy(hidden, weight, targets, reduction="none")
    (losses * 2.0**-30).sum().backward()
    exact = fp64_twins(hidden, weight)
    reference(exact[0], exact[1], targets).sum().backward()
    assert error(gradient_of(weight) * 2.0**30, exact[1].grad) < 1e-3


def test_fp16_sum_leaves_the_range_of_fp16() -> None:
    hidden, weight, targets = case(1000, 8, 100, FP16, sharpness=100.0, padding=0.0)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == FP32
    assert 65504 < loss < torch.inf


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_logit_gradients_are_rounded_once_at_unit_scale(dtype: torch.dtype) -> None:
    """With a single hidden state of 1 the weight's gradient is the logits'."""
    weight = torch.randn(1000, 1, generator=seeded()).to(dtype).requires_grad_()
    weight.data[7] = -10.0
    fp32_gradients(weight)
    linear_cross_entropy(torch.ones(1, 1, dtype=dtype), weight, torch.tensor([7]))[0].backward()
    p = weight.detach().float()[:, 0].softmax(0)
    onehot = torch.arange(1000) == 7
    right = p - onehot.float()
    # Two FP32 softmaxes differ by some units of 2^-24, by how a processor adds up and takes exp. So
    # the one rounding is that of a number within 2^-21 of this one: mostly one value is allowed.
    near = torch.stack([(right * (1 + sign * 2.0**-21)).to(dtype).float() for sign in (-1, 1)])
    found = gradient_of(weight)[:, 0]
    assert ((near.amin(0) <= found) & (found <= near.amax(0))).all()
    assert (near[0] == near[1]).float().mean() > 0.98
    assert gradient_of(weight)[7] == -1


# ------------------------------------------------------------------ the incoming gradient


def test_incoming_gradient_multiplies_in_fp32() -> None:
    hidden, weight, targets = case(dtype=BF16)
    fp32_gradients(weight)
    factor = 1 / 7021
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    plain = gradient_of(hidden).clone(), gradient_of(weight).clone()
    hidden.grad = weight.grad = None
    (linear_cross_entropy(hidden, weight, targets)[0] * factor).backward()
    root = torch.tensor(factor)
    assert_same(gradient_of(hidden), (plain[0].float() * root).bfloat16())
    assert_same(gradient_of(weight), plain[1] * root)


def test_weight_gradient_reaches_an_fp32_sum_unrounded_and_a_bf16_one_rounded_once() -> None:
    hidden, weight, targets = case(dtype=BF16)
    bias = torch.zeros(50, dtype=BF16, requires_grad=True)
    linear_cross_entropy(hidden, weight, targets, bias=bias)[0].backward()
    rounded = gradient_of(weight), gradient_of(bias)
    weight.grad = bias.grad = None
    fp32_gradients(weight, bias)
    linear_cross_entropy(hidden, weight, targets, bias=bias)[0].backward()
    for narrow, wide in zip(rounded, (gradient_of(weight), gradient_of(bias)), strict=True):
        assert narrow.dtype == BF16
        assert wide.dtype == FP32
        assert (wide != wide.bfloat16()).any()
        assert_same(narrow, wide.bfloat16())


def test_weight_gradient_is_handed_over_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixprec.cross_entropy.loss as module

    evaluate, made = module._evaluate, list[Tensor]()

    def spy(*args: Any) -> Any:
        results = evaluate(*args)
        made.append(results[3])
        return results

    monkeypatch.setattr(module, "_evaluate", spy)
    hidden, weight, targets = case(dtype=BF16)
    fp32_gradients(weight)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    address = made.pop().data_ptr()
    (loss * 3).backward()
    assert gradient_of(weight).data_ptr() == address


def test_accumulator_gets_sums_that_no_micro_batch_rounded() -> None:
    hidden, weight, targets = case(64, 16, 50, BF16)
    exact = fp64_twins(hidden, weight)
    losses = reference(exact[0], exact[1], targets)
    losses.sum().backward()

    param = nn.Parameter(weight.detach())
    seen: list[Tensor] = []
    optimizer = MixedPrecision(torch.optim.SGD([param], lr=1.0))
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradient_of(param).clone()))
    accumulator = GradientAccumulator(optimizer, presumed_tokens=64)
    for i, rows in enumerate(torch.arange(64).split(8)):
        loss_and_count = linear_cross_entropy(hidden.detach()[rows], param, targets[rows])
        accumulator.backward(*loss_and_count, last=i == 7)
    mean = accumulator.step()
    assert seen[0].dtype == FP32
    assert error(seen[0] * 64, exact[1].grad) < 1.5e-3
    expected = losses.detach().sum() / (targets != PADDING).sum()
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


def test_one_micro_batch_and_many_sum_to_nearly_the_same_fp32_gradient() -> None:
    hidden, weight, targets = case(64, 16, 50, BF16)
    fp32_gradients(weight)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    whole = gradient_of(weight).clone()
    weight.grad = None
    for rows in torch.arange(64).split(1):
        linear_cross_entropy(hidden[rows], weight, targets[rows])[0].backward()
    assert error(weight.grad, whole) < 1e-6


def test_overflow_in_fp16_is_left_to_the_loss_scaler() -> None:
    hidden, weight, targets = case(64, 8, 100, FP16)
    scaler = DynamicLossScaler()
    optimizer = MixedPrecision(torch.optim.SGD([nn.Parameter(weight)], lr=1.0), loss_scaler=scaler)
    leaf = optimizer.param_groups[0]["params"][0]
    loss, _ = linear_cross_entropy(hidden, leaf, targets)
    scaler.multiply(loss * 2.0**10).backward()
    before = leaf.detach().clone()
    optimizer.step()
    assert not optimizer.grads_finite
    assert_same(leaf.detach(), before)


# ------------------------------------------------------------------ what is saved and computed


def saved_by(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that the graph of `function` saves for its backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(sizes), result


@pytest.mark.parametrize("tokens", [10, 1000])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_no_byte_of_a_logit_is_saved(tokens: int, chunk_size: int | None) -> None:
    hidden, weight, targets = case(tokens, 8, 300, BF16)
    saved, (loss, _) = saved_by(
        lambda: linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    )
    assert saved == 2 * hidden.numel() + 4 * weight.numel()
    loss.backward()
    saved, _ = saved_by(lambda: linear_cross_entropy(hidden, weight, targets, recompute=True))
    assert saved == 2 * hidden.numel() + 2 * weight.numel() + 8 * tokens


def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets a word for every product of logits or for the weight, and every chunk."""
    calls: list[str] = []
    softmax = logit_chunks.softmax_gradient_

    def softmax_spy(*args: Any, **kwargs: Any) -> Any:
        calls.append("loss" if kwargs["rounded_to"] is None else "gradient")
        return softmax(*args, **kwargs)

    def product_spy(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(*args: Any) -> Tensor:
            calls.append("product")
            return product(*args)

        return spy

    monkeypatch.setattr(logit_chunks, "softmax_gradient_", softmax_spy)
    for name in ("_multiply_into", "_add_product_"):
        monkeypatch.setattr(logit_chunks, name, product_spy(getattr(logit_chunks, name)))
    return calls


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = work(monkeypatch)
    hidden, weight, targets = case(dtype=BF16)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert calls == ["product", "loss"]
    assert not loss.requires_grad
    trained, _ = linear_cross_entropy(hidden, weight, targets)
    assert_same(trained.detach(), loss)
    with torch.inference_mode():
        assert_same(linear_cross_entropy(hidden, weight, targets)[0], loss)


def test_recomputing_puts_all_gradients_off_to_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = work(monkeypatch)
    hidden, weight, targets = case()
    loss, _ = linear_cross_entropy(hidden, weight, targets, recompute=True)
    assert calls == ["product", "loss"]
    loss.backward()
    assert calls == ["product", "loss", "product", "gradient", "product"]


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"reduction": "none"}])
def test_details_are_looked_for_once_and_only_on_request(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    softmax = logit_chunks.softmax_gradient_

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["argmax"])
        return softmax(*args, **kwargs)

    monkeypatch.setattr(logit_chunks, "softmax_gradient_", spy)
    hidden, weight, targets = case()
    linear_cross_entropy(hidden, weight, targets, return_details=True, **how)[0].sum().backward()
    assert asked == ([True, False] if how else [True])
    asked.clear()
    linear_cross_entropy(hidden, weight, targets, **how)[0].sum().backward()
    assert not any(asked)


def test_frozen_head_costs_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = work(monkeypatch)
    hidden, weight, targets = case()
    linear_cross_entropy(hidden, weight.detach(), targets)[0].backward()
    assert calls == ["product", "gradient"]
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-11, atol=1e-12)


def test_frozen_trunk_gets_a_weight_gradient_alone() -> None:
    hidden, weight, targets = case()
    linear_cross_entropy(hidden.detach(), weight, targets)[0].backward()
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets).sum(), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-11, atol=1e-12)
    saved, _ = saved_by(lambda: linear_cross_entropy(hidden.detach(), weight, targets))
    assert saved == 8 * weight.numel()


def test_bias_alone_can_be_trained() -> None:
    hidden, weight, targets = case()
    bias = torch.zeros(50, dtype=FP64, requires_grad=True)
    linear_cross_entropy(hidden.detach(), weight.detach(), targets, bias=bias)[0].backward()
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets, bias=bias).sum(), bias)
    torch.testing.assert_close(bias.grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"reduction": "none"}])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_nothing_but_padding_has_zero_loss_and_zero_finite_gradients(
    how: dict[str, Any], tokens: int, dtype: torch.dtype
) -> None:
    hidden, weight, targets = case(tokens, dtype=dtype)
    targets.fill_(PADDING)
    bias = torch.zeros(50, dtype=dtype, requires_grad=True)
    loss, count = linear_cross_entropy(hidden, weight, targets, bias=bias, z_loss=0.1, **how)
    assert count == 0
    assert loss.sum() == 0
    loss.sum().backward()
    for leaf in (hidden, weight, bias):
        assert_same(leaf.grad, torch.zeros_like(leaf))


def test_padding_adds_neither_loss_nor_gradient_whatever_its_hidden_states_hold() -> None:
    hidden, weight, targets = case()
    kept = targets != PADDING
    short = hidden.detach()[kept].requires_grad_()
    expected = linear_cross_entropy(short, weight, targets[kept])[0]
    grads = torch.autograd.grad(expected, [short, weight])
    dirty = hidden.detach().masked_fill(~kept[:, None], torch.nan).requires_grad_()
    loss, _ = linear_cross_entropy(dirty, weight, targets)
    found = torch.autograd.grad(loss, [dirty, weight])
    assert_same(loss, expected)
    assert_same(found[0][kept], grads[0])
    assert (found[0][~kept] == 0).all()
    assert_same(found[1], grads[1])


def test_ignore_index_may_be_a_class() -> None:
    hidden, weight, targets = case(padding=0.0)
    loss, count = linear_cross_entropy(hidden, weight, targets, ignore_index=int(targets[0]))
    expected = F.cross_entropy(
        hidden @ weight.T, targets, ignore_index=int(targets[0]), reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert count == (targets != targets[0]).sum()


def test_count_that_the_caller_knows_changes_nothing() -> None:
    hidden, weight, targets = case(dtype=BF16)
    loss, count = linear_cross_entropy(hidden, weight, targets)
    same, same_count = linear_cross_entropy(hidden, weight, targets, num_tokens=int(count))
    assert_same((same, same_count), (loss, count))
    assert_same(
        torch.autograd.grad(same, [hidden, weight]), torch.autograd.grad(loss, [hidden, weight])
    )


def test_minus_infinity_in_the_bias_bars_a_class() -> None:
    hidden, weight, targets = case()
    targets[targets == 3] = 4
    bias = torch.zeros(50, dtype=FP64)
    bias[3] = -torch.inf
    loss, _ = linear_cross_entropy(hidden, weight, targets, bias=bias)
    loss.backward()
    expected = reference(hidden, weight, targets, bias=bias).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert (gradient_of(weight)[3] == 0).all()


# ------------------------------------------------------------------ where it stands in a model


def test_batches_of_sequences_are_taken_as_they_are() -> None:
    hidden, weight, targets = case(24)
    flat = linear_cross_entropy(hidden, weight, targets)
    nested = linear_cross_entropy(hidden.view(2, 12, 16), weight, targets.view(2, 12))
    assert_same(nested, flat)
    losses, _ = linear_cross_entropy(
        hidden.view(2, 12, 16), weight, targets.view(2, 12), reduction="none"
    )
    assert losses.shape == (2, 12)
    one, _ = linear_cross_entropy(hidden[1], weight, targets[1])
    assert_same(one, losses[0, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_targets_may_be_any_integers(dtype: torch.dtype) -> None:
    hidden, weight, targets = case(padding=0.0)
    for shift in (False, True):
        assert_same(
            linear_cross_entropy(hidden, weight, targets.to(dtype), shift=shift),
            linear_cross_entropy(hidden, weight, targets, shift=shift),
        )


def test_shift_scores_the_next_token_as_slicing_would() -> None:
    hidden, weight, targets = case(24)
    hidden, targets = hidden.detach().view(2, 12, 16).requires_grad_(), targets.view(2, 12)
    weights = torch.rand(2, 12, generator=seeded(5), dtype=FP64)
    loss, count = linear_cross_entropy(hidden, weight, targets, shift=True, token_weight=weights)
    sliced, sliced_count = linear_cross_entropy(
        hidden[:, :-1], weight, targets[:, 1:], token_weight=weights[:, 1:]
    )
    torch.testing.assert_close(loss, sliced, rtol=1e-12, atol=0)
    assert count == sliced_count == (targets[:, 1:] != PADDING).sum()
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden), torch.autograd.grad(sliced, hidden)
    )


@pytest.mark.parametrize("shift", [0, 2, 5, 12, 20])
def test_shift_scores_the_target_that_many_places_on(shift: int) -> None:
    hidden, weight, targets = case(24)
    hidden, targets = hidden.view(2, 12, 16), targets.view(2, 12)
    weights = torch.rand(2, 12, generator=seeded(5), dtype=FP64)
    losses, count = linear_cross_entropy(
        hidden, weight, targets, shift=shift, token_weight=weights, reduction="none"
    )
    last = max(12 - shift, 0)
    expected, expected_count = linear_cross_entropy(
        hidden[:, :last],
        weight,
        targets[:, shift:],
        token_weight=weights[:, shift:],
        reduction="none",
    )
    assert losses.shape == (2, 12) and count == expected_count
    torch.testing.assert_close(losses[:, :last], expected, rtol=1e-12, atol=0)
    assert (losses[:, last:] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shift", [True, 3])
def test_shift_of_no_tokens_gives_no_losses(
    shape: tuple[int, ...], reduction: Any, shift: int
) -> None:
    hidden = torch.zeros(*shape, 16, requires_grad=True)
    loss, count = linear_cross_entropy(
        hidden,
        torch.zeros(50, 16),
        torch.zeros(shape, dtype=torch.long),
        token_weight=torch.ones(shape),
        shift=shift,
        reduction=reduction,
    )
    assert loss.shape == (shape if reduction == "none" else ())
    assert count == 0 and loss.sum() == 0
    loss.sum().backward()
    assert gradient_of(hidden).shape == hidden.shape


def test_tied_embedding_gets_both_gradients_in_fp32() -> None:
    tokens = torch.randint(50, (24,), generator=seeded(6))
    weight = case(dtype=BF16)[1]
    fp32_gradients(weight)

    def loss(weight: Tensor) -> Tensor:
        return linear_cross_entropy(F.embedding(tokens, weight), weight, tokens)[0]

    loss(weight).backward()
    (exact,) = fp64_twins(weight)
    loss(exact).backward()
    assert gradient_of(weight).dtype == FP32
    assert error(weight.grad, exact.grad) < 2.5e-3


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoint_around_the_head_changes_nothing(
    use_reentrant: bool, recompute: bool
) -> None:
    hidden, weight, targets = case(dtype=BF16)
    fp32_gradients(weight)

    def head(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden.tanh(), weight, targets, recompute=recompute)[0]

    (head(hidden) * 3).backward()
    expected = gradient_of(hidden).clone(), gradient_of(weight).clone()
    hidden.grad = weight.grad = None
    loss: Any = checkpoint(head, hidden, use_reentrant=use_reentrant)
    (loss * 3).backward()
    assert_same((hidden.grad, weight.grad), expected)


COMPILED: list[dict[str, Any]] = [
    {},
    {"recompute": True},
    {"reduction": "none"},
    {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1, "chunk_size": 8},
    {"logit_multiplier": 0.3},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize("options", COMPILED)
def test_compiled_model_has_no_graph_break_and_the_same_gradients(options: dict[str, Any]) -> None:
    hidden, weight, targets = case(dtype=BF16)
    bias = torch.zeros(50, dtype=BF16, requires_grad=True)
    leaves = hidden, weight, bias

    def model(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Any:
        loss, count = linear_cross_entropy(hidden * 2, weight, targets, bias=bias, **options)
        return loss.sum() * 3, count

    expected, expected_count = model(*leaves, targets)
    expected_grads = torch.autograd.grad(expected, leaves)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, count = compiled(*leaves, targets)
    assert_same((loss, count), (expected, expected_count))
    assert_same(torch.autograd.grad(loss, leaves), expected_grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_compiled_model_gives_the_same_details() -> None:
    hidden, weight, targets = case(dtype=BF16)
    expected = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, return_details=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    assert_same(compiled(hidden, weight, targets, z_loss=0.1, return_details=True), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_compiled_model_rounds_a_weight_gradient_once() -> None:
    """Into the dtype of the weight, whatever its `grad_dtype`: that is the compiler's."""
    hidden, weight, targets = case(dtype=BF16)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    expected = gradient_of(weight).clone()
    weight.grad = None
    fp32_gradients(weight)
    torch._dynamo.reset()
    compiled: Any = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    compiled(hidden, weight, targets)[0].backward()
    assert_same(gradient_of(weight), expected.float())


def test_operator_is_declared_as_it_behaves() -> None:
    hidden, weight, targets = (t.detach() for t in case(dtype=BF16))
    operator = torch.ops.mixprec.linear_cross_entropy.default
    options = (PADDING, 0.1, 0.3, 2.0, 0.1, FP32, 8, None)
    for needs, details in (([True, True, False], False), ([False, False, False], True)):
        arguments = hidden, weight, None, targets, None, None, *options, needs, None
        torch.library.opcheck(operator, (*arguments, details))


@pytest.mark.parametrize("how", [{}, {"recompute": True}])
def test_autocast_rounds_operands_and_no_weight_gradient(how: dict[str, Any]) -> None:
    hidden, weight, targets = case(dtype=BF16)
    fp32_gradients(hidden, weight)
    expected, _ = linear_cross_entropy(hidden, weight, targets)
    expected.backward()
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", BF16):
        loss, _ = linear_cross_entropy(wide[0], wide[1], targets, **how)
    loss.backward()
    assert_same(loss, expected)
    assert_same([t.grad for t in wide], [hidden.grad, weight.grad])
    with torch.autocast("cpu", BF16):  # mixed dtypes are autocast's business
        mixed, _ = linear_cross_entropy(hidden, wide[1], targets)
    assert_same(mixed, expected)


def test_autocast_leaves_fp64_alone() -> None:
    hidden, weight, targets = case()
    expected, _ = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", BF16):
        assert_same(linear_cross_entropy(hidden, weight, targets)[0], expected)


def test_module_is_the_function_with_its_own_weight() -> None:
    layer = nn.Linear(16, 50, dtype=FP64)
    head = LinearCrossEntropy(16, 50, bias=True, dtype=FP64, softcap=3.0, shift=True)
    head.load_state_dict(layer.state_dict())
    hidden, _, targets = case()
    expected = linear_cross_entropy(
        hidden, layer.weight, targets, bias=layer.bias, softcap=3.0, shift=True
    )
    assert_same(head(hidden, targets), expected)
    unshifted = linear_cross_entropy(hidden, layer.weight, targets, bias=layer.bias, softcap=3.0)
    assert_same(head(hidden, targets, shift=False), unshifted)
    assert repr(head) == "LinearCrossEntropy(16, 50, bias=True, softcap=3.0, shift=True)"


def test_module_refuses_an_option_that_the_function_has_not() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'smoothing'"):
        LinearCrossEntropy(16, 50, smoothing=0.1)


def test_module_can_be_tied_and_starts_as_a_linear_layer_does() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 50, bias=False)
    torch.manual_seed(0)
    head = LinearCrossEntropy(16, 50)
    assert head.bias is None
    assert_same(head.weight, layer.weight)
    embedding = nn.Embedding(50, 16)
    head.weight = embedding.weight
    assert [*nn.ModuleList([embedding, head]).parameters()] == [embedding.weight]


@pytest.mark.parametrize(
    ("vocab", "dtype", "tokens"),
    [
        (1, BF16, 8192),
        (32_000, BF16, 8192),
        (50_304, BF16, 8192),
        (65_536, BF16, 8192),
        (65_537, BF16, 4096),
        (128_256, BF16, 4096),
        (128_256, FP32, 2048),
        (256_000, BF16, 2048),
        (262_144, FP16, 2048),
        (2_000_000, BF16, 512),
        (65_536, FP32, 4096),
        (65_537, FP32, 2048),
        (65_536, FP64, 2048),
    ],
)
def test_default_chunk_holds_at_most_a_gibibyte(
    vocab: int, dtype: torch.dtype, tokens: int
) -> None:
    assert default_chunk_size(vocab, dtype) == tokens
    if tokens > 512:
        assert tokens * vocab * dtype.itemsize <= 2**30


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("width", [64, 2048, 2304, 4096])
@pytest.mark.parametrize("tokens", [0, 1, 127, 2000, 7021, 8192, 28_087])
def test_chunks_cover_all_tokens_once_in_no_more_rows_than_asked_for(
    tokens: int, width: int, processors: int
) -> None:
    kept = torch.arange(tokens)
    for most in (1, 100, 128, 1000, 2048, 4096):
        size = logit_chunks._size_of_chunks(tokens, most, width, processors)
        assert size <= most and (size % 128 == 0 or most < 128)
        if tokens // size > 1000:
            continue
        for rows in (tokens, tokens + 1):  # nothing or something is padding
            chunks = [kept[chunk] for chunk in logit_chunks._chunks(kept, rows, size)]
            assert torch.equal(torch.cat([kept[:0], *chunks]), kept)


def waves(tokens: int, size: int, columns: int) -> list[int]:
    sizes = [min(size, tokens - start) for start in range(0, tokens, size)]
    return [-(-(-(-rows // 128) * columns) // 132) for rows in sizes]


def test_chunks_fill_waves_of_tiles_or_are_of_equal_size() -> None:
    found = logit_chunks._size_of_chunks(7021, 4096, 4096, 132)
    assert waves(7021, found, 16) == [4, 3]
    assert waves(7021, 3584, 16) == [4, 4]
    found = logit_chunks._size_of_chunks(8192, 2048, 2304, 132)
    assert waves(8192, found, 9) == [1] * 5
    assert waves(8192, 2048, 9) == [2] * 4
    assert logit_chunks._size_of_chunks(1000, 600, 64, 1) == 512  # 4 and 4 tiles, the last not full


# ------------------------------------------------------------------ what is refused


def test_second_backward_is_refused_and_recompute_allows_it() -> None:
    hidden, weight, targets = case()
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"multiplied them in place.*Give recompute=True"):
        loss.backward()
    once = gradient_of(weight).clone()
    weight.grad = None
    loss, _ = linear_cross_entropy(hidden, weight, targets, recompute=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("how", [{}, {"recompute": True}])
def test_second_derivative_is_refused(how: dict[str, Any]) -> None:
    hidden, weight, targets = case()
    loss, _ = linear_cross_entropy(hidden, weight, targets, **how)
    with pytest.raises(RuntimeError, match=r"has no second derivative.*F\.cross_entropy"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_functional_transforms_and_forward_mode_are_refused() -> None:
    hidden, weight, targets = (t.detach() for t in case())

    def loss(weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets)[0]

    said = r"inside torch\.func or in forward mode"
    with pytest.raises(RuntimeError, match=said):
        torch.func.grad(loss)(weight)
    with pytest.raises(RuntimeError, match=said):
        torch.func.vmap(loss)(torch.stack([weight, weight]))
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(loss, (weight,), (weight,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        loss(forward_ad.make_dual(weight, weight))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"weight": torch.zeros(50, 3)},
        ValueError,
        r"weight is \[50, 3\] but hidden is \[6, 2\]; weight must be \[vocab, 2\]",
    ),
    ({"weight": torch.zeros(2)}, ValueError, r"weight is \[2\] but hidden is \[6, 2\]"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"weight must be \[vocab, width\]"),
    (
        {"targets": torch.zeros(5, dtype=torch.long)},
        ValueError,
        r"targets are \[5\] but hidden is \[6, 2\].*hidden state, \[6\].*give shift=True",
    ),
    (
        {"targets": torch.tensor([0, 1, -100, 4, 7, 2])},
        ValueError,
        r"a target is 4, but weight has 4 rows: .* in \[0, 4\), or ignore_index=-100",
    ),
    ({"targets": torch.tensor([0, 1, -1, 3, 3, 2])}, ValueError, "a target is -1, but weight has"),
    ({"targets": torch.zeros(6)}, TypeError, r"targets are torch\.float32; they must be integers"),
    ({"targets": torch.zeros(6, 4)}, TypeError, "Probabilities of classes are not supported"),
    ({"targets": torch.zeros(6, dtype=torch.bool)}, TypeError, r"targets are torch\.bool"),
    ({"reduction": "mean"}, ValueError, "reduction is 'mean'.*For a mean divide loss_sum"),
    ({"chunk_size": 0}, ValueError, "chunk_size is 0; it must be an int of at least 1"),
    ({"chunk_size": 1.5}, ValueError, r"chunk_size is 1\.5; it must be an int"),
    (
        {"logits_dtype": BF16},
        ValueError,
        r"logits_dtype is torch\.bfloat16; for hidden states in torch\.float32 it must be",
    ),
    ({"bias": torch.zeros(3)}, ValueError, r"bias is \[3\] but weight is \[4, 2\].*be \[4\]"),
    ({"bias": torch.zeros(4, dtype=BF16)}, TypeError, "and bias is torch.bfloat16; they must be"),
    (
        {"hidden": torch.zeros(6, 2, dtype=BF16)},
        TypeError,
        r"hidden is torch\.bfloat16 and weight is torch\.float32.*cast one, or run under",
    ),
    (
        {"hidden": torch.zeros(6, 2, dtype=torch.long)},
        TypeError,
        r"hidden is torch\.int64 .*must be FP32, BF16, FP16 or FP64",
    ),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1\.5; it must be between 0 and 1"),
    ({"logit_multiplier": math.inf}, ValueError, "logit_multiplier is inf; it must be finite"),
    ({"softcap": 0.0}, ValueError, r"softcap is 0\.0; it must be finite and above 0, or None"),
    ({"z_loss": -1.0}, ValueError, r"z_loss is -1\.0; it must be 0 or more"),
    (
        {"class_weight": torch.ones(3)},
        ValueError,
        r"class_weight is torch\.float32 of shape \[3\]; .* floating-point of shape \[4\]",
    ),
    (
        {"token_weight": torch.ones(6, dtype=torch.long)},
        ValueError,
        r"token_weight is torch\.int64 of shape \[6\]",
    ),
    (
        {"token_weight": torch.ones(6, requires_grad=True)},
        ValueError,
        "token_weight requires a gradient and would get none; detach it, or multiply",
    ),
    (
        {"ignore_index": None},
        TypeError,
        r"ignore_index is None; it must be an int, of at most 64 bits.*leave it out: -100",
    ),
    ({"ignore_index": 2**70}, TypeError, r"ignore_index is 1180591620717411303424; .* 64 bits"),
    ({"targets": [0, 1, 2, 3, 3, 0]}, TypeError, "targets is a list; it must be a tensor"),
    ({"weight": None}, TypeError, "weight is a NoneType; it must be a tensor"),
    ({"weight": torch.tensor(1.0)}, ValueError, r"weight is \[\] but hidden is \[6, 2\]"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden is \[\]; weight must be \[vocab, width\]"),
    ({"bias": [0.0] * 4}, TypeError, "bias is a list; it must be a tensor"),
    ({"ignore_index": -100.0}, TypeError, r"ignore_index is -100\.0; it must be an int"),
    ({"ignore_index": True}, TypeError, r"ignore_index is True; it must be an int"),
    ({"shift": -1}, ValueError, r"shift is -1; it must be an int of at least 0.*True or 1 for"),
    ({"shift": 1.0}, ValueError, r"shift is 1\.0; it must be an int"),
    ({"shift": None}, ValueError, r"shift is None; it must be an int"),
    (
        {"hidden": torch.zeros(2), "targets": torch.tensor(1), "shift": True},
        ValueError,
        r"shift is True but targets are a single number; they need a last axis",
    ),
    ({"softcap": math.inf}, ValueError, r"softcap is inf; it must be finite and above 0, or None"),
    ({"softcap": "30"}, TypeError, r"softcap is '30'; it must be a float .*None for no cap"),
    ({"z_loss": None}, TypeError, r"z_loss is None; it must be a float .*0\.0 for none"),
    ({"z_loss": math.inf}, ValueError, r"z_loss is inf; it must be 0 or more, and finite"),
    ({"label_smoothing": None}, TypeError, r"label_smoothing is None; it must be a float"),
    (
        {"logit_multiplier": torch.tensor(2.0, requires_grad=True)},
        TypeError,
        r"logit_multiplier is tensor\(2\..*it must be a float.*A tensor would get no gradient",
    ),
    ({"chunk_size": True}, ValueError, r"chunk_size is True; it must be an int of at least 1"),
    ({"num_tokens": 5}, ValueError, r"num_tokens is 5, but 6 targets are no padding"),
    ({"num_tokens": -1}, ValueError, "num_tokens is -1; it must be an int of at least 0"),
    (
        {"num_tokens": torch.tensor(6)},
        ValueError,
        r"num_tokens is tensor\(6\).*reading it from a tensor would wait",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "said"), BAD)
def test_arguments_that_cannot_be_meant_are_refused(
    wrong: dict[str, Any], kind: type[Exception], said: str
) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(6, 2),
        "weight": torch.zeros(4, 2),
        "targets": torch.tensor([0, 1, 2, 3, 3, 0]),
    }
    linear_cross_entropy(**arguments)
    with pytest.raises(kind, match=said):
        linear_cross_entropy(**{**arguments, **wrong})


# ------------------------------------------------------------------ tensors of other types


class Scaled(Tensor):
    """A tensor that multiplies in a way of its own, as quantized weights do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func is F.linear else result


class Named(Tensor):
    """A tensor that computes as any other."""


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "class_weight", "token_weight"])
def test_a_tensor_that_computes_in_its_own_way_is_refused(name: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(6, 2),
        "weight": torch.randn(4, 2),
        "targets": torch.tensor([0, 1, 2, 3, 3, 0]),
        "bias": torch.randn(4),
        "class_weight": torch.ones(4),
        "token_weight": torch.ones(6),
    }
    expected = linear_cross_entropy(**arguments)[0]
    named = {**arguments, name: arguments[name].as_subclass(Named)}
    assert_same(linear_cross_entropy(**named)[0].as_subclass(Tensor), expected)
    own = {**arguments, name: arguments[name].as_subclass(Scaled)}
    with pytest.raises(
        TypeError, match=f"{name} is a Scaled, a tensor that computes in its own wa"
    ):
        linear_cross_entropy(**own)


def test_a_layer_whose_weight_computes_in_its_own_way_is_refused() -> None:
    layer = nn.Linear(2, 4, bias=False)
    hidden, targets = torch.randn(6, 2), torch.tensor([0, 1, 2, 3, 3, 0])
    right = F.cross_entropy(layer(hidden), targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, layer, targets)[0], right)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Scaled))
    with pytest.raises(
        TypeError, match="weight is a Scaled, a tensor that computes in its own way"
    ):
        linear_cross_entropy(hidden, layer, targets)


def test_tensors_without_memory_have_a_loss_without_a_value() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, targets = torch.randn(6, 2), torch.zeros(6, dtype=torch.long)
        loss, _ = linear_cross_entropy(hidden, nn.Linear(2, 4), targets, num_tokens=6)
    assert loss.shape == ()
