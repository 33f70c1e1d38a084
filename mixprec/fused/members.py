"""Which parameters step by programs now: those that can, as often as they have a gradient.

This is asked at every step, for thousands of parameters perhaps. From one step to the next little
changes, so the answer is kept, with a guard on how the gradients look. Who keeps an answer of his
own for these gradients goes by `Members.kind`, and need not look at them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from mixprec.devices import is_capturing
from mixprec.fused.guard import Guard

__all__ = ["NOBODY", "Candidates", "Members"]


@dataclass(frozen=True)
class Members:
    """Parameters that step by programs now, each with its group's index and its gradient.

    `kind` is the same object as in another step if the parameters are the same and their gradients
    look the same: type, dtype, device, shape and strides.
    """

    indices: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    kind: object

    @property
    def pairs(self) -> Iterator[tuple[int, Tensor]]:
        return zip(self.indices, self.params, strict=True)

    @property
    def capturing(self) -> bool:
        """Whether a step of these parameters goes into a CUDA graph."""
        return bool(self.params) and is_capturing(self.params[0].device)


NOBODY = Members([], [], [], object())

_grad = attrgetter("grad")


class Candidates:
    """Parameters that step by programs as often as they have a gradient, and the others."""

    def __init__(
        self, groups: list[list[Tensor]], fused: list[tuple[int, Tensor]], *, deferred: bool
    ) -> None:
        self.deferred = deferred
        """Whether others will join once the rule has made their state."""
        self._groups = [list(params) for params in groups]
        self._fused = fused
        self._share_out()

    def are_of(self, groups: list[list[Tensor]]) -> bool:
        """Whether these groups still hold the same parameters."""
        if list(map(len, groups)) != list(map(len, self._groups)):
            return False
        return all(map(is_, chain.from_iterable(groups), chain.from_iterable(self._groups)))

    def stepping(self) -> tuple[Members, list[list[Tensor]]]:
        """Who has a dense gradient now, and for each group who is left to the rule itself."""
        grads: list[Any] = list(map(_grad, self._params))
        if not self._guard.holds(grads) or list(map(_layout, self._resting)) != self._layouts:
            grads = self._share_out()
        return Members(self._indices, self._params, grads, self._kind), self._rest

    def _share_out(self) -> list[Tensor]:
        """Find out who steps, and return their gradients."""
        layouts = {param: _layout(param) for _, param in self._fused}
        dense = [(index, p) for index, p in self._fused if layouts[p] == torch.strided]
        self._indices = [index for index, _ in dense]
        self._params = [param for _, param in dense]
        self._resting = [p for p, layout in layouts.items() if layout != torch.strided]
        self._layouts = [layouts[param] for param in self._resting]
        ours = {p for p, layout in layouts.items() if layout in (torch.strided, None)}
        self._rest = [[p for p in params if p not in ours] for params in self._groups]
        grads: list[Any] = list(map(_grad, self._params))
        self._guard, self._kind = Guard(grads), object()
        return grads


def _layout(param: Tensor) -> torch.layout | None:
    """How its gradient is held, if it has one."""
    return None if param.grad is None else param.grad.layout
