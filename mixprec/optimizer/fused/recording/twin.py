"""What a rule's code sees in a step of a probe: all as it is now, and nothing of it the original.

A twin is an optimizer of the same class. Before each step it is given everything that the rule's
code could look at (`rule.code` says by which names): attributes, options, the values of its group,
what it keeps in its state beside parameters, the marks on a parameter. Numbers and functions are
shared, the rest is copied (`rule.copies`), and what no code names is shared too.

After the step both are compared. Values of the group, of shared state, and numbers among the
attributes may have changed: a rule counts there, and the step says what they became. Whatever else
has changed would have changed in the twin only, so such a rule is refused.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.optimizer.fused.program.program import NotFusible
from mixprec.optimizer.fused.recording.kinds import Kinds
from mixprec.optimizer.fused.recording.traps import Untouchable, touched
from mixprec.optimizer.rule.code import code_of
from mixprec.optimizer.rule.copies import Copier, Opaque

__all__ = ["Changes", "Twin"]

# Other ways to do the same: one program serves them all. The plain loop is recorded first; where
# it looks at a norm, the list code may select with `torch.where` instead, to spare the GPU a stop.
_IMPLEMENTATIONS = ("foreach", "fused", "capturable")

_NOT_COUNTERS = ("params", "param_names", *_IMPLEMENTATIONS)

_NOT_GIVEN = ("state", "param_groups", "step")
"""Attributes that a twin has of its own; schedulers put a `step` on the instance."""

_NOT_COUNTED = (*_NOT_GIVEN, "foreach", "_opt_called")

_PLAIN = frozenset({int, float, str, bool, type(None), complex, torch.dtype, torch.device})

_NOTHING: Any = object()


class Changes(NamedTuple):
    """What a step made of counters and the like, where it is not what it was."""

    group: dict[str, Any]
    shared: dict[Any, Any]
    attributes: dict[str, Any]


class Twin:
    """A copy of an optimizer, for one of its groups.

    Attributes:
        kinds: what the rule's code could ask of parameters.
        optimizer: the copy. Of other groups it has the values if the code could see them, and one
            parameter that rests.
    """

    def __init__(self, inner: Optimizer, index: int, kinds: Kinds | None = None) -> None:
        self.kinds = Kinds(code_of(inner)) if kinds is None else kinds
        self.optimizer: Any = object.__new__(type(inner))
        self._inner, self._index = inner, index
        self._params = frozenset(id(p) for group in inner.param_groups for p in group["params"])
        self._spare = nn.Parameter(torch.zeros(2, 3))
        self._group: dict[str, Any] = {}
        self._names = Untouchable("it looks at the names of parameters")
        self._keys: tuple[tuple[int, int, int], list[Any]] = (0, 0, 0), []
        self._copier = Copier({})
        self._marks: Mapping[str, Any] = {}
        self._param: Any = None

    @property
    def shared(self) -> Mapping[Any, Any]:
        """What the rule keeps in its state now, under keys that are no parameters."""
        state = cast(dict[Any, Any], self.optimizer.state)
        return {key: value for key, value in state.items() if not isinstance(key, Tensor)}

    def load(self, param: nn.Parameter, marks: Mapping[str, Any], *, foreach: bool) -> None:
        """Make the twin what the optimizer is now, with `param` for its only parameter.

        Raises:
            NotFusible: if the rule's code could look at something that has no copy.
        """
        self._param, self._marks = param, marks
        groups = self._make_groups(param)
        copied, copier = self._copied, self._copier
        for key in _IMPLEMENTATIONS:
            if key in self._group:
                self._group[key] = foreach and key == "foreach"
        twin = vars(self.optimizer)
        twin.clear()
        for key, value in vars(self._inner).items():
            if key.endswith("_hooks"):
                twin[key] = OrderedDict[Any, Any]()
            elif key not in _NOT_GIVEN:
                twin[key] = copied("its attribute {!r}", key, value)
        if "foreach" in twin:
            twin["foreach"] = foreach
        twin["param_groups"] = groups
        twin["state"] = defaultdict(dict, self._shared())
        held = vars(param)
        held.clear()
        for key, value in marks.items():
            held[key] = copied("the attribute {!r} of a parameter", key, value)
        self._check_code(copier.code)

    def _make_groups(self, param: nn.Parameter) -> list[dict[str, Any]]:
        inner = self._inner
        live = inner.param_groups[self._index]
        group, groups = self._group, [self._group]
        known: dict[int, Any] = {id(inner): self.optimizer, id(live): group}
        pairs = [(live, group)]
        if self.kinds.code.sees_groups and len(inner.param_groups) > 1:
            pairs = [(g, group if g is live else {}) for g in inner.param_groups]
            groups = [made for _, made in pairs]
            known |= {id(given): made for given, made in pairs}
        known[id(inner.param_groups)] = groups
        for given, made in pairs:
            known[id(given["params"])] = [param if made is group else self._spare]
        self._copier = Copier(known, self._params)
        for given, made in pairs:
            made.clear()
            for key, value in given.items():
                if key == "params":
                    made[key] = known[id(value)]
                elif key == "param_names":
                    made[key] = self._names
                else:
                    made[key] = self._copied("its group's {!r}", key, value)
        return groups

    def _copied(self, what: str, key: Any, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        code = self.kinds.code
        if not (code.everything or key in code.names or not isinstance(key, str)):
            return value
        try:
            return self._copier.copy(value)
        except Opaque as held:
            raise NotFusible(
                f"{what.format(key)} holds {held}, which a recording cannot follow"
            ) from None

    def _shared(self) -> dict[Any, Any]:
        state = cast(dict[Any, Any], self._inner.state)
        # A look at every key takes longer than the rest of a step. A new one is the last one.
        seen = id(state), len(state), id(next(reversed(state), None))
        if self._keys[0] != seen or not all(key in state for key in self._keys[1]):
            self._keys = seen, [key for key in state if not isinstance(key, Tensor)]
        return {key: self._copied("its state's {!r}", key, state[key]) for key in self._keys[1]}

    def _check_code(self, met: list[Any]) -> None:
        """Read code that was put somewhere since the rule's code was read."""
        before = self.kinds
        if before.code.knows(met):
            return
        self.kinds = now = Kinds(code_of(self._inner))
        wider = any(new and not old for old, new in zip(_asks(before), _asks(now), strict=True))
        marks = [kinds.marks_in(self._marks).keys() for kinds in (before, now)]
        if wider or marks[0] != marks[1]:
            raise NotFusible("it was given code that asks more of its parameters")

    # ---------------------------------------- after a step

    def changes(self) -> Changes:
        """What the step has made of what it was given.

        Raises:
            NotFusible: if it has changed what is not counted anew for each step.
        """
        inner = self._inner
        if touched(self._names):
            raise NotFusible("it looks at the names of parameters")
        self._check_same("the attribute {!r} of its parameters", self._marks, vars(self._param))
        live = inner.param_groups[self._index]
        group = self._changed("its group's {!r}", live, self._group, _NOT_COUNTERS)
        given = {key: inner.state[key] for key in self._keys[1]}
        shared = self._changed("its state's {!r}", given, self.shared, ())
        theirs, ours = vars(inner), vars(self.optimizer)
        attributes = self._changed("its attribute {!r}", theirs, ours, _NOT_COUNTED)
        for key, value in attributes.items():
            if not _is_plain(value) or not _is_plain(theirs.get(key)):
                raise NotFusible(
                    f"it changes its attribute {key!r} as it steps, where only numbers are counted"
                )
        return Changes(group, shared, attributes)

    def _changed(
        self, what: str, given: Mapping[Any, Any], left: Mapping[Any, Any], apart: tuple[str, ...]
    ) -> dict[Any, Any]:
        """What is in `left` and not as it was `given`."""
        for key in given:
            if key not in left and key not in apart:
                raise NotFusible(f"it deletes {what.format(key)} as it steps")
        return {
            key: value
            for key, value in left.items()
            if value is not (before := given.get(key, _NOTHING))
            and key not in apart
            and not _is_hooks(key)
            and (before is _NOTHING or not self._copier.same(before, value))
        }

    def _check_same(self, what: str, given: Mapping[str, Any], left: Mapping[str, Any]) -> None:
        if given is not left and (given or left):
            for key in self._changed(what, given, left, ()):
                raise NotFusible(f"it changes {what.format(key)} as it steps")


def _asks(kinds: Kinds) -> tuple[bool, ...]:
    code = kinds.code
    return kinds.asks_dimensions, kinds.asks_sizes, code.sees_groups, code.everything


def _is_hooks(key: Any) -> bool:
    return isinstance(key, str) and key.endswith("_hooks")


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or the like, or a tuple of such, which nobody can change."""
    if type(value) is tuple:
        return all(map(_is_plain, cast(tuple[Any, ...], value)))
    return type(value) in _PLAIN
