"""The loss of each row of logits and its gradient in their place, by whoever does it here.

`rows` has the equations. What a GPU has kernels for stands in two modules of the same functions,
`in_torch` and `by_kernels`, of which `twin` gives one.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mixprec.cross_entropy import in_torch
from mixprec.cross_entropy.rows import NO_CLASS, LossTerms, Rows, first_of, row_of
from mixprec.cross_entropy.vocab_shard import VocabShard
from mixprec.devices import has_triton

__all__ = ["softmax_gradient_", "twin"]


def twin(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """`by_kernels` where there are kernels for numbers of this kind, FP64 has none; `in_torch`."""
    if device.type == "cuda" and dtype != torch.float64 and has_triton():
        from mixprec.cross_entropy import by_kernels  # imports Triton

        return by_kernels
    return in_torch


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
    rows: Rows = twin(logits.device, logits.dtype).rows_(
        logits, targets, terms, token_weight, target_logits, rounded_to, argmax, shard
    )
    return rows


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
    argmaxes = torch.zeros_like(targets) if argmax else None
    if argmaxes is not None and not shard.whole:  # -inf may be the highest, but not here
        argmaxes = first_of(torch.full_like(targets, NO_CLASS), shard)
    row = row_of(top, none, none, none, targets, terms, token_weight, shard)
    gradient = None if rounded_to is None else logits.to(rounded_to)
    return Rows(row.losses, row.lse, gradient, None if gradient is None else none, argmaxes)
