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

`in_torch` does it in several passes; on a CUDA device `by_kernels` makes two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixprec.cross_entropy.vocab_shard import VocabShard

__all__ = [
    "NO_CLASS",
    "LossTerms",
    "Row",
    "Rows",
    "cap_",
    "first_class",
    "first_of",
    "front_of_rows",
    "row_of",
    "wide",
]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: FP32, or FP64 for FP64."""
    return torch.promote_types(dtype, torch.float32)


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


def front_of_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of the shape of `logits` in the memory of each row: all of it, or the front half."""
    return logits.view(dtype)[:, : logits.shape[1]]


def first_class(
    best: Tensor | None, top: Tensor, highest: Tensor, shard: VocabShard
) -> Tensor | None:
    """The first class of all shards whose logit is the highest; `best` are columns of this one."""
    if best is None or shard.whole:
        return best
    candidates = (best + shard.start).where(top >= highest, NO_CLASS)
    # NaN is larger than any number, as in torch, whether a reduction over ranks keeps it or not.
    return first_of(torch.where(top.isnan(), best + shard.start - _AHEAD, candidates), shard)


NO_CLASS = torch.iinfo(torch.int64).max
_AHEAD = 2**62


def first_of(candidates: Tensor, shard: VocabShard) -> Tensor:
    """The least of all shards' candidates for each token, of those of NaN if there are any."""
    found = -shard.reduce_(-candidates, "max")
    return torch.where(found < 0, found + _AHEAD, found)


def cap_(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Cap `logits` in place; the slope of the cap, or None without one."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


class Row(NamedTuple):
    """Of each token, over all shards: `dloss/dz_c = mass p_c - hit [c = y] - spread w_c`."""

    losses: Tensor
    lse: Tensor
    total: Tensor
    """Sum of exponentials below the largest logit."""
    mass: Tensor
    hit: Tensor
    spread: Tensor


def row_of(
    top: Tensor,
    total: Tensor,
    picked: Tensor,
    weighted: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    shard: VocabShard,
) -> Row:
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
    return Row(losses * factor, lse, total, mass * factor, hit * factor, spread * factor)
