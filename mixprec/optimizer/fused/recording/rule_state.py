"""What a rule keeps for a parameter, apart from the values of its elements.

A state entry such as AdamW's holds numbers, known in advance (`step`), and tensors of elements
(`exp_avg`), of which only the names matter here. A `RuleState` is what a step of a recording begins
with and what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixprec.optimizer.fused.program.program import MASTER, NotFusible
from mixprec.optimizer.rule.copies import Copier, Opaque
from mixprec.optimizer.rule.stand_ins import map_leaves


@dataclass(frozen=True)
class Element:
    """The place of a tensor of elements in a list, deque or dict that a rule keeps."""

    name: str


@dataclass(frozen=True)
class RuleState:
    """What a rule keeps for a parameter, without the values of its elements.

    Attributes:
        numbers: entries that are known in advance: step counts, flags, None; collections, with an
            `Element` in the place of each tensor of the parameter's shape.
        elements: names of the tensors of the parameter's shape. One in a collection is called
            `queue[0]` or `buffers[0.9]`, by its index or key.
        reduced: names of the entries that hold one number of the data, and their tensors' shapes.
    """

    numbers: Mapping[str, Any] = field(default_factory=dict)
    elements: tuple[str, ...] = ()
    reduced: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(entry: Mapping[str, Any], param: Tensor, reduced: Collection[str] = ()) -> RuleState:
        """That of a parameter's entry in an optimizer's `state`, without its `master`.

        Args:
            entry: the rule's own entries.
            param: the parameter, for its shape.
            reduced: names of entries that hold numbers of the data, as the rule's recordings or
                its admission give them.

        >>> import torch
        >>> entry = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2)}
        >>> state = RuleState.of(entry, torch.zeros(2, 2))
        >>> state.numbers, state.elements
        ({'step': tensor(3.)}, ('exp_avg',))
        """
        elements: list[str] = []

        def place(name: str, value: Any) -> Any:
            if not _is_like(value, param):
                return value
            elements.append(name)
            return Element(name)

        kept = {k: v for k, v in entry.items() if k != MASTER}
        shapes = {k: tuple(v.shape) for k, v in kept.items() if k in reduced and is_one(v)}
        numbers = {k: map_leaves(place, k, v) for k, v in kept.items() if k not in shapes}
        return RuleState(without_elements(numbers), tuple(elements), shapes)

    def tensors(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of elements and reduced ones in an optimizer's entry, by their names here."""
        names = {*self.elements, *self.reduced}
        found: dict[str, Tensor] = {}

        def take(name: str, value: Any) -> Any:
            if name in names:
                found[name] = value

        for name, value in entry.items():
            map_leaves(take, name, value)
        return found

    def entry(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """An optimizer's entry of this state: its numbers, and `tensors` by their names here.

        >>> import torch
        >>> entry = {"step": 3, "queue": [torch.ones(2)]}
        >>> state = RuleState.of(entry, torch.zeros(2))
        >>> state.elements
        ('queue[0]',)
        >>> state.entry({"queue[0]": torch.zeros(2)})
        {'step': 3, 'queue': [tensor([0., 0.])]}
        """

        placed: set[str] = set()

        def fill(_name: str, value: Any) -> Any:
            if not isinstance(value, Element):
                return own(value)
            placed.add(value.name)
            return tensors[value.name]

        filled = {name: map_leaves(fill, name, value) for name, value in self.numbers.items()}
        names = [name for name in (*self.elements, *self.reduced) if name not in placed]
        return {**filled, **{name: tensors[name] for name in names}}


_IMMUTABLE = frozenset({bool, float, int, str, type(None)})


def own(value: Any) -> Any:
    """A copy of what a rule counts, which a step may change.

    Raises:
        NotFusible: if it has none.
    """
    if type(value) in _IMMUTABLE:
        return value
    if isinstance(value, Tensor):
        return value.detach().clone() if value.is_cpu else value.detach().to("cpu", copy=True)
    try:
        return Copier({}).copy(value)
    except Opaque as held:
        raise NotFusible(f"its state holds {held}, which a recording cannot follow") from None


def is_one(value: Any) -> bool:
    """Whether a value may be a number of the data that a rule keeps."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.dtype == torch.float32


def _is_like(value: Any, param: Tensor) -> bool:
    like = isinstance(value, Tensor) and value.shape == param.shape and param.ndim > 0
    return like and value.is_floating_point()


def without_elements(numbers: dict[str, Any]) -> dict[str, Any]:
    """Without entries that are a tensor of elements themselves."""
    return {name: value for name, value in numbers.items() if not isinstance(value, Element)}
