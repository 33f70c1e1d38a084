"""Which parameters step by programs now: those that can, as often as they have a gradient.

This is asked at every step, for thousands of parameters perhaps. From one step to the next little
changes, so the answer is kept, with a guard on how the gradients look. Who keeps an answer of his
own for these gradients goes by `Members.kind`, and need not look at them again.

What is kept knows parameters by their places, and hears when one of them dies: nothing here keeps a
parameter alive that its user has dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mixprec.devices import is_capturing
from mixprec.optimizer.fused.guard import Guard

__all__ = ["NOBODY", "Candidates", "Members", "Watch"]


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


class Watch:
    """Hears when one of these tensors dies, so that what was made for them can be dropped.

    While all are alive, no other object has the `id` of one of them.
    """

    def __init__(self, tensors: Iterable[Tensor], drop: Callable[[], None] | None = None) -> None:
        self._died = died = [False]

        def tell(_: object) -> None:
            died[0] = True
            if drop is not None:
                drop()

        self._refs = [weakref.ref(tensor, tell) for tensor in tensors]

    @property
    def died(self) -> bool:
        return self._died[0]

    def tensors(self) -> list[Tensor]:
        """Those that are alive."""
        return [tensor for tensor in (ref() for ref in self._refs) if tensor is not None]


class Candidates:
    """Parameters that step by programs as often as they have a gradient, and the others."""

    def __init__(
        self, groups: list[list[Tensor]], fused: list[tuple[int, Tensor]], *, deferred: bool
    ) -> None:
        self.deferred = deferred
        """Whether others will join once the rule has made their state."""
        flat = list(chain.from_iterable(groups))
        place_of = {id(param): place for place, param in enumerate(flat)}
        self._lengths = list(map(len, groups))
        self._ids = list(map(id, flat))
        self._watch = Watch(flat)
        self._fused = [(index, place_of[id(param)]) for index, param in fused]
        self._share_out(groups)

    def are_of(self, groups: list[list[Tensor]]) -> bool:
        """Whether these groups still hold the same parameters."""
        if self._watch.died or list(map(len, groups)) != self._lengths:
            return False
        return list(map(id, chain.from_iterable(groups))) == self._ids

    def stepping(self, groups: list[list[Tensor]]) -> tuple[Members, list[list[Tensor]]]:
        """Who has a dense gradient now, and for each group who is left to the rule itself."""
        flat = list(chain.from_iterable(groups))
        params = flat if self._all else [flat[place] for place in self._places]
        grads: list[Any] = list(map(_grad, params))
        resting = [_layout(flat[place]) for place in self._resting]
        if not self._guard.holds(grads) or resting != self._layouts:
            params = self._share_out(groups)
            grads = list(map(_grad, params))
        rest = [[flat[place] for place in places] for places in self._rest]
        return Members(self._indices, params, grads, self._kind), rest

    def _share_out(self, groups: list[list[Tensor]]) -> list[Tensor]:
        """Find out who steps, and return them."""
        flat = list(chain.from_iterable(groups))
        layouts = {place: _layout(flat[place]) for _, place in self._fused}
        dense = [(index, place) for index, place in self._fused if layouts[place] == torch.strided]
        self._indices = [index for index, _ in dense]
        self._places = [place for _, place in dense]
        self._all = self._places == list(range(len(flat)))
        self._resting = [place for place, layout in layouts.items() if layout != torch.strided]
        self._layouts = [layouts[place] for place in self._resting]
        ours = {place for place, layout in layouts.items() if layout in (torch.strided, None)}
        numbers = iter(range(len(flat)))
        all_places = [[next(numbers) for _ in params] for params in groups]
        self._rest = [[place for place in places if place not in ours] for places in all_places]
        params = [flat[place] for place in self._places]
        self._guard, self._kind = Guard(list(map(_grad, params))), object()
        return params


def _layout(param: Tensor) -> torch.layout | None:
    """How its gradient is held, if it has one."""
    return None if param.grad is None else param.grad.layout
