"""The loss of each row of logits, and the gradient of those losses in the place of the logits.

For one token with logits z, target y and log-sum-exp l,

    loss = a (l - z_y) + s sum_c w_c (l - z_c) + z_loss l^2
    dloss/dz_c = (a + s sum_c w_c + 2 z_loss l) p_c - a [c = y] - s w_c,    p = softmax(z)

with class weights w, s = label_smoothing / V and a = (1 - label_smoothing) w_y; plainly p - onehot.
That is the gradient of a sum, at unit scale: its p are as large as they get, so FP16 flushes the
fewest. What the loss is multiplied by later comes to the gradients in FP32, after the products.

The gradient rounds to the 16 bits that products read, and one entry of a row should not: p - 1, at
the target, is 1 in size, and a p below 2^-9 is less than half its spacing in BF16. Rounding takes
all of p, from every token that the model does not expect, always in the same direction. So what it
takes there is returned as well, to be added to the products in FP32.

Here in plain torch, with several passes; on a CUDA device a kernel makes two.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LossTerms", "Rows", "has_kernel", "softmax_gradient_"]


class LossTerms(NamedTuple):
    """What a loss is made of besides logits and targets."""

    bias: Tensor | None = None
    """`[vocab]`, added to the logits."""
    class_weight: Tensor | None = None
    """`[vocab]`, of the dtype of the losses; weights the cross entropy, not the z-loss."""
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0


class Rows(NamedTuple):
    """What became of a chunk of logits; FP32 vectors `[tokens]` (FP64 for FP64)."""

    losses: Tensor
    log_sum_exps: Tensor
    gradient: Tensor | None
    """`[tokens, vocab]`, in the memory of the logits where that can be."""
    remainders: Tensor | None
    """What rounding took from the gradient at the target of each row."""


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of logits of this kind have a kernel; FP64 has none."""
    return device.type == "cuda" and dtype != torch.float64 and _has_triton()


def softmax_gradient_(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None = None,
    *,
    rounded_to: torch.dtype | None = None,
) -> Rows:
    """Losses of `logits`, whose memory becomes the gradient of their sum.

    Args:
        logits: `[tokens, vocab]`, before bias and softcap; FP32 or FP64, or 16 bits for a kernel;
            overwritten.
        targets: `[tokens]`, int64, all in `[0, vocab)`.
        token_weight: `[tokens]`, of the dtype of the losses; multiplies losses and gradients.
        rounded_to: dtype of the gradient; on a CPU, which multiplies it in FP32, only its values
            are rounded. None computes no gradient, and leaves `logits` with no meaning.

    >>> import torch
    >>> logits = torch.zeros(1, 4)
    >>> rows = softmax_gradient_(logits, torch.tensor([2]), LossTerms(), rounded_to=logits.dtype)
    >>> logits
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    if has_kernel(logits.device, logits.dtype):
        return _by_kernel(logits, targets, terms, token_weight, rounded_to)
    return _in_plain_torch(logits, targets, terms, token_weight, rounded_to)


def _by_kernel(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    rounded_to: torch.dtype | None,
) -> Rows:
    from mixprec import cross_entropy_kernels as kernels

    gradient = None if rounded_to is None else front_of_rows(logits, rounded_to)
    losses, lse, remainders = kernels.loss_and_gradient_(
        logits, gradient, targets, token_weight, *terms
    )
    return Rows(losses, lse, gradient, None if gradient is None else remainders)


def front_of_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of the shape of `logits` in the memory of each row: all of it, or the front half."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _in_plain_torch(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    rounded_to: torch.dtype | None,
) -> Rows:
    bias, class_weight, label_smoothing, softcap, z_loss = terms
    vocab = logits.shape[1]
    if bias is not None:
        logits.add_(bias)
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = None if rounded_to is None else 1 - logits.square()
        logits.mul_(softcap)
    column = targets[:, None]
    picked = logits.gather(1, column).squeeze(1)
    spread = label_smoothing / vocab
    weighted: Tensor | float = 0.0
    if spread:
        weighted = logits.sum(1) if class_weight is None else logits @ class_weight

    top = logits.amax(1)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    lse = top + total.log()

    factor = torch.ones_like(lse) if token_weight is None else token_weight
    target_weight: Tensor | float = 1.0
    weight_sum: Tensor | float = float(vocab)
    if class_weight is not None:
        target_weight, weight_sum = class_weight[targets], class_weight.sum()
    hit = (1 - label_smoothing) * target_weight
    losses = hit * (lse - picked) + spread * (weight_sum * lse - weighted) + z_loss * lse.square()
    losses *= factor
    if rounded_to is None:
        return Rows(losses, lse, None, None)

    mass = factor * (hit + spread * weight_sum + 2 * z_loss * lse)
    logits.mul_((mass / total)[:, None])
    if spread:
        taken = spread * factor[:, None]
        logits.sub_(taken if class_weight is None else taken * class_weight)
    logits.scatter_add_(1, column, -(hit * factor)[:, None])
    if slope is not None:
        logits.mul_(slope)
    at_target = logits.gather(1, column).squeeze(1)
    rounded = logits.to(rounded_to)
    gradient = logits.copy_(rounded) if logits.device.type == "cpu" else rounded
    return Rows(losses, lse, gradient, at_target - gradient.gather(1, column).squeeze(1))
