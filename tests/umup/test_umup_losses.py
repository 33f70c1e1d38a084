"""Losses: plain values, gradients of RMS 1, and padding that is not counted."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixprec import umup
from mixprec.umup import functional as U
from mixprec.umup import losses

DECILES = [q / 10 for q in range(1, 10)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(*shape: int, vocab: int = 64) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(5))


def rms(tensor: Tensor | None) -> float:
    assert tensor is not None
    return tensor.detach().double().square().mean().sqrt().item()


def grad_rms(loss: Callable[[Tensor], Tensor], prediction: Tensor) -> float:
    leaf = prediction.clone().requires_grad_()
    loss(leaf).sum().backward()
    return rms(leaf.grad)


# ------------------------------------------------------------------ unit scale


N, D = 4096, 16
FRESH, NORMAL = torch.zeros(N, D), normal(N, D)
TARGET, BINARY = normal(N, D, seed=1), (normal(N, D, seed=1) > 0).float()
TOKENS = classes(N)
# name: unit loss, plain loss, predictions
UNIT: dict[str, tuple[Callable[..., Any], Callable[..., Any], Tensor]] = {
    "cross_entropy": (
        lambda z: losses.cross_entropy(z, TOKENS),
        lambda z: F.cross_entropy(z, TOKENS, reduction="sum"),
        torch.zeros(N, 64),
    ),
    "cross_entropy, smoothed": (
        lambda z: losses.cross_entropy(z, TOKENS, label_smoothing=0.5),
        lambda z: F.cross_entropy(z, TOKENS, reduction="sum", label_smoothing=0.5),
        torch.zeros(N, 64),
    ),
    "mse": (
        lambda y: losses.mse_loss(y, TARGET),
        lambda y: F.mse_loss(y, TARGET, reduction="sum"),
        FRESH,
    ),
    "mse of unit predictions": (
        lambda y: losses.mse_loss(y, TARGET, residual_std=2**0.5),
        lambda y: losses.mse_loss(y, TARGET),
        NORMAL,
    ),
    "l1": (lambda y: losses.l1_loss(y, TARGET), lambda y: F.l1_loss(y, TARGET), FRESH),
    "huber": (
        lambda y: losses.huber_loss(y, TARGET, delta=0.5),
        lambda y: F.huber_loss(y, TARGET, delta=0.5, reduction="sum"),
        FRESH,
    ),
    "huber of unit predictions": (
        lambda y: losses.huber_loss(y, TARGET, delta=2.0, residual_std=2**0.5),
        lambda y: F.huber_loss(y, TARGET, delta=2.0),
        NORMAL,
    ),
    "smooth_l1": (
        lambda y: losses.smooth_l1_loss(y, TARGET, beta=0.5),
        lambda y: F.smooth_l1_loss(y, TARGET, beta=0.5),
        FRESH,
    ),
    "binary_cross_entropy": (
        lambda z: losses.binary_cross_entropy_with_logits(z, BINARY),
        lambda z: F.binary_cross_entropy_with_logits(z, BINARY, reduction="sum"),
        FRESH,
    ),
    "kl_div": (
        lambda z: losses.kl_div(z, normal(1024, 512, seed=1)),
        lambda z: F.kl_div(
            z.log_softmax(-1), normal(1024, 512, seed=1).softmax(-1), reduction="sum"
        ),
        torch.zeros(1024, 512),
    ),
    "pinball": (
        lambda y: losses.pinball(y, TARGET, DECILES),
        lambda y: torch.maximum(0.1 * y, -0.9 * y),
        torch.zeros(N, D, 9),
    ),
    "pinball of quantiles": (
        lambda y: losses.pinball(y, TARGET, DECILES, centered=True),
        lambda y: losses.pinball(y, TARGET, DECILES),
        losses.quantile_bias(DECILES).expand(N, D, 9),
    ),
}


@pytest.mark.parametrize("name", UNIT)
def test_gradients_begin_at_rms_1_and_plain_ones_do_not(name: str) -> None:
    unit, plain, prediction = UNIT[name]
    assert abs(grad_rms(unit, prediction) - 1) < 0.02  # 65536 elements
    assert abs(grad_rms(plain, prediction) - 1) > 0.1


LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["mse", "l1", "huber", "smooth_l1", "bce", "kl", "ce", "pinball"])
def test_losses_in_16_bits_are_those_of_fp64_and_round_the_gradient_once(
    name: str, reduction: Any, dtype: torch.dtype
) -> None:
    rows, wide = 70_000, 4
    target = normal(rows, wide, seed=1)
    call: Any = {
        "mse": lambda y, t: losses.mse_loss(y, t, reduction=reduction),
        "l1": lambda y, t: losses.l1_loss(y, t, reduction=reduction),
        "huber": lambda y, t: losses.huber_loss(y, t, delta=0.5, reduction=reduction),
        "smooth_l1": lambda y, t: losses.smooth_l1_loss(y, t, beta=0.5, reduction=reduction),
        "bce": lambda y, t: losses.binary_cross_entropy_with_logits(
            y, (t > 0).to(t.dtype), reduction=reduction
        ),
        "kl": lambda y, t: losses.kl_div(y, t, reduction=reduction),
        "ce": lambda y, t: losses.cross_entropy(
            y, (t[:, 0] > 0).long(), weight=t[0].abs(), reduction=reduction
        ),
        "pinball": lambda y, t: losses.pinball(y, t[:, 0], DECILES[:wide], reduction=reduction),
    }[name]
    low, right = (normal(rows, wide).to(dtype), normal(rows, wide).to(dtype).double())
    low.requires_grad_()
    right.requires_grad_()
    found, exact = call(low, target.to(dtype)), call(right, target.to(dtype).double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    exact.sum().backward()
    assert low.grad is not None and right.grad is not None and low.grad.dtype == dtype
    half_spacing = torch.finfo(dtype).eps / 2  # of the one rounding; the rest is that of FP32
    error = (low.grad.double() - right.grad).abs()
    assert (error <= 1.01 * half_spacing * right.grad.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "fn", [F.mse_loss, F.l1_loss, lambda p, t: (p - t).abs()], ids=["mse", "l1", "own"]
)
def test_any_loss_of_many_elements_in_16_bits_is_finite(fn: Any, dtype: torch.dtype) -> None:
    prediction, target = torch.zeros(70_000, dtype=dtype), torch.ones(70_000, dtype=dtype)
    assert umup.unit_loss(fn)(prediction.requires_grad_(), target).item() == 70_000


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_are_those_of_torch(reduction: Any) -> None:
    target = TARGET.where(TARGET > 0, 0)
    pairs: list[tuple[Any, Any]] = [
        (losses.mse_loss, F.mse_loss),
        (losses.l1_loss, F.l1_loss),
        (partial(losses.huber_loss, delta=0.7), partial(F.huber_loss, delta=0.7)),
        (partial(losses.smooth_l1_loss, beta=0.7), partial(F.smooth_l1_loss, beta=0.7)),
    ]
    for ours, theirs in pairs:
        args = NORMAL, target
        torch.testing.assert_close(
            ours(*args, reduction=reduction), theirs(*args, reduction=reduction)
        )
    ours = losses.binary_cross_entropy_with_logits(NORMAL, BINARY, reduction=reduction)
    theirs = F.binary_cross_entropy_with_logits(NORMAL, BINARY, reduction=reduction)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs_with_padding_weights_smoothing_and_more_axes(
    reduction: Any, weighted: bool
) -> None:
    targets = classes(8, 5, vocab=7)
    targets[2], targets[3, 1] = -100, -100
    logits = normal(8, 7, 5)
    weight = normal(7, seed=3).abs() if weighted else None
    options: Any = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
    if weighted and reduction == "mean":
        options["label_smoothing"] = 0.0
    ours = losses.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, **options))


def test_padding_has_no_gradient_and_leaves_real_rows_at_unit_scale() -> None:
    targets = TOKENS.clone()
    targets[1024:] = -100
    logits = torch.zeros(N, 64, requires_grad=True)
    losses.cross_entropy(logits, targets).backward()
    assert logits.grad is not None
    assert logits.grad[1024:].count_nonzero() == 0
    assert rms(logits.grad[:1024]) == pytest.approx(1, abs=1e-5)


def test_nothing_but_padding_is_nan_as_in_torch_with_a_gradient_of_zero() -> None:
    logits = torch.zeros(3, 4, requires_grad=True)
    loss = losses.cross_entropy(logits, torch.full((3,), -100))
    assert loss.isnan()
    total, count = losses.linear_cross_entropy(
        normal(3, 8), normal(4, 8).requires_grad_(), torch.full((3,), -100)
    )
    assert (total.item(), count.item()) == (0.0, 0)
    assert losses.mse_loss(torch.zeros(0), torch.zeros(0)).isnan()


# ------------------------------------------------------------------ without logits


@pytest.mark.parametrize("multiplier", [1.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy_equals_a_readout_and_its_loss(
    multiplier: float, smoothing: float
) -> None:
    wide = torch.float64
    targets = classes(4, 32)
    targets[1, 5:] = -100
    grads: list[list[Tensor | None]] = []
    values: list[Tensor] = []
    for fused in (True, False):
        hidden, weight, bias = (
            normal(*shape, seed=i, dtype=wide).requires_grad_()
            for i, shape in enumerate(((4, 32, 24), (64, 24), (64,)))
        )
        if fused:
            loss, count = losses.linear_cross_entropy(
                hidden, weight, targets, bias=bias, multiplier=multiplier, label_smoothing=smoothing
            )
            assert count == (targets != -100).sum()
        else:
            logits = U.linear_readout(hidden, weight, bias).flatten(0, 1)
            loss = losses.cross_entropy(
                logits,
                targets.flatten(),
                multiplier=multiplier,
                label_smoothing=smoothing,
                reduction="sum",
            )
        loss.backward()
        values.append(loss.detach())
        grads.append([hidden.grad, weight.grad, bias.grad])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


def test_linear_cross_entropy_has_unit_gradients_of_hidden_states_and_padding_none() -> None:
    hidden, weight = normal(1024, 64).requires_grad_(), normal(256, 64, seed=1).requires_grad_()
    targets = classes(1024, vocab=256)
    targets[512:] = -100
    losses.linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert hidden.grad is not None and weight.grad is not None
    assert abs(rms(hidden.grad[:512]) - 1) < 0.05
    assert hidden.grad[512:].count_nonzero() == 0
    assert abs(rms(weight.grad) / 512**0.5 - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_multiplier_of_a_readout_without_logits_rounds_nothing(dtype: torch.dtype) -> None:
    hidden = normal(64, 3000).to(dtype).requires_grad_()  # in FP16, / 3000 would be subnormal
    weight, targets = normal(96, 3000, seed=1).to(dtype), classes(64, vocab=96)
    loss, _ = losses.linear_cross_entropy(hidden, weight, targets)
    logits = hidden.double() @ weight.double().T / 3000
    exact = F.cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    loss.backward()
    assert hidden.grad is not None and rms(hidden.grad) == pytest.approx(1, abs=0.05)


def test_linear_cross_entropy_in_bf16_errs_no_more_than_logits_in_bf16() -> None:
    targets = classes(512, vocab=128)
    shapes = ((512, 96), (128, 96))  # neither multiplier is a power of two

    def gradients(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            normal(*s, seed=i).bfloat16().to(dtype).requires_grad_() for i, s in enumerate(shapes)
        ]
        return [g.double() for g in torch.autograd.grad(call(*leaves), leaves)]

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return losses.linear_cross_entropy(hidden, weight, targets)[0]

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = U.linear_readout(hidden, weight)
        return losses.cross_entropy(logits.float(), targets, reduction="sum")

    exact = gradients(plain, torch.float64)
    ours, theirs = gradients(fused, torch.bfloat16), gradients(plain, torch.bfloat16)
    found, other = (
        [float((g - e).norm()) for g, e in zip(grads, exact, strict=True)]
        for grads in (ours, theirs)
    )
    # Hidden states' gradients are rounded three times, by the product, the loss's and their own
    # multiplier, and those of logits once: 3^1/2 at most. The weight's sums are in FP32 till then.
    assert found[0] < 3**0.5 * other[0]
    assert found[1] < 1.1 * other[1]


# ------------------------------------------------------------------ quantiles


@pytest.mark.parametrize(
    ("quantiles", "factor"),
    [([0.5], 2.0), ([0.1, 0.5, 0.9], 1.674), (DECILES, 1.777), ([0.9, 0.95, 0.99], 1.489)],
)
def test_the_shared_factor_of_pinball(quantiles: list[float], factor: float) -> None:
    prediction = torch.zeros(1, len(quantiles), requires_grad=True)
    losses.pinball(prediction, torch.ones(1), quantiles, reduction="sum").backward()
    assert prediction.grad is not None
    found = -prediction.grad[0] / torch.tensor(quantiles)
    torch.testing.assert_close(found, torch.full_like(found, factor), rtol=1e-3, atol=0)


def test_each_quantile_has_rms_1_where_asked() -> None:
    start = losses.quantile_bias(DECILES)
    for centered, begin in ((False, torch.zeros(9)), (True, start)):
        prediction = begin.expand(N, D, 9).clone().requires_grad_()
        losses.pinball(prediction, TARGET, DECILES, centered=centered, per_quantile=True).backward()
        assert prediction.grad is not None
        columns = prediction.grad.square().mean((0, 1)).sqrt()
        torch.testing.assert_close(columns, torch.ones(9), rtol=0.03, atol=0)


def test_pinball_is_its_equation_for_a_tensor_of_quantiles_and_any_shape() -> None:
    qs = torch.tensor([0.2, 0.7])
    prediction, target = normal(3, 5, 2), normal(3, 5, seed=1)
    u = target[..., None] - prediction
    wanted = torch.where(u > 0, qs * u, (qs - 1) * u)
    torch.testing.assert_close(losses.pinball(prediction, target, qs, reduction="none"), wanted)
    torch.testing.assert_close(losses.pinball(prediction, target, qs), wanted.mean())
    one = losses.pinball(torch.zeros(2), torch.tensor(1.0), qs)
    torch.testing.assert_close(one, torch.tensor(0.45))


def quantile_head(centered: bool) -> tuple[float, float]:
    """RMS of the logits' gradients, and of the readout's bias gradient at the optimizer."""
    layer = umup.layers.LinearReadout(64, D * 9)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(2))
        if centered:
            layer.bias.copy_(losses.quantile_bias(DECILES).repeat(D))
    y = layer(normal(N, 64)).unflatten(-1, (D, 9))
    y.retain_grad()
    losses.pinball(y, TARGET, DECILES, centered=centered).backward()
    return rms(y.grad), rms(layer.bias.grad) / N**0.5


def test_deciles_that_begin_at_their_quantiles_leave_the_bias_near_1_and_others_do_not() -> None:
    pooled, bias = quantile_head(centered=True)
    assert abs(pooled - 1) <= 0.02 and bias <= 1.2
    pooled, bias = quantile_head(centered=False)
    assert abs(pooled - 1) <= 0.02 and bias > 20  # the batch agrees: N^1/2 |1/2 - q|


def test_quantiles_of_a_sample() -> None:
    found = losses.quantile_bias([0.25, 0.5], torch.arange(101.0))
    torch.testing.assert_close(found, torch.tensor([25.0, 50.0]))


# ------------------------------------------------------------------ any loss


def cubic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs() ** 3


def test_any_loss_is_calibrated_once_and_frozen() -> None:
    loss = umup.unit_loss(cubic)
    assert abs(grad_rms(lambda y: loss(y, TARGET), FRESH) - 1) < 1e-5
    assert loss.report is not None
    assert loss.report.rms == pytest.approx(3 * 3**0.5, rel=0.03)  # E[(3 u^2)^2] = 27
    frozen = loss.grad_multiplier
    loss(FRESH, 100 * TARGET)
    assert loss.grad_multiplier == frozen
    torch.testing.assert_close(loss(FRESH, TARGET), cubic(FRESH, TARGET).sum())
    summed = umup.unit_loss(lambda y, t: cubic(y, t).sum())
    summed.calibrate(FRESH, TARGET)
    assert summed.grad_multiplier == frozen


@pytest.mark.parametrize(
    ("fn", "target", "factor"),
    [
        (F.mse_loss, TARGET, 0.5),
        (F.l1_loss, TARGET, 1.0),
        (F.binary_cross_entropy_with_logits, BINARY, 2.0),
        (F.cross_entropy, classes(N, vocab=D), D / (D - 1) ** 0.5),
    ],
)
def test_torchs_losses_have_closed_forms_and_are_summed(
    fn: Any, target: Tensor, factor: float
) -> None:
    loss = umup.unit_loss(fn)
    torch.testing.assert_close(loss(FRESH, target), fn(FRESH, target, reduction="sum"))
    assert loss.grad_multiplier == factor and loss.report is None


def test_a_loss_with_options_of_its_own_is_measured() -> None:
    loss = umup.unit_loss(F.huber_loss)
    value = loss(FRESH, TARGET, reduction="sum", delta=0.5)
    torch.testing.assert_close(value, F.huber_loss(FRESH, TARGET, reduction="sum", delta=0.5))
    assert loss.grad_multiplier == pytest.approx(1 / losses.huber_rms(0.5, 1.0), rel=0.02)


def test_the_report_shows_when_a_batch_agrees() -> None:
    def pinball90(prediction: Tensor, target: Tensor) -> Tensor:
        u = target - prediction
        return torch.maximum(0.9 * u, -0.1 * u)

    loss = umup.unit_loss(pinball90)
    agreed = loss.calibrate(FRESH, TARGET)
    assert agreed.bias_grad > 30 and "predictions all move one way" in str(agreed)
    begun = losses.quantile_bias([0.9]).expand(N, D)
    fine = loss.calibrate(begun, TARGET)
    assert 0.5 < fine.bias_grad < 1.6 and "one way" not in str(fine)


def test_padding_is_no_part_of_the_calibration() -> None:
    mask = (torch.arange(N) < N // 4).float()[:, None]
    loss = umup.unit_loss(lambda y, t: mask * cubic(y, t))
    report = loss.calibrate(FRESH, TARGET)
    assert report.rows == N // 4
    assert report.rms == pytest.approx(3 * 3**0.5, rel=0.05)


LONG = normal(2, 40, D, seed=2)
MASKS = {axis: (torch.arange(n) < n // 4).float() for axis, n in enumerate((64, 128))}
IMAGES, PIXELS = torch.zeros(3, 5, 4, 6), torch.arange(72).view(3, 4, 6) % 5
SUMS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], Tensor]] = {
    "a closure": (lambda y: cubic(y, TARGET).sum(), (), FRESH),
    "a dict": (lambda y, b: cubic(y, b["y"]).sum(), ({"y": TARGET},), FRESH),
    "one sequence": (lambda y, t: cubic(y, t).sum(), (LONG[:1],), torch.zeros(1, 40, D)),
    "weights of features": (
        lambda y, t: (torch.ones(1, D) * cubic(y, t)).sum(),
        (LONG[:1],),
        torch.zeros(1, 40, D),
    ),
    "images": (lambda y, t: F.cross_entropy(y, t, reduction="sum"), (PIXELS,), IMAGES),
    "means over features": (lambda y, t: cubic(y, t).mean(-1).sum(), (LONG,), 0 * LONG),
}
MEANS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], Tensor]] = {
    "one sequence": (lambda y, t: cubic(y, t).mean(), (LONG[:1],), torch.zeros(1, 40, D)),
    "a closure": (lambda y: cubic(y, TARGET).mean(), (), FRESH),
    "a mask": (
        lambda y, t, m: (cubic(y, t) * m[:, None]).sum() / m.sum(),
        (TARGET[:64], MASKS[0]),
        FRESH[:64],
    ),
    "a mask in a closure": (
        lambda y, t: (cubic(y, t) * MASKS[0][:, None]).sum() / MASKS[0].sum(),
        (TARGET[:64],),
        FRESH[:64],
    ),
    "over time, summed over sequences": (
        lambda y, t: cubic(y, t).mean(1).sum(),
        (LONG,),
        torch.zeros_like(LONG),
    ),
    "images": (F.cross_entropy, (PIXELS,), IMAGES),
    "numbers": (lambda y, t: cubic(y, t).mean(), (TARGET[:, 0],), FRESH[:, 0]),
}


@pytest.mark.parametrize("what", SUMS)
def test_a_sum_is_taken_wherever_its_targets_come_from(what: str) -> None:
    fn, args, prediction = SUMS[what]
    loss = umup.unit_loss(partial(fn))
    assert grad_rms(lambda y: loss(y, *args), prediction) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_of_ones_own_is_made_in_fp32(dtype: torch.dtype) -> None:
    fresh, ones = torch.zeros(70_000, dtype=dtype), torch.ones(70_000, dtype=dtype)
    for fn in (lambda y, t: (y - t["y"]).square().sum(), lambda y, t: (y - t["y"]).square()):
        assert umup.unit_loss(fn)(fresh, {"y": ones}).item() == 70_000
        assert umup.unit_loss(fn).calibrate(fresh, {"y": ones}).rms == 2
    summed = umup.unit_loss(F.smooth_l1_loss)(fresh, ones, reduction="sum")
    assert summed.dtype == torch.float32 and summed.item() == 35_000


@pytest.mark.parametrize("what", MEANS)
def test_a_mean_is_told_from_a_sum_in_any_layout_of_the_batch(what: str) -> None:
    fn, args, prediction = MEANS[what]
    with pytest.raises(ValueError, match=r"returns a mean: with each sample twice along axis \d"):
        umup.unit_loss(partial(fn))(prediction, *args)


@pytest.mark.parametrize("shape", [(64, 1, 1), (1, 128, 1)])
def test_padding_on_any_axis_is_no_part_of_the_calibration(shape: tuple[int, ...]) -> None:
    mask = MASKS[int(shape[0] == 1)].view(shape).expand(64, 128, 1)
    target = normal(64, 128, 8, seed=3)
    report = umup.unit_loss(lambda y, t: mask * cubic(y, t)).calibrate(0 * target, target)
    real = cubic_slope(target[mask[..., 0] > 0])
    assert report.rms == pytest.approx(rms(real), rel=1e-6)
    assert report.rows == len(real)


def test_padded_pixels_are_no_part_of_the_calibration() -> None:
    target = normal(3, 5, 4, 6, seed=3)
    mask = (torch.arange(6) < 3).float()
    report = umup.unit_loss(lambda y, t: mask * cubic(y, t)).calibrate(0 * target, target)
    assert report.rms == pytest.approx(rms(cubic_slope(target[..., :3])), rel=1e-6)


def cubic_slope(residual: Tensor) -> Tensor:
    return 3 * residual.square()


def test_a_loss_is_saved_as_tensors_and_takes_what_was_saved_as_a_dict() -> None:
    loss, fresh = umup.unit_loss(cubic), umup.unit_loss(cubic)
    assert all(isinstance(value, Tensor) for value in loss.state_dict().values())
    fresh.load_state_dict(loss.state_dict())
    assert fresh.grad_multiplier is None and fresh.report is None
    loss.calibrate(FRESH, TARGET)
    assert all(isinstance(value, Tensor) for value in loss.state_dict().values())
    report = {"rms": 2.0, "grad_multiplier": 0.5, "bias_grad": 1.0, "rows": 7}
    fresh.load_state_dict({"_extra_state": {"grad_multiplier": 0.5, "report": report}})
    assert fresh.report == losses.LossReport(**report) and fresh.grad_multiplier == 0.5  # type: ignore[arg-type]
    given = umup.unit_loss(cubic, grad_multiplier=0.25)
    fresh.load_state_dict(given.state_dict())
    assert fresh.grad_multiplier == 0.25 and fresh.report is None


def test_the_multiplier_is_saved_with_the_model_that_holds_the_loss() -> None:
    model = nn.ModuleDict({"loss": umup.unit_loss(cubic)})
    model["loss"].calibrate(FRESH, TARGET)  # type: ignore[operator]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.ModuleDict({"loss": umup.unit_loss(cubic)})
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other["loss"].grad_multiplier == model["loss"].grad_multiplier
    assert other["loss"].report == model["loss"].report
    assert "cubic, grad_multiplier=0.19" in repr(other)


# ------------------------------------------------------------------ bad input


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "quantiles out of range": (
        lambda: losses.pinball(FRESH[..., None], TARGET, [1.0]),
        ValueError,
        r"quantiles=\[1.0\]; they must be numbers between 0 and 1",
    ),
    "no quantile": (lambda: losses.quantile_bias([]), ValueError, r"quantiles=\[\]"),
    "another number of quantiles": (
        lambda: losses.pinball(FRESH, TARGET, DECILES),
        ValueError,
        r"prediction is \[4096, 16\] and target \[4096, 16\] with 9 quantiles",
    ),
    "shapes that would broadcast": (
        lambda: losses.mse_loss(torch.zeros(4), torch.zeros(4, 1)),
        ValueError,
        r"prediction is \[4\] and target \[4, 1\]; broadcast them yourself",
    ),
    "an unknown reduction": (
        lambda: losses.l1_loss(FRESH, TARGET, reduction="avg"),  # type: ignore[arg-type]
        ValueError,
        "reduction='avg'; use 'mean', 'sum' or 'none'",
    ),
    "one class": (
        lambda: losses.cross_entropy(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)),
        ValueError,
        "cross entropy over 1 classes has no gradient",
    ),
    "a residual of 0": (
        lambda: losses.mse_loss(FRESH, TARGET, residual_std=0.0),
        ValueError,
        "residual_std=0.0; it must be positive",
    ),
    "equal targets": (
        lambda: losses.kl_div(FRESH, TARGET, target_std=0.0),
        ValueError,
        "target_std=0.0; equal target logits have no gradient",
    ),
    "a mean": (
        lambda: umup.unit_loss(lambda y, t: cubic(y, t).mean())(FRESH, TARGET),
        ValueError,
        r"<lambda> returns a mean: with each sample twice along axis 0 each gradient is 0.50 times",
    ),
    "a sum of which nothing can be told": (
        lambda: umup.unit_loss(lambda y, t: cubic(y.view(N, D), t).sum())(FRESH, TARGET),
        ValueError,
        r"<lambda> returns one number and does not run on a batch with each sample twice",
    ),
    "no gradient": (
        lambda: umup.unit_loss(cubic)(FRESH, FRESH),
        ValueError,
        "the gradient of cubic has RMS 0.0 on the calibration batch",
    ),
    "a multiplier of 0": (
        lambda: umup.unit_loss(cubic, grad_multiplier=0.0),
        ValueError,
        "grad_multiplier=0.0; it must be positive and finite",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_what_was_seen(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_linear_cross_entropy_takes_a_readout_as_it_is(multiplier: float) -> None:
    hidden, targets = normal(9, 16).requires_grad_(), torch.arange(9)
    readout = umup.layers.LinearReadout(16, 50, multiplier=3.0)
    nn.init.normal_(readout.bias)
    options: Any = {"multiplier": multiplier}
    expected = losses.cross_entropy(readout(hidden), targets, reduction="sum", **options)
    leaves = [hidden, readout.weight, readout.bias]
    grads = torch.autograd.grad(expected, leaves)
    loss, _ = losses.linear_cross_entropy(hidden, readout, targets, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), grads)
    with pytest.raises(TypeError, match="bias is given beside a module as weight"):
        losses.linear_cross_entropy(hidden, readout, targets, bias=readout.bias)
    readout.constraint = "gmean"
    with pytest.raises(ValueError, match=r"constraint='gmean', .*Take cross_entropy\(readout"):
        losses.linear_cross_entropy(hidden, readout, targets)
    plain: Any = nn.Linear(16, 50)
    with pytest.raises(TypeError, match=r"whose forward is .*\.Linear\.forward and not LinearRead"):
        losses.linear_cross_entropy(hidden, plain, targets)


def test_a_matrix_of_the_loss_that_looks_like_a_sample_is_left_whole() -> None:
    """Features of 6 beside 6 places: taken for places, the matrix would not fit any more."""
    y, matrix = torch.randn(4, 6, 6, requires_grad=True), torch.randn(3, 6)
    summed = umup.unit_loss(lambda y: (y @ matrix.T).pow(2).sum())
    assert summed.calibrate(y).rms > 0
    mean_of_places = umup.unit_loss(lambda y: (y @ matrix.T).pow(2).sum((0, 2)).mean())
    with pytest.raises(ValueError, match="returns a mean: with each sample twice along axis 1"):
        mean_of_places.calibrate(y)


def test_classes_on_other_axes_than_logits_are_doubled_with_them() -> None:
    logits, classes = torch.randn(4, 5, 6, requires_grad=True), torch.randint(5, (4, 6))
    loss = umup.unit_loss(lambda y, t: F.nll_loss(y.log_softmax(1), t, reduction="sum"))
    assert loss.calibrate(logits, classes).rms > 0


def test_what_a_loss_makes_itself_is_not_doubled() -> None:
    """Eight totals, as many as there were samples, and a matrix that takes eight."""
    matrix = torch.randn(3, 8)

    def segments(y: Tensor) -> Tensor:
        total = y.new_zeros(8, 3).index_add(0, torch.arange(len(y)) % 8, y)
        return (matrix @ total).pow(2).sum()

    assert umup.unit_loss(segments).calibrate(torch.randn(8, 3, requires_grad=True)).rms > 0
