"""Which parameters step by programs now: those that can, as often as they have a gradient.

This is asked at every step, for thousands of parameters perhaps, so it goes by `map` and identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from mixprec.fused.launch import is_capturing

__all__ = ["NOBODY", "Candidates", "Members"]


@dataclass(frozen=True)
class Members:
    """Parameters that step by programs now, each with its group's index and its gradient."""

    indices: list[int]
    params: list[Tensor]
    grads: list[Tensor]

    @property
    def pairs(self) -> Iterator[tuple[int, Tensor]]:
        return zip(self.indices, self.params, strict=True)

    @property
    def capturing(self) -> bool:
        """Whether a step of these parameters goes into a CUDA graph."""
        return bool(self.params) and is_capturing(self.params[0].device)


NOBODY = Members([], [], [])

_grad = attrgetter("grad")
_layout = attrgetter("layout")


class Candidates:
    """Parameters that step by programs as often as they have a gradient, and the others."""

    def __init__(
        self, groups: list[list[Tensor]], fused: list[tuple[int, Tensor]], *, deferred: bool
    ) -> None:
        self.deferred = deferred
        """Whether others will join once the rule has made their state."""
        self._groups = [list(params) for params in groups]
        self._indices = [index for index, _ in fused]
        self._params = [param for _, param in fused]
        ours = set(self._params)
        self._rest = [[p for p in params if p not in ours] for params in groups]

    def are_of(self, groups: list[list[Tensor]]) -> bool:
        """Whether these groups still hold the same parameters."""
        if list(map(len, groups)) != list(map(len, self._groups)):
            return False
        return all(map(is_, chain.from_iterable(groups), chain.from_iterable(self._groups)))

    def stepping(self) -> tuple[Members, list[list[Tensor]]]:
        """Who has a dense gradient now, and for each group who is left to the rule itself."""
        grads: list[Any] = list(map(_grad, self._params))
        if not any(map(is_, grads, repeat(None))):
            if set(map(_layout, grads)) <= {torch.strided}:
                return Members(self._indices, self._params, grads), self._rest
        chosen = [
            (index, param, grad)
            for index, param, grad in zip(self._indices, self._params, grads, strict=True)
            if grad is not None and grad.layout == torch.strided
        ]
        members = Members([c[0] for c in chosen], [c[1] for c in chosen], [c[2] for c in chosen])
        rest = [list(params) for params in self._rest]
        for index, param, grad in zip(self._indices, self._params, grads, strict=True):
            if grad is not None and grad.layout != torch.strided:
                rest[index].append(param)
        return members, rest
