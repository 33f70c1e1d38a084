"""What tests of FP8 layers share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["RECIPES", "run"]

RECIPES = ("static", "adaptive", "tensorwise", "rowwise")


def run(model: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output for `x`, and the gradients of `x` and of each parameter that has one."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    grads = [t.grad for t in (x, *model.parameters())]
    return [y.detach(), *(grad for grad in grads if grad is not None)]
