"""FP32 gradients, which a step multiplies by its factor in place, and may do so once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mixprec.gradients import once, scale_
from mixprec.optimizer.masters import LOW

__all__ = ["ScaledGrads"]


class ScaledGrads:
    """Those that the step at hand, or one that was stopped, has scaled."""

    def __init__(self) -> None:
        self._grads: list[weakref.ref[Tensor]] = []

    def scale(self, factor: Tensor | None, params: Iterable[Tensor]) -> None:
        """Multiply the FP32 gradients of these parameters; 16-bit ones are scaled as they widen."""
        if factor is None:
            return
        grads = once(p.grad for p in params if p.grad is not None and p.grad.dtype not in LOW)
        self._grads += map(weakref.ref, grads)
        scale_(grads, factor)

    def refuse(self, grads: Iterable[Tensor]) -> None:
        """Refuse to step on what was scaled by a step that was stopped; then forget it."""
        scaled = {id(grad) for grad in (ref() for ref in self._grads) if grad is not None}
        if scaled and any(id(grad) in scaled for grad in grads):
            raise RuntimeError(
                "step() on gradients that an unfinished step has scaled in place: they would be "
                "unscaled and clipped twice. Call optimizer.zero_grad() and run the backward pass "
                "again."
            )
        self.forget()

    def forget(self) -> None:
        """The step is over, or its gradients are gone."""
        self._grads = []

    def __reduce__(self) -> tuple[type[ScaledGrads], tuple[Any, ...]]:
        return ScaledGrads, ()  # a copy has no step at hand
