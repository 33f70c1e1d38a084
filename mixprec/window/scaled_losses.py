"""Telling a loss that a scaler has multiplied from one that carries no loss scale yet.

Whoever multiplies a loss takes the factor off again at the step, once. A loss that is multiplied
twice, by hand and by an accumulator, gives gradients that are too large by the loss scale, 65536 at
first, and nothing else shows it. So the product's node in the autograd graph is marked, and
whoever is about to multiply looks for marks near the root of the graph that it was given.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_scaled", "mark_scaled"]

_MARK = "mixprec: carries a loss scale"

_NODES = 32
"""How many nodes to look at: a product that was cast, reshaped, or added up with a few others."""


def mark_scaled(product: Tensor) -> Tensor:
    """`product`, known from now on to carry a loss scale."""
    node: Any = product.grad_fn
    if node is not None and not torch.compiler.is_compiling():
        node.metadata[_MARK] = True
    return product


def is_scaled(loss: Tensor) -> bool:
    """Whether a marked product is among the nodes nearest to the root of `loss`.

    >>> weight = torch.ones((), requires_grad=True)
    >>> is_scaled(weight * 2), is_scaled((mark_scaled(weight * 2).reshape(1) + 1).sum())
    (False, True)
    """
    if torch.compiler.is_compiling():
        return False
    waiting: deque[Any] = deque([loss.grad_fn])
    for _ in range(_NODES):
        if not waiting:
            break
        node = waiting.popleft()
        if node is None:
            continue
        if _MARK in node.metadata:
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False
