"""Parameters of one age: what a rule counts for them is the same, so it is replayed once for all.

A rule keeps numbers for each parameter (a step count, mostly), and the same ones for nearly all of
them. Parameters of a group whose numbers agree form a cohort, and share the very objects in their
state: one 0-d step tensor for all of AdamW's weights. So counting is one addition, and what a user
reads in `state[p]["step"]` is always true.

A rule that runs by itself would count a shared tensor once for each parameter, and a checkpoint
would hand the sharing on. So whoever leaves a cohort, or is saved, gets copies (`own_numbers`).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from mixprec.optimizer.fused.program.program import Program
from mixprec.optimizer.fused.program.signs import Levels, classes, stay_non_negative
from mixprec.optimizer.fused.recording.probe import Element, Probe, RuleState
from mixprec.optimizer.masters import MASTER
from mixprec.optimizer.rule.stand_ins import map_leaves, same
from mixprec.optimizer.state_formats import StateFormats, decode, format_of, scale_key, scales_in

__all__ = [
    "Cohort",
    "Member",
    "decoded",
    "elements_of",
    "form_cohorts",
    "own_numbers",
    "separate",
    "shown",
]

Entry = dict[str, Any]
"""What an optimizer's `state` holds for one parameter."""


@dataclass(frozen=True)
class Member:
    """A parameter that steps.

    Attributes:
        index: of its group.
        place: among the parameters that step.
        entry: its own in the optimizer's state.
        probe: what replays its rule.
        state: what the entry says, in the probe's terms.
    """

    index: int
    place: int
    entry: Entry
    probe: Probe
    state: RuleState


@dataclass
class Cohort:
    """Parameters of a group that a rule treats alike, as old as each other.

    Attributes:
        index: of their group.
        probe: replays the rule for them.
        state: what the rule keeps for each, but for data; plain numbers in it are the objects that
            every entry holds.
        places: of its members among the parameters that step, in order.
        entries: their entries in the optimizer's state.
        tensors: what each holds of data, by the names in `state` (and `scale_key` of codes).
        non_negative: the states that were proved to stay so, if any may be stored without a sign.
    """

    index: int
    probe: Probe
    state: RuleState
    places: list[int] = field(default_factory=list[int])
    entries: list[Entry] = field(default_factory=list[Entry])
    tensors: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])
    non_negative: Levels = field(default_factory=dict[str, int])
    _proved: set[tuple[int, Any]] = field(default_factory=set[tuple[int, Any]])
    _versions: dict[str, int] = field(default_factory=dict[str, int])
    """Of shared tensors, when they were written here last."""

    def has_negative(self, name: str) -> bool:
        """Whether a state holds a negative number already, where it may have a sign."""
        held = (tensors[name] for tensors in self.tensors if name in tensors)
        return any(bool((value < 0).any()) for value in held if value.dtype != torch.uint8)

    def prove(self, levels: Levels) -> None:
        """Take these states for never negative, as long as `keeps_signs` says so."""
        self.non_negative, self._proved = levels, set()

    def keeps_signs(self, program: Program, scalars: Sequence[float]) -> bool:
        """Whether states without a sign need none after a step with these scalars either."""
        if not self.non_negative:
            return True
        step = id(program), classes(scalars)
        if step not in self._proved:
            if not stay_non_negative(self.non_negative, program, step[1]):
                return False
            self._proved.add(step)
        return True

    def add(self, member: Member) -> None:
        self.places.append(member.place)
        self.entries.append(member.entry)
        self.tensors.append(member.state.tensors(member.entry))
        member.entry.update(_shared(self.state))

    def holds(self) -> bool:
        """Whether every member's entry holds these very numbers: users may have set others."""
        try:
            return all(
                all(map(is_, map(itemgetter(name), self.entries), repeat(value)))
                for name, value in _shared(self.state).items()
            )
        except KeyError:
            return False

    def written(self) -> str:
        """Which number that several members share somebody else has written in place, if any."""
        before, self._versions = self._versions, self._versions_now()
        changed = (name for name in before if before[name] != self._versions.get(name))
        return next(changed, "") if len(self.entries) > 1 else ""

    def _versions_now(self) -> dict[str, int]:
        numbers = self.state.numbers.items()
        tensors = {name: value for name, value in numbers if isinstance(value, Tensor)}
        return {name: t._version for name, t in tensors.items() if not t.is_inference()}

    def own_state(self) -> RuleState:
        """The state with copies of its numbers, to come back to."""
        return RuleState(own_numbers(self.state.numbers), self.state.elements, self.state.reduced)

    def set_state(self, state: RuleState) -> None:
        """Give all members these numbers. A tensor is written in place: users hold on to it."""
        numbers = dict(self.state.numbers)
        for name in [name for name in numbers if name not in state.numbers]:
            del numbers[name]
            for entry in self.entries:
                entry.pop(name, None)
        for name, value in state.numbers.items():
            old = numbers.get(name, Cohort)
            if isinstance(old, Tensor) and isinstance(value, Tensor) and _alike(old, value):
                old.copy_(value)
            elif old is not value and not (_holds(Element, value) and same(old, value)):
                numbers[name] = value
                self._place(name, value)
        self.state = RuleState(numbers, state.elements, state.reduced)
        self._versions = self._versions_now()

    def _place(self, name: str, value: Any) -> None:
        for entry, tensors in zip(self.entries, self.tensors, strict=True):
            if _holds(Element, value):
                entry[name] = RuleState({name: value}).entry(tensors)[name]
            else:
                entry[name] = value


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype


def _shared(state: RuleState) -> dict[str, Any]:
    """The numbers that a cohort's members share: all but collections of tensors of elements."""
    return {name: value for name, value in state.numbers.items() if not _holds(Element, value)}


def _holds(kind: type, value: Any) -> bool:
    """Whether a value is a collection that holds, however deep, something of this kind."""
    found: list[bool] = []
    if type(value) in (dict, list, tuple, deque):
        map_leaves(lambda _, leaf: found.append(isinstance(leaf, kind)), "", value)
    return any(found)


def elements_of(entry: Mapping[str, Any], param: Tensor) -> tuple[str, ...]:
    """Names of the states that hold a number for each element, however they are stored.

    Those in collections are not among them; they are FP32 always.

    >>> import torch
    >>> param = torch.ones(40)
    >>> entry = {"step": torch.ones(()), "exp_avg": torch.ones(40, dtype=torch.int8),
    ...          "exp_avg.scale": torch.ones(2), "master": torch.ones(40)}
    >>> elements_of(entry, param)
    ('exp_avg',)
    """
    return tuple(k for k, v in entry.items() if k != MASTER and _is_element(k, v, entry, param))


def _is_element(name: str, value: Any, entry: Mapping[str, Any], param: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != param.shape or param.ndim == 0:
        return False
    return value.is_floating_point() or scales_in(entry, name) is not None


def shown(entry: Mapping[str, Any], formats: StateFormats = None) -> Entry:
    """An entry as a probe may see it: codes as the FP32 tensors that they stand for, without data,
    and counts on the host."""
    ours = _scales(entry, formats)
    return {
        name: torch.empty(value.shape, device="meta") if _is_coded(entry, name, ours) else value
        for name, value in entry.items()
        if name not in ours
    }


def _scales(entry: Mapping[str, Any], formats: StateFormats) -> set[str]:
    """The keys that hold scales of codes, which are ours wherever 8 bits were asked for.

    A rule that keeps something there itself was refused (`state_formats.check_keys`).
    """
    return {scale_key(name) for name in entry if format_of(name, formats) == "int8"}


def _is_coded(entry: Mapping[str, Any], name: str, ours: set[str]) -> bool:
    return scale_key(name) in ours and scales_in(entry, name) is not None


def counts_on_host(entry: Entry, state: RuleState) -> None:
    """Bring numbers that are known in advance to the host, which counts them; waits once."""
    for name, value in state.numbers.items():
        if isinstance(value, Tensor) and not value.is_cpu:
            entry[name] = value.cpu()


def form_cohorts(members: Iterable[Member], resting: Iterable[Entry]) -> list[Cohort]:
    """Cohorts of the parameters that step, none of which shares anything with one that rests."""
    cohorts: list[Cohort] = []
    places: dict[Any, Cohort] = {}
    for member in members:
        state = member.state
        ids = ((k, id(v)) for k, v in _shared(state).items())
        key = (member.index, id(member.probe), state.elements, (*state.reduced,), *ids)
        cohort = places.get(key)
        if cohort is None or not same(dict(cohort.state.numbers), dict(state.numbers)):
            cohort = next((c for c in cohorts if _is_of(member, c)), None)
            if cohort is None:
                cohort = Cohort(member.index, member.probe, state)
                cohorts.append(cohort)
            places[key] = cohort
        cohort.add(member)
    elsewhere = {id(v) for entry in resting for v in entry.values() if isinstance(v, Tensor)}
    for cohort in cohorts:
        if any(id(value) in elsewhere for value in cohort.state.numbers.values()):
            _separate(cohort)
    return cohorts


def _is_of(member: Member, cohort: Cohort) -> bool:
    left, right = member.state, cohort.state
    return (
        (member.index, left.elements) == (cohort.index, right.elements)
        and member.probe is cohort.probe
        and dict(left.reduced) == dict(right.reduced)
        and same(dict(left.numbers), dict(right.numbers))
    )


def _separate(cohort: Cohort) -> None:
    """Give a cohort's members numbers that nobody else has."""
    cohort.state = cohort.own_state()
    shared = _shared(cohort.state)
    for entry in cohort.entries:
        entry.update(shared)


def separate(entries: Iterable[Entry]) -> None:
    """Give every entry numbers of its own: a rule that runs by itself counts each entry's."""
    seen: set[int] = set()
    for entry in entries:
        shared = {name: value for name, value in entry.items() if id(value) in seen}
        entry.update(own_numbers({k: v for k, v in shared.items() if not _is_plain(v)}))
        seen.update(map(id, entry.values()))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def own_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of numbers, shared with nobody."""
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in numbers.items()}


def decoded(entry: Mapping[str, Any], param: Tensor, formats: StateFormats = None) -> Entry:
    """An entry as the rule itself would keep it: FP32 states, numbers shared with nobody.

    Without `formats` nothing in it is a code. FP32 states, and collections of tensors, are the same
    objects.
    """
    elements, ours = elements_of(entry, param), _scales(entry, formats)
    plain: Entry = {}
    for name, value in entry.items():
        if name in ours:
            continue
        if name in elements:
            encoded = _is_coded(entry, name, ours) or format_of(name, formats) == "bf16"
            plain[name] = decode(value, scales_in(entry, name)) if encoded else value
        elif name == MASTER or _holds(Tensor, value):
            plain[name] = value
        else:
            plain.update(own_numbers({name: value}))
    return plain
