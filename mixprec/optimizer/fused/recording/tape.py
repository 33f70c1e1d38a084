"""The calls of torch that a recording consists of, kept to play later steps along (`replay`).

A tape holds the very tensors of its recording, which are handed out again at each replay. A rule
that keeps one outside of its state could bring it back in a later step as if it were new;
`Tape.is_held` tells, by counting references. There is no tape of a recording whose scalars cannot
be found again among the arguments of its calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mixprec.optimizer.fused.program.program import GRAD, MASTER, Program
from mixprec.optimizer.fused.recording.calls import Call, Lifted
from mixprec.optimizer.fused.recording.recorder import Recorder, tensors_in
from mixprec.optimizer.fused.recording.rule_state import RuleState


class Diverged(Exception):
    """The rule did something else than the tape says."""


Made = tuple[Program, tuple[int, ...]]
"""A program, and which of the recorded scalars it reads."""


class NumberTensor(NamedTuple):
    """Stands on the tape for any tensor of a number, as its type does for a Python number."""

    dtype: torch.dtype
    shape: torch.Size


Source = float | int | tuple[int | str, int | None]
"""Of a scalar: its value, an argument's index, or its index or keyword and the item of a list."""


@dataclass(slots=True)
class Step:
    """A call that is expected: what `Call` has, with free numbers replaced by what stands for them.

    Attributes:
        sources: where its scalars are found, or their values.
        runs: whether it is carried out.
        returns: which argument it returns, if one.
    """

    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    result: Any
    sources: list[Source]
    runs: bool
    returns: int | str | None


class Tape:
    """A recording to play along.

    Attributes:
        recorder: that wrote it down.
        roots: the parameter, its gradient and its state's tensors, by the names of their values.
        key: which values the parameter and its state ended with.
        made: the program, and which of the scalars it reads.
    """

    def __init__(
        self,
        recorder: Recorder,
        roots: Mapping[str, Tensor],
        state: RuleState,
        key: Any,
        made: Made,
    ) -> None:
        self.recorder, self.roots, self.key, self.made = recorder, roots, key, made
        self._begins = state.elements, state.reduced
        self.states = {name: roots[name] for name in (*state.elements, *state.reduced)}
        self.steps = [_step(recorder, call) for call in recorder.calls]
        self.steps.append(Step(None, [], {}, None, [], runs=False, returns=None))
        self.memories = list({id(t): (t, memory) for t, memory in recorder.named}.values())
        recorder.calls, recorder.named = [], []
        found = list(tensors_in([(step.args, step.kwargs, step.result) for step in self.steps]))
        counts = Counter(map(id, found))
        found += [tensor for tensor, _ in self.memories]
        self.named = {id(tensor): recorder.value_of(tensor) for tensor in found}
        if None in self.named.values():
            raise Diverged  # a number that has to be the same, and nothing would compare it
        lasting = {id(roots[name]) for name in (MASTER, *state.elements)}
        made_here = {id(tensor): (tensor,) for tensor in found if id(tensor) not in lasting}
        counts.update(id(tensor) for tensor, _ in self.memories)
        counts.update(id(tensor) for tensor in (*roots.values(), *self.states.values()))
        owned = {id(roots[GRAD]), *(id(tensor._base) for tensor in found if tensor._is_view())}
        plain, by_torch = _plain_references()
        self._made_here = list(made_here.values())
        self._references = [
            counts[key] + (by_torch if key in owned else plain) for key in made_here
        ]

    def begins_with(self, state: RuleState) -> bool:
        """Whether the recording began with a state of the same tensors."""
        return self._begins == (state.elements, state.reduced)

    def is_held(self) -> bool:
        """Whether anything but the tape refers to a tensor that it made."""
        return _references(self._made_here) != self._references


def _references(tensors: list[tuple[Tensor]]) -> list[int]:
    return [sys.getrefcount(tensor) for (tensor,) in tensors]


def _plain_references() -> list[int]:
    """What is counted for a tensor that only the counter holds, and one that torch holds too."""
    holder = torch.nn.Parameter(torch.zeros(1))
    holder.grad = torch.zeros(1)
    return _references([(torch.zeros(1),), (holder.grad,)])


def tape_of(
    recorder: Recorder, roots: Mapping[str, Tensor], state: RuleState, key: Any, made: Made
) -> Tape | None:
    """A tape of a recording, or None if a replay could not tell whether it does the same."""
    try:
        return Tape(recorder, roots, state, key, made) if recorder.repeats else None
    except Diverged:
        return None


def _step(recorder: Recorder, call: Call) -> Step:
    free = {id(source) for source in call.sources if isinstance(source, Lifted)}
    free -= {id(number) for number in call.lifted if number.looked}

    def expected(value: Any, numbers: Collection[Lifted]) -> Any:
        if not numbers or not all(id(number) in free for number in numbers):
            if numbers and isinstance(value, Tensor):
                raise Diverged  # nothing compares its value
            return value
        if isinstance(value, Tensor):
            return NumberTensor(value.dtype, value.shape)
        return type(value)

    def argument(key: int | str, value: Any) -> Any:
        numbers = [number for number in call.lifted if number.key == key]
        if not isinstance(value, (list, tuple)):
            return expected(value, numbers)
        items: Iterable[Any] = enumerate(value)
        return [expected(v, [n for n in numbers if n.place == i]) for i, v in items]

    args = [argument(index, value) for index, value in enumerate(call.args)]
    kwargs = {key: argument(key, value) for key, value in call.kwargs.items()}
    named = all(recorder.value_of(tensor) for tensor in tensors_in(call.result))
    given = {"out": call.kwargs.get("out"), 0: call.args[0] if call.args else None}
    same = (k for k, v in given.items() if isinstance(v, Tensor) and v is call.result)
    sources = [_source(source) for source in call.sources]
    result = call.result if named else None
    runs = call.is_view or not named
    return Step(call.func, args, kwargs, result, sources, runs, next(same, None))


def _source(source: Lifted | float) -> Source:
    if not isinstance(source, Lifted):
        return source
    simple = source.place is None and isinstance(source.key, int)
    return cast(int, source.key) if simple else (source.key, source.place)
