"""The loss of each row of logits, and the gradient of those losses in the place of the logits.

For one token with logits z, target y and log-sum-exp l,

    loss = a (l - z_y) + s sum_c w_c (l - z_c) + z_loss l^2
    dloss/dz_c = (a + s sum_c w_c + 2 z_loss l) p_c - a [c = y] - s w_c,    p = softmax(z)

with class weights w, s = label_smoothing / V and a = (1 - label_smoothing) w_y; plainly p - onehot.
That is the gradient of a sum, at unit scale: its p are as large as they get, so FP16 flushes the
fewest. What the loss is multiplied by later comes to the gradients in FP32, after the products.

Two numbers of a row are not left to 16 bits. One is the logit of its target, by far the largest
once a model has learnt something: rounded to BF16, a logit of 20 makes its p wrong by up to 6 %.
The other is the gradient at the target, p - 1: it is 1 in size, so a p below 2^-9 is less than half
its spacing in BF16 and gone, from every token that the model does not expect, always in the same
direction. So `target_logits` can be given in FP32, and what rounding takes from the gradient there
is returned, to be added to the products in FP32.

Here in plain torch, with several passes; on a CUDA device a kernel makes two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixprec.cross_entropy.vocab_shard import VocabShard
from mixprec.devices import has_triton

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
    argmaxes: Tensor | None = None
    """Class of the largest logit, int64; the first of several."""


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of logits of this kind have a kernel; FP64 has none."""
    return device.type == "cuda" and dtype != torch.float64 and has_triton()


def softmax_gradient_(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None = None,
    *,
    target_logits: Tensor | None = None,
    rounded_to: torch.dtype | None = None,
    argmax: bool = False,
    shard: VocabShard | None = None,
) -> Rows:
    """Losses of `logits`, whose memory becomes the gradient of their sum.

    Args:
        logits: `[tokens, vocab]`, before bias and softcap; FP32 or FP64, or 16 bits for a kernel;
            overwritten.
        targets: `[tokens]`, int64, all in `[0, vocab)`, or -1 for a class of another shard.
        token_weight: `[tokens]`, of the dtype of the losses; multiplies losses and gradients.
        target_logits: `[tokens]`, of the dtype of the losses; stand in for those of `logits`, which
            were rounded.
        rounded_to: dtype of the gradient; on a CPU, which multiplies it in FP32, only its values
            are rounded. None computes no gradient, and leaves `logits` with no meaning.
        argmax: whether to find the class of the largest logit, after bias and softcap.
        shard: what part of the vocabulary this is; by default all of it.

    >>> import torch
    >>> logits = torch.zeros(1, 4)
    >>> rows = softmax_gradient_(logits, torch.tensor([2]), LossTerms(), rounded_to=logits.dtype)
    >>> logits
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    shard = VocabShard(None, 0, logits.shape[1]) if shard is None else shard
    if not logits.shape[1]:
        return _without_classes(logits, targets, terms, token_weight, rounded_to, argmax, shard)
    arguments = logits, targets, terms, token_weight, target_logits, rounded_to, argmax
    if not has_kernel(logits.device, logits.dtype):
        return _in_plain_torch(*arguments, shard)
    return _by_kernel(*arguments) if shard.whole else _by_kernels_of_a_shard(*arguments, shard)


def front_of_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of the shape of `logits` in the memory of each row: all of it, or the front half."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _by_kernel(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    target_logits: Tensor | None,
    rounded_to: torch.dtype | None,
    argmax: bool,
) -> Rows:
    from mixprec.cross_entropy import softmax_kernels as kernels

    gradient = None if rounded_to is None else front_of_rows(logits, rounded_to)
    argmaxes = torch.empty_like(targets) if argmax else None
    losses, lse, remainders = kernels.loss_and_gradient_(
        logits, gradient, targets, target_logits, token_weight, *terms, argmaxes
    )
    return Rows(losses, lse, gradient, None if gradient is None else remainders, argmaxes)


def _by_kernels_of_a_shard(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    target_logits: Tensor | None,
    rounded_to: torch.dtype | None,
    argmax: bool,
    shard: VocabShard,
) -> Rows:
    from mixprec.cross_entropy import softmax_kernels as kernels

    bias, class_weight, label_smoothing, softcap, _ = terms
    here, column = targets >= 0, targets.clamp(min=0)
    if target_logits is None:
        picked = logits.gather(1, column[:, None]).squeeze(1).float()
    else:
        picked = target_logits.clone()
    if bias is not None:
        picked += bias[column]
    slope = _cap_(picked, softcap)
    best = torch.empty_like(targets) if argmax else None
    top, total, weighted = kernels.sums(
        logits, targets, target_logits, bias, class_weight, label_smoothing, softcap, best
    )
    highest = shard.reduce_(top.clone(), "max")
    argmaxes = _first_class(best, top, highest, shard)
    total *= (top - highest).exp()
    row = _row_of(highest, total, picked, weighted, targets, terms, token_weight, shard)
    if rounded_to is None:
        return Rows(row.losses, row.lse, None, None, argmaxes)
    share = row.mass / row.total
    at_target = share * (picked - highest).exp() - row.hit
    at_target -= row.spread * (1.0 if class_weight is None else class_weight[column])
    if slope is not None:
        at_target *= slope
    gradient = front_of_rows(logits, rounded_to)
    kernels.shard_gradient_(
        logits,
        gradient,
        bias,
        class_weight,
        targets,
        at_target,
        highest,
        share,
        row.spread,
        softcap,
        label_smoothing != 0,
    )
    remainders = at_target - at_target.to(rounded_to)
    return Rows(row.losses, row.lse, gradient, remainders.where(here, 0.0), argmaxes)


def _without_classes(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    rounded_to: torch.dtype | None,
    argmax: bool,
    shard: VocabShard,
) -> Rows:
    """The part of a shard that has no class, in sums and largest values that others wait for."""
    none = torch.zeros_like(targets, dtype=torch.promote_types(logits.dtype, torch.float32))
    if terms.class_weight is not None:
        terms = terms._replace(class_weight=none.new_zeros(1))  # to be read for targets elsewhere
    lowest = torch.full_like(none, -torch.inf)
    top = shard.reduce_(lowest.clone(), "max")
    argmaxes = _first_class(torch.zeros_like(targets) if argmax else None, lowest, top, shard)
    row = _row_of(top, none, none, none, targets, terms, token_weight, shard)
    gradient = None if rounded_to is None else logits.to(rounded_to)
    return Rows(row.losses, row.lse, gradient, None if gradient is None else none, argmaxes)


def _in_plain_torch(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    target_logits: Tensor | None,
    rounded_to: torch.dtype | None,
    argmax: bool,
    shard: VocabShard,
) -> Rows:
    bias, class_weight, label_smoothing, softcap, _ = terms
    here, column = targets >= 0, targets.clamp(min=0)[:, None]
    if target_logits is not None:
        rounded = logits.gather(1, column).squeeze(1)
        logits.scatter_(1, column, target_logits.where(here, rounded)[:, None])
    if bias is not None:
        logits.add_(bias)
    slope = _cap_(logits, softcap)
    picked = logits.gather(1, column).squeeze(1)
    weighted = torch.zeros_like(picked)
    if label_smoothing:
        weighted = logits.sum(1) if class_weight is None else logits @ class_weight
    here_top, best = logits.max(1) if argmax else (logits.amax(1), None)
    top = shard.reduce_(here_top.clone(), "max")
    argmaxes = _first_class(best, here_top, top, shard)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    row = _row_of(top, total, picked, weighted, targets, terms, token_weight, shard)
    if rounded_to is None:
        return Rows(row.losses, row.lse, None, None, argmaxes)

    logits.mul_((row.mass / row.total)[:, None])
    if label_smoothing:
        spread = row.spread[:, None]
        logits.sub_(spread if class_weight is None else spread * class_weight)
    logits.scatter_add_(1, column, -row.hit.where(here, 0.0)[:, None])
    if slope is not None:
        logits.mul_(slope)
    at_target = logits.gather(1, column).squeeze(1)
    rounded = logits.to(rounded_to)
    gradient = logits.copy_(rounded) if logits.device.type == "cpu" else rounded
    remainders = at_target - gradient.gather(1, column).squeeze(1)
    return Rows(row.losses, row.lse, gradient, remainders.where(here, 0.0), argmaxes)


def _first_class(
    best: Tensor | None, top: Tensor, highest: Tensor, shard: VocabShard
) -> Tensor | None:
    """The first class of all shards whose logit is the highest; `best` are columns of this one."""
    if best is None or shard.whole:
        return best
    candidates = (best + shard.start).masked_fill(top < highest, torch.iinfo(torch.int64).max)
    return -shard.reduce_(-candidates, "max")


def _cap_(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Cap `logits` in place; the slope of the cap, or None without one."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


class _Row(NamedTuple):
    """Of each token, over all shards: `dloss/dz_c = mass p_c - hit [c = y] - spread w_c`."""

    losses: Tensor
    lse: Tensor
    total: Tensor
    """Sum of exponentials below the largest logit."""
    mass: Tensor
    hit: Tensor
    spread: Tensor


def _row_of(
    top: Tensor,
    total: Tensor,
    picked: Tensor,
    weighted: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    shard: VocabShard,
) -> _Row:
    """`top` is that of all shards; the sums are those of this one."""
    _, class_weight, label_smoothing, _, z_loss = terms
    target_weight = weight_sum = torch.ones_like(total)
    if class_weight is not None:
        target_weight = class_weight[targets.clamp(min=0)]
        weight_sum = class_weight.sum().expand_as(total)
    here = targets >= 0
    sums = [total, picked.where(here, 0.0), weighted, target_weight.where(here, 0.0), weight_sum]
    total, picked, weighted, target_weight, weight_sum = shard.reduce_(torch.stack(sums), "sum")
    if class_weight is None:
        weight_sum = torch.ones_like(total) * shard.vocab

    log_total = total.log()
    lse = top + log_total
    factor = torch.ones_like(lse) if token_weight is None else token_weight
    hit = (1 - label_smoothing) * target_weight
    spread = label_smoothing / shard.vocab
    losses = hit * ((top - picked) + log_total)  # the first term is exact where p is near 1
    losses += spread * (weight_sum * lse - weighted) + z_loss * lse.square()
    mass = hit + spread * weight_sum + 2 * z_loss * lse
    return _Row(losses * factor, lse, total, mass * factor, hit * factor, spread * factor)
