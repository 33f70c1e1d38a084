"""What has a kernel on a GPU, in plain torch: the twin of `by_kernels`, of the same functions."""

from __future__ import annotations

import torch
from torch import Tensor

from mixprec.cross_entropy.rows import LossTerms, Rows, cap_, first_class, row_of, wide
from mixprec.cross_entropy.vocab_shard import VocabShard

__all__ = [
    "add_by_class_",
    "dtype_of_slab",
    "rows_",
    "scale_",
    "target_logits",
    "write_multiples_of_rows_",
]

_FEWEST_TOKENS = 512
"""At once, where each takes a row of the weight."""

_BLOCK = 2**20  # elements widened at once


def dtype_of_slab(logits_dtype: torch.dtype) -> torch.dtype:
    """What a product writes logits in, which then are rounded to `logits_dtype`."""
    return wide(logits_dtype)


def target_logits(hidden: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    """`hidden[i] @ matrix[labels[i]]` in FP32; those of a label of -1 mean nothing."""
    dtype = wide(hidden.dtype)
    chunks = zip(hidden.split(_FEWEST_TOKENS), labels.split(_FEWEST_TOKENS), strict=True)
    return torch.cat(
        [
            (states.to(dtype) * matrix[classes.clamp(min=0)].to(dtype)).sum(1)
            for states, classes in chunks
        ]
    )


def rows_(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    target_logits: Tensor | None,
    rounded_to: torch.dtype | None,
    argmax: bool,
    shard: VocabShard,
) -> Rows:
    """See `softmax.softmax_gradient_`."""
    bias, class_weight, label_smoothing, softcap, _ = terms
    here, column = targets >= 0, targets.clamp(min=0)[:, None]
    if target_logits is not None:
        rounded = logits.gather(1, column).squeeze(1)
        logits.scatter_(1, column, target_logits.where(here, rounded)[:, None])
    if bias is not None:
        logits.add_(bias)
    slope = cap_(logits, softcap)
    picked = logits.gather(1, column).squeeze(1)
    weighted = torch.zeros_like(picked)
    if label_smoothing:
        weighted = logits.sum(1) if class_weight is None else logits @ class_weight
    here_top, best = logits.max(1) if argmax else (logits.amax(1), None)
    top = shard.reduce_(here_top.clone(), "max")
    argmaxes = first_class(best, here_top, top, shard)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    row = row_of(top, total, picked, weighted, targets, terms, token_weight, shard)
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


def write_multiples_of_rows_(
    out: Tensor, factors: Tensor, matrix: Tensor, classes: Tensor, addends: Tensor | None
) -> None:
    """`out[i] = factors[i] * matrix[classes[i]] + addends[i]`; at a class of -1 factors are 0."""
    products = matrix[classes.clamp(min=0)] * factors[:, None]
    out.copy_(products if addends is None else products.add_(addends))


def add_by_class_(sums: Tensor, labels: Tensor, factors: Tensor, states: Tensor) -> None:
    """`sums[labels[i]] += factors[i] * states[i]` for all i whose label is not -1."""
    for rows in (labels >= 0).nonzero().squeeze(1).split(_FEWEST_TOKENS):
        sums.index_add_(0, labels[rows], factors[rows, None] * states[rows])


def scale_(grad: Tensor, factor: Tensor) -> None:
    """`grad * factor` in FP32, in place: a 16-bit `mul_` may round the factor first."""
    if grad.dtype == factor.dtype:
        grad.mul_(factor)
    else:
        for block in grad.view(-1).split(_BLOCK):
            block.copy_(block.to(factor.dtype) * factor)
