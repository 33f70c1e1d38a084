"""What has a kernel on a GPU, by that kernel: the twin of `in_torch`, of the same functions."""

from __future__ import annotations

import torch
from torch import Tensor

from mixprec.cross_entropy import softmax_kernels as kernels
from mixprec.cross_entropy.rows import LossTerms, Rows, cap_, first_class, front_of_rows, row_of
from mixprec.cross_entropy.vocab_shard import VocabShard

__all__ = [
    "add_by_class_",
    "dtype_of_slab",
    "rows_",
    "scale_",
    "target_logits",
    "write_multiples_of_rows_",
]

add_by_class_ = kernels.add_products_by_class_
scale_ = kernels.scale_
target_logits = kernels.target_logits
write_multiples_of_rows_ = kernels.multiples_of_rows_


def dtype_of_slab(logits_dtype: torch.dtype) -> torch.dtype:
    """What a product writes logits in: as they are to be."""
    return logits_dtype


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
    arguments = logits, targets, terms, token_weight, target_logits, rounded_to, argmax
    return _whole(*arguments) if shard.whole else _of_a_shard(*arguments, shard)


def _whole(
    logits: Tensor,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    target_logits: Tensor | None,
    rounded_to: torch.dtype | None,
    argmax: bool,
) -> Rows:
    gradient = None if rounded_to is None else front_of_rows(logits, rounded_to)
    argmaxes = torch.empty_like(targets) if argmax else None
    losses, lse, remainders = kernels.loss_and_gradient_(
        logits, gradient, targets, target_logits, token_weight, *terms, argmaxes
    )
    return Rows(losses, lse, gradient, None if gradient is None else remainders, argmaxes)


def _of_a_shard(
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
    here, column = targets >= 0, targets.clamp(min=0)
    if target_logits is None:
        picked = logits.gather(1, column[:, None]).squeeze(1).float()
    else:
        picked = target_logits.clone()
    if bias is not None:
        picked += bias[column]
    slope = cap_(picked, softcap)
    best = torch.empty_like(targets) if argmax else None
    top, total, weighted = kernels.sums(
        logits, targets, target_logits, bias, class_weight, label_smoothing, softcap, best
    )
    highest = shard.reduce_(top.clone(), "max")
    argmaxes = first_class(best, top, highest, shard)
    total *= (top - highest).exp()
    row = row_of(highest, total, picked, weighted, targets, terms, token_weight, shard)
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
