"""Losses whose gradient has RMS 1 when training begins, and `unit_loss` for any other.

A loss is a cut edge: its gradient may be multiplied by a constant of its own. The value that is
returned is the plain loss; the gradient is that of the *sum* over elements, whatever the reduction,
times 1 / RMS of the gradient of one element. That RMS follows from what predictions and targets are
at initialisation: targets of RMS 1, and predictions near 0, as a `LinearReadout` begins.

An element of RMS 1 is not enough where all elements of a batch agree. A quantile loss for q = 0.9
pushes every prediction up until one target in ten lies above; the gradient of the readout's bias is
then N / N^1/2 instead of 1. `pinball` has the remedy, and `unit_loss` reports the number.

Losses of predictions in 16 bits are computed and summed in FP32 and are FP32: in FP16 a sum of
65,520 ones is infinite, and BF16 has two digits. The gradient is rounded once, to the prediction's
dtype. What FP64 has stays FP64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixprec.cross_entropy import linear_cross_entropy as _linear_cross_entropy
from mixprec.cross_entropy.output_layer import weight_and_bias
from mixprec.umup.layers import LinearReadout
from mixprec.umup.scaling import scale_bwd, scale_fwd
from mixprec.umup.unit_loss import LossReport, UnitLoss, unit_loss

__all__ = [
    "LossReport",
    "UnitLoss",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "pinball",
    "quantile_bias",
    "smooth_l1_loss",
    "unit_loss",
]

Reduction = Literal["mean", "sum", "none"]


# ------------------------------------------------------------------ classes


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | LinearReadout,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    multiplier: float = 1.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> tuple[Any, ...]:
    """Cross entropy of a `LinearReadout`, without its logits: their sum, and how many targets.

    Equal to `cross_entropy(linear_readout(hidden, weight, bias), targets)`, with the gradients of
    that: unit scale towards `hidden`, sums over tokens for `weight` and `bias`. By
    `mixprec.linear_cross_entropy`, which takes the other `options`. Padding has neither loss nor
    gradient and is not counted.

    Args:
        hidden, weight, targets, bias: as there, of RMS 1. A `LinearReadout` as the weight is used
            with its bias and its own multiplier.
        multiplier: sharpens the logits, in the forward pass only.
        label_smoothing: as in `F.cross_entropy`; makes gradients smaller, which is made up for.

    >>> import torch
    >>> from mixprec import umup
    >>> hidden, weight = torch.zeros(3, 2), torch.zeros(4, 2)
    >>> loss_sum, n = umup.losses.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -100]))
    >>> round((loss_sum / n).item(), 4)
    1.3863
    """
    if isinstance(weight, nn.Module):
        weight, bias, of_product = _of_readout(weight, bias)
    else:
        of_product = 1.0
    vocab, width = weight.shape
    forward = multiplier * of_product / width
    # The gradients of hidden, weight and bias lack each its own factor. That of the weight goes by
    # the loss's gradient, one number; the others by their own, as far as they differ from it.
    per_weight = _class_multiplier(vocab, label_smoothing) / forward
    hidden = scale_bwd(hidden, vocab**-0.5)
    if bias is not None:
        bias = scale_bwd(scale_fwd(bias, multiplier), forward)
    loss, *counted = _linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        logit_multiplier=forward,
        label_smoothing=label_smoothing,
        **options,
    )
    return scale_bwd(loss, per_weight), *counted


def _of_readout(readout: LinearReadout, bias: Tensor | None) -> tuple[Tensor, Tensor | None, float]:
    """Weight, bias, and the multiplier of their product, which leaves the bias alone."""
    weight, own_bias = weight_and_bias(readout, bias, LinearReadout.forward)
    if readout.constraint is not None:
        raise ValueError(
            f"weight is a LinearReadout with constraint={readout.constraint!r}, whose multipliers "
            f"are others than this loss has. Take cross_entropy(readout(hidden), targets) for it."
        )
    return weight, own_bias, readout.multiplier


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    multiplier: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`F.cross_entropy`, whose gradient is that of the sum, times `V / (V - 1)^1/2`.

    Exact for equal logits. Padding has neither loss nor gradient, and a mean is that over the
    others, as in torch.

    Args:
        logits: `[V]`, `[N, V]` or `[N, V, ...]`; of 16 bits, an FP32 copy is made of them.
        targets: classes, `[]`, `[N]` or `[N, ...]`.
        weight: of each class, `[V]`; of RMS 1, or gradients will have its RMS.
        multiplier: sharpens the logits, in the forward pass only.

    >>> import torch
    >>> from mixprec import umup
    >>> logits = torch.zeros(2, 5, requires_grad=True)
    >>> umup.losses.cross_entropy(logits, torch.tensor([3, -100])).backward()
    >>> logits.grad.square().mean(1)
    tensor([1., 0.])
    """
    classes = logits.shape[min(1, logits.ndim - 1)]
    factor = _class_multiplier(classes, label_smoothing)
    logits = scale_fwd(scale_bwd(_wide(logits), factor), multiplier)
    weight = None if weight is None else weight.to(logits.dtype)
    losses = F.cross_entropy(
        logits,
        targets,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    real = targets != ignore_index
    if weight is None or reduction != "mean":
        return _reduced(losses, reduction, real.sum())
    weights = weight[targets.where(real, 0)].where(real, 0)
    return _reduced(losses, reduction, weights.sum())


def _class_multiplier(classes: int, label_smoothing: float) -> float:
    if classes < 2:
        raise ValueError(
            f"cross entropy over {classes} classes has no gradient; there must be 2 or more"
        )
    # For equal logits, softmax - target has mean square (1 - s)^2 (V - 1) / V^2.
    return classes / ((classes - 1) ** 0.5 * (1 - label_smoothing))


def binary_cross_entropy_with_logits(
    logits: Tensor, target: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """`F.binary_cross_entropy_with_logits`, whose gradient is that of the sum, times 2.

    Exact for logits of 0 and targets that are 0 or 1.

    >>> import torch
    >>> from mixprec import umup
    >>> logits = torch.zeros(2, requires_grad=True)
    >>> umup.losses.binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1.0])).backward()
    >>> logits.grad
    tensor([ 1., -1.])
    """
    logits, target = scale_bwd(_wide(logits), 2.0), _wide(target)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _reduced(losses, reduction)


def kl_div(
    logits: Tensor,
    target_logits: Tensor,
    *,
    target_std: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence from `softmax(target_logits)` to `softmax(logits)`, classes on the last axis.

    The gradient of the sum is multiplied by `V / (exp(target_std^2) - 1)^1/2`, which gives it RMS 1
    for equal `logits` and normal `target_logits` with that deviation, for V of 100 and more.

    Args:
        logits, target_logits: `[..., V]`; detach the second unless it is learned.
        target_std: deviation of the target's logits over classes.
        reduction: a mean is that over all leading axes.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.losses.kl_div(torch.zeros(2, 8), torch.zeros(2, 8))
    tensor(0.)
    """
    _check_shapes(logits, target_logits)
    if not target_std > 0:
        raise ValueError(
            f"target_std={target_std}; equal target logits have no gradient, give their deviation"
        )
    factor = logits.shape[-1] / math.expm1(target_std**2) ** 0.5
    divergence = F.kl_div(
        scale_bwd(_wide(logits), factor).log_softmax(-1),
        _wide(target_logits).log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    return _reduced(divergence.sum(-1), reduction)


# ------------------------------------------------------------------ numbers


def mse_loss(
    prediction: Tensor, target: Tensor, *, residual_std: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """`F.mse_loss`, whose gradient is that of the sum, divided by `2 * residual_std`.

    Args:
        residual_std: deviation of prediction - target when training begins: 1 for a readout that
            begins near 0, 2^1/2 for a prediction that is a unit normal itself.

    >>> import torch
    >>> from mixprec import umup
    >>> prediction = torch.zeros(2, requires_grad=True)
    >>> umup.losses.mse_loss(prediction, torch.tensor([1.0, -1.0])).backward()
    >>> prediction.grad
    tensor([-1.,  1.])
    """
    residual = _residual(prediction, target, 0.5 / _positive("residual_std", residual_std))
    return _reduced(residual.square(), reduction)


def l1_loss(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """`F.l1_loss`, whose gradient is that of the sum: a sign, and at unit scale.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.losses.l1_loss(torch.zeros(2), torch.tensor([1.0, -2.0]))
    tensor(1.5000)
    """
    return _reduced(_residual(prediction, target, 1.0).abs(), reduction)


def huber_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    delta: float = 1.0,
    residual_std: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`F.huber_loss`, whose gradient is that of the sum over its RMS for normal residuals.

    With a = delta / residual_std that mean square is
    `residual_std^2 (2 Phi(a) - 1 - 2 a phi(a)) + 2 delta^2 (1 - Phi(a))`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.losses.huber_loss(torch.zeros(2), torch.tensor([1.0, -2.0]))
    tensor(1.)
    """
    rms = huber_rms(_positive("delta", delta), _positive("residual_std", residual_std))
    residual = _residual(prediction, target, 1 / rms)
    losses = F.huber_loss(residual, torch.zeros_like(residual), delta=delta, reduction="none")
    return _reduced(losses, reduction)


def smooth_l1_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    residual_std: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`F.smooth_l1_loss`, which is `huber_loss` with `delta=beta`, divided by `beta`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.losses.smooth_l1_loss(torch.zeros(2), torch.tensor([1.0, -2.0]), beta=0.5)
    tensor(1.2500)
    """
    loss = huber_loss(
        prediction, target, delta=beta, residual_std=residual_std, reduction=reduction
    )
    return scale_fwd(loss, 1 / beta)


def huber_rms(delta: float, residual_std: float) -> float:
    """RMS of a normal residual with that deviation, clipped to +-delta."""
    normal, a = NormalDist(), delta / residual_std
    inside = residual_std**2 * (2 * normal.cdf(a) - 1 - 2 * a * normal.pdf(a))
    return (inside + 2 * delta**2 * (1 - normal.cdf(a))) ** 0.5


# ------------------------------------------------------------------ quantiles


def pinball(
    prediction: Tensor,
    target: Tensor,
    quantiles: Sequence[float] | Tensor,
    *,
    centered: bool = False,
    per_quantile: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Pinball loss, `max(q u, (q - 1) u)` for `u = target - prediction`, of K quantiles at once.

    The gradient of an element is `1 - q` where the target lies below the prediction and `-q` where
    it lies above. Its mean square, over which the gradient is divided by the root, is

        (q^2 + (1 - q)^2) / 2    where predictions begin at the median
        q (1 - q)                where they begin at the quantile (`centered`)

    Args:
        prediction: `[..., K]`.
        target: `[...]`; detach it unless it is learned.
        quantiles: K numbers between 0 and 1, in the order of the last axis.
        centered: say that predictions begin at their quantiles, by a readout bias from
            `quantile_bias`. Else they begin near the median, where the gradients of a batch have a
            mean of 1/2 - q, and the bias's is larger by the root of the batch.
        per_quantile: gives each quantile's gradient RMS 1, which weighs the K losses anew, by
            2^1/2 at most. The default is one factor for all, and RMS 1 over all.
        reduction: a mean is that over all elements, K included.

    Raises:
        ValueError: for quantiles out of range or of another number, and shapes that do not fit.

    >>> import torch
    >>> from mixprec import umup
    >>> prediction = torch.zeros(2, 1, requires_grad=True)
    >>> umup.losses.pinball(prediction, torch.tensor([1.0, -3.0]), [0.5])
    tensor(1., grad_fn=<_ScaleForwardBackward>)
    """
    qs = _quantiles(quantiles)
    if prediction.shape != (*target.shape, len(qs)):
        raise ValueError(
            f"prediction is {list(prediction.shape)} and target {list(target.shape)} with "
            f"{len(qs)} quantiles; prediction must be [*target.shape, {len(qs)}]"
        )
    squares = [q * (1 - q) if centered else (q**2 + (1 - q) ** 2) / 2 for q in qs]
    residual = _wide(target).unsqueeze(-1) - _wide(prediction)
    q = torch.tensor(qs, dtype=residual.dtype, device=residual.device)
    if not per_quantile:
        residual = scale_bwd(residual, (sum(squares) / len(qs)) ** -0.5)
    losses = torch.maximum(q * residual, (q - 1) * residual)
    if per_quantile:
        pairs = zip(losses.unbind(-1), squares, strict=True)
        losses = torch.stack([scale_bwd(loss, square**-0.5) for loss, square in pairs], -1)
    return _reduced(losses, reduction)


def quantile_bias(quantiles: Sequence[float] | Tensor, targets: Tensor | None = None) -> Tensor:
    """Where to begin the K outputs of a quantile readout: the targets' own quantiles, `[K]` FP32.

    Args:
        quantiles: K numbers between 0 and 1.
        targets: a sample; a unit normal if left out.

    >>> from mixprec import umup
    >>> umup.losses.quantile_bias([0.1, 0.5, 0.9])
    tensor([-1.2816,  0.0000,  1.2816])
    """
    qs = _quantiles(quantiles)
    if targets is None:
        return torch.tensor([NormalDist().inv_cdf(q) for q in qs])
    sample = targets.detach().flatten().float()
    return torch.quantile(sample, torch.tensor(qs, device=sample.device))


def _quantiles(quantiles: Sequence[float] | Tensor) -> list[float]:
    qs = [float(q) for q in quantiles]
    if not qs or not all(0 < q < 1 for q in qs):
        raise ValueError(f"quantiles={qs}; they must be numbers between 0 and 1, and one at least")
    return qs


# ------------------------------------------------------------------ what they share


def _reduced(losses: Tensor, reduction: str, count: Tensor | int | None = None) -> Tensor:
    """The loss, with the gradient of the sum: a mean divides in the forward pass only."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; use 'mean', 'sum' or 'none'")
    total = losses.sum()
    if reduction == "sum":
        return total
    count = losses.numel() if count is None else count
    return scale_fwd(total, 1 / count if isinstance(count, Tensor) or count else math.nan)


def _residual(prediction: Tensor, target: Tensor, factor: float) -> Tensor:
    _check_shapes(prediction, target)
    return scale_bwd(_wide(prediction) - _wide(target), factor)


def _wide(tensor: Tensor) -> Tensor:
    """FP32 for what has less."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction is {list(prediction.shape)} and target {list(target.shape)}; broadcast "
            f"them yourself, because that is how [N] and [N, 1] become N x N by mistake"
        )


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}={value}; it must be positive")
    return value
