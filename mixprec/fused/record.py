"""Recording one step of an optimizer's own rule as a program, and its scalars.

The rule runs on a probe, a parameter of a few elements, under a dispatch mode that sees every
tensor operation. What reaches an element of the parameter, its gradient or its states is kept as
an operation of a `Program`; every number on the way, be it a Python float, an int or a 0-d tensor,
is lifted into a list of scalars, in order of appearance:

    torch.optim.AdamW at step 7   ->   master' = s0 * master + s6 * exp_avg' / (...)   (the program)
                                       [0.99999, 0.1, 0.999, ..., -1.9e-3]             (the scalars)

The rule runs again for the next step, because that is the only way to have its scalars right
without knowing it: schedules, betas edited by hand, step counts and bias corrections come out of
the rule's own code. It is played along the recording of the last step for as long as it does the
same (`fused.replay`), which costs some 0.1 ms, and recorded anew where it does not. Programs are
equal when nothing but numbers changed, so a kernel made for one serves until the rule takes another
branch (RAdam's warm-up).

A recording never looks at values of elements, and a rule that does is refused: nothing in it would
follow from the numbers alone. Refused are also operations that mix elements (products of matrices,
sums over some dimensions, sorting, indexing), random numbers, other precisions than FP32, and data
kept outside of the parameter's state. What this cannot see, such as a number taken from the shape
of the probe, is found by trying (`fused.admission`).

Sums and norms over all elements of a tensor are part of the program. A one-element tensor in the
state that holds such a number (NovoGrad's second moment) depends on data, and is read and written
by the program; one that holds a step count is a number, lifted. Only the recorder can tell the two
apart, by where they come from.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.admission import Manner, twin_of
from mixprec.fused.dispatch import NotFusible, RawOp, Recorder
from mixprec.fused.program import GRAD, MASTER, Op, Program, is_free_name
from mixprec.fused.replay import Replay
from mixprec.fused.sizes import NumbersOnHost, SizeRecorder
from mixprec.fused.state import Element, RuleState, is_one, own, without_elements
from mixprec.fused.tape import Tape, tape_of
from mixprec.inner import copy_marks, map_leaves, rule_of, same

PROBE_SIZES = (7, 11, 2, 3, 2, 3)
"""The probe's shape, cut to its number of dimensions: no square, and never a shape of a trial."""

# Other ways to do the same: one program serves them all. The plain loop is recorded first; where
# it looks at a norm, the list code may select with `torch.where` instead, to spare the GPU a stop.
_IMPLEMENTATIONS = ("foreach", "fused", "capturable")

_NOT_VALUES = ("params", "param_names")

_NOT_COUNTERS = {*_NOT_VALUES, *_IMPLEMENTATIONS}

_PLAIN_VALUES = (int, float, str, type(None))


@dataclass(frozen=True)
class Recording:
    """One step of a rule.

    Attributes:
        program: what happens to each element.
        scalars: the numbers that it happens with, in FP64; as many as the program reads.
        state: numbers and names of the parameter's state after the step.
        group: values of the group that the rule changed, by key (counters such as `k`).
        shared: entries of the optimizer's state under keys that are no parameters, if changed.
        attributes: those of the optimizer itself that the rule changed (counters, too).
    """

    program: Program
    scalars: tuple[float, ...]
    state: RuleState
    group: dict[str, Any]
    shared: dict[Any, Any]
    attributes: dict[str, Any] = field(default_factory=dict)


def kind_of(param: Tensor, *, by_size: bool = False) -> tuple[Any, ...]:
    """What a rule may read of a parameter, other than its values; a hashable key.

    Without its sizes, unless `by_size` (`FusedAdmission.by_size`) says that the rule reads them.
    """
    marks = ((name, repr(value)) for name, value in sorted(vars(param).items()))
    return (tuple(param.shape) if by_size else param.ndim, *marks)


class Probe:
    """Records the rule of a group for parameters such as `like`, on a twin of the optimizer.

    One probe serves all parameters of a group of one kind (`kind_of`), since rules may read how
    many dimensions a parameter has and what attributes. Its sizes are for `check_size`, unless the
    rule's scalars depend on them: with `by_size` the probe has the sizes of `like`, and no data.
    States named in `reduced` are written by the program even where their value is known.

    The optimizer itself, its groups, its state and torch's random state are never written to. A
    probe keeps nothing from step to step but its programs: a step begins with the group's values
    and the parameter's `RuleState` and returns what they become, so a step that is thrown away
    needs no undoing.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> sgd = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
    >>> recording = Probe(sgd, 0, weight).step(RuleState())
    >>> print(recording.program.formula(recording.scalars))
    master' = master + s1 * (grad + s0 * master)
    s0 = 0.5, s1 = -0.1
    """

    def __init__(
        self,
        inner: Optimizer,
        index: int,
        like: Tensor,
        *,
        by_size: bool = False,
        reduced: Collection[str] = (),
    ) -> None:
        self._foreach = False
        if like.ndim == 0:
            raise NotFusible("a parameter of no dimensions looks like the numbers of the rule")
        self._inner, self._index, self._reduced = inner, index, reduced
        self._programs: dict[Any, tuple[Program, tuple[int, ...]]] = {}
        twin, _ = twin_of(inner, Manner("steady"))
        sizes = like.shape if by_size else (PROBE_SIZES * like.ndim)[: like.ndim]
        device = "meta" if by_size else "cpu"
        self._param = nn.Parameter(torch.full(sizes, 0.5, dtype=torch.float32, device=device))
        copy_marks(like, self._param)
        self._group: dict[str, Any] = twin.param_groups[index]
        twin.param_groups = [self._group]
        self._twin: Any = twin
        self._rule: Callable[..., Any] = rule_of(twin)
        self._elements: dict[str, Tensor] = {}
        self._tape: Tape | None = None
        self._shared_keys: tuple[tuple[int, int], list[Any]] | None = None

    @property
    def programs(self) -> list[Program]:
        """All that were recorded so far, in order of first appearance."""
        return list(dict.fromkeys(program for program, _ in self._programs.values()))

    def step(self, state: RuleState) -> Recording:
        """One step of the rule at its group's present values, from `state`.

        Raises:
            NotFusible: if the step is not an element-wise function of parameter, gradient and
                states with scalars known in advance.
        """
        recording = self._record(self._param, self._elements, state)
        if self._param.is_meta and any(map(_is_meta, recording.state.numbers.values())):
            raise NotFusible("its state has numbers that only data would show")
        return recording

    def check_size(
        self, sizes: Sequence[int], state: RuleState | None = None, *, by_size: bool = False
    ) -> None:
        """Raise NotFusible unless a parameter of these sizes is stepped by the same programs.

        The first two steps, or two from `state`, are recorded on a tensor that has its size and no
        data. A rule that scales its learning rate by the fan-in shows itself, unless `by_size`
        allows for other scalars; one that has another way with large tensors does in any case.
        """
        param = nn.Parameter(torch.empty(tuple(sizes), dtype=torch.float32, device="meta"))
        copy_marks(self._param, param)
        elements: dict[str, Tensor] = {}
        state = RuleState() if state is None else state
        for _ in range(2):
            small, large = self.step(state), self._record(param, elements, state)
            if not (_same_program if by_size else _agree)(small, large):
                raise NotFusible(f"its step depends on the parameter's sizes, here {list(sizes)}")
            state = small.state

    def _record(
        self, param: nn.Parameter, elements: dict[str, Tensor], state: RuleState
    ) -> Recording:
        """The step by the implementation that was recorded last, else by the other one."""
        if param is self._param and (replayed := self._replay(state)) is not None:
            return replayed
        refusals: dict[bool, NotFusible] = {}
        for foreach in (self._foreach, not self._foreach):
            try:
                recording = self._record_as(foreach, param, elements, state)
            except NotFusible as error:
                refusals[foreach] = error
            except Exception:
                if not refusals:
                    raise
            else:
                self._foreach = foreach
                return recording
        raise refusals[min(refusals)]

    def _record_as(
        self,
        foreach: bool,
        param: nn.Parameter,
        elements: dict[str, Tensor],
        state: RuleState,
    ) -> Recording:
        before, attributes = self._load(param, foreach)
        grad = param.grad = torch.full_like(param, 0.25, requires_grad=False)
        for name in state.elements:
            if name not in elements:
                elements[name] = torch.full_like(param, 0.5, requires_grad=False)
        kept = {name: elements[name] for name in state.elements}
        reduced = {k: torch.full(v, 0.5, device=param.device) for k, v in state.reduced.items()}
        self._place(param, state, {**kept, **reduced})
        roots = {MASTER: param, GRAD: grad, **kept}
        recorder = (SizeRecorder if param.is_meta else Recorder)(roots, reduced)
        with recorder, NumbersOnHost() if param.is_meta else nullcontext(), torch.enable_grad():
            self._rule(self._twin)
        recording, key, made = self._recording(recorder, param, before, attributes)
        if param is self._param:
            self._tape = None
            if not param.is_meta and self._begins_anew(recording.state.numbers):
                self._tape = tape_of(recorder, {**roots, **reduced}, state, key, made)
        return recording

    def _begins_anew(self, numbers: Mapping[str, Any]) -> bool:
        """Whether a step that is begun and thrown away leaves no trace."""
        copied = all(map(_is_copied, (numbers, self._group, self._twin.state)))
        return copied and _keeps_nothing(self._twin, self._inner)

    def _replay(self, state: RuleState) -> Recording | None:
        """The step along the tape of the last one that was recorded, or None if it is another."""
        tape, self._tape = self._tape, None
        if tape is None or not tape.begins_with(state):
            return None
        before, attributes = self._load(self._param, self._foreach)
        if tape.is_held():
            return None
        self._param.grad = tape.roots[GRAD]
        self._place(self._param, state, tape.states)
        replay = Replay(tape)
        try:
            with replay, torch.enable_grad():
                self._rule(self._twin)
            recording, key, _ = self._recording(replay, self._param, before, attributes)
        except Exception:
            return None  # if the rule fails, it will again
        if not replay.is_done or key != tape.key:
            return None
        self._tape = tape
        return recording

    def _place(self, param: nn.Parameter, state: RuleState, tensors: Mapping[str, Tensor]) -> None:
        if state.numbers or tensors:
            self._twin.state[param] = state.entry(tensors)

    def _load(self, param: nn.Parameter, foreach: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make the twin what the optimizer is now, with `param` for its only parameter.

        Returns the group's values and the optimizer's attributes, as they are before the step.
        """
        group = _taken(self._inner.param_groups[self._index])
        for key in [k for k in self._group if k not in group and k not in _NOT_VALUES]:
            del self._group[key]
        self._group.update((key, own(value)) for key, value in group.items())
        for key in _IMPLEMENTATIONS:
            if key in group:
                self._group[key] = foreach and key == "foreach"
        self._group["params"][:] = [param]
        attributes, twin = _plain(self._inner), vars(self._twin)
        for key in _plain_of(twin, attributes):
            del twin[key]
        if "foreach" in attributes:
            attributes["foreach"] = foreach
        twin.update(attributes)
        self._twin.state = defaultdict(dict, self._shared())
        return group, attributes

    def _shared(self) -> dict[Any, Any]:
        """What the rule keeps in its state under keys that are no parameters."""
        state = cast(dict[Any, Any], self._inner.state)
        seen = (id(state), len(state))  # a look at every key takes longer than the rest of a step
        if self._shared_keys is None or self._shared_keys[0] != seen:
            self._shared_keys = seen, [key for key in state if not isinstance(key, Tensor)]
        return {key: own(state[key]) for key in self._shared_keys[1]}

    def _recording(
        self,
        recorder: Recorder | Replay,
        param: nn.Parameter,
        before: dict[str, Any],
        attributes: dict[str, Any],
    ) -> tuple[Recording, Any, tuple[Program, tuple[int, ...]]]:
        """The step that a recorder saw; what was left in which value, and what that makes."""
        results = {MASTER: recorder.value_of(param)}
        reduced: dict[str, tuple[int, ...]] = {}

        def place(name: str, value: Any) -> Any:
            result = recorder.value_of(value)
            if result is None and name in self._reduced and is_one(value):
                result = recorder.emit("float", _known(value))
            if result is None:
                return value
            _check_kept(name, value)
            results[name] = result
            if result in recorder.per_tensor:
                reduced[name] = tuple(value.shape)
            return Element(name)

        entry: dict[str, Any] = self._twin.state.get(param) or {}
        numbers = without_elements({k: map_leaves(place, k, v) for k, v in entry.items()})
        if key := next((k for k in reduced if k not in entry), None):
            raise NotFusible(f"it keeps a number of the data inside of a collection, as {key}")
        group = _changes(self._group, before)
        shared = _changes(self._twin.state, self._shared())
        if key := next((k for k, v in {**group, **shared}.items() if recorder.holds(v)), None):
            raise NotFusible(f"it keeps what depends on data under {key!r}, outside of its state")
        key = (tuple(results.items()), (*recorder.reduced, *reduced))
        program, kept = made = self._program(recorder, *key)
        scalars = tuple(recorder.scalars[index] for index in kept)
        elements = tuple(name for name in results if name not in (MASTER, *reduced))
        state = RuleState(numbers, elements, reduced)
        changed = _changes(_plain(self._twin), attributes)
        return Recording(program, scalars, state, group, shared, changed), key, made

    def _program(
        self,
        recorder: Recorder | Replay,
        results: tuple[tuple[str, str | None], ...],
        reduced: tuple[str, ...],
    ) -> tuple[Program, tuple[int, ...]]:
        """The program, and which of the recorded scalars it reads; made once for each sequence."""
        if isinstance(recorder, Replay):
            return recorder.made
        if results[0][1] is None:
            raise NotFusible("it gave the parameter data that does not come from the parameter")
        key = (tuple(recorder.ops), results, reduced)
        known = self._programs.get(key)
        if known is None:
            outputs = {k: v for k, v in results if v is not None and v != k}
            known = self._programs[key] = _tidied(recorder, outputs, reduced)
        return known


# ---------------------------------------- values


def _taken(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's values, which the probe may edit, on the host."""
    return {k: own(v) for k, v in group.items() if k not in _NOT_VALUES}


def _plain(optimizer: Optimizer) -> dict[str, Any]:
    """Attributes that are numbers or strings, without those that schedulers set."""
    return _plain_of(vars(optimizer), ())


def _plain_of(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Those of attributes, but for the known ones."""
    return {
        key: value
        for key, value in values.items()
        if key not in known and isinstance(value, _PLAIN_VALUES) and key != "_opt_called"
    }


def _same_program(left: Recording, right: Recording) -> bool:
    """Whether two recordings differ in numbers at most."""
    return (
        left.program == right.program
        and left.state.elements == right.state.elements
        and left.state.reduced == right.state.reduced
    )


def _agree(left: Recording, right: Recording) -> bool:
    """Whether two recordings say the same, as far as the second one has values to compare."""
    numbers = {k: v for k, v in right.state.numbers.items() if not _is_meta(v)}
    return (
        _same_program(left, right)
        and same(left.scalars, right.scalars)
        and same({k: left.state.numbers.get(k) for k in numbers}, numbers)
        and same(
            (left.group, left.shared, left.attributes),
            (right.group, right.shared, right.attributes),
        )
    )


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _keeps_nothing(twin: Optimizer, inner: Optimizer) -> bool:
    """Whether the twin has no attributes but those that each step of a probe begins anew.

    Options may be lists. One that a step has changed is not that of the optimizer any more.
    """
    theirs = ("state", "param_groups", "defaults")
    fixed = (*_PLAIN_VALUES, torch.dtype, torch.device, FunctionType, MethodType)

    def is_fixed(key: str, value: Any) -> bool:
        if type(value) in (list, tuple) and all(isinstance(item, _PLAIN_VALUES) for item in value):
            return same(value, vars(inner).get(key))
        return isinstance(value, fixed) or key in theirs or key.endswith("_hooks")

    return all(is_fixed(key, value) for key, value in vars(twin).items())


def _is_copied(values: Mapping[Any, Any]) -> bool:
    """Whether these are of kinds that each step of a probe is given copies of."""

    def copied(value: Any, *containers: type) -> bool:
        if type(value) in (tuple, *containers):
            inner = () if isinstance(value, tuple) else containers
            items = value.values() if isinstance(value, dict) else value
            return all(copied(item, *inner) for item in items)
        return isinstance(value, (*_PLAIN_VALUES, Tensor, Element, torch.dtype, torch.device))

    named = (
        (k, v) for k, v in values.items() if k not in _NOT_VALUES and not isinstance(k, Tensor)
    )
    return all(copied(value, list, dict, deque) for _, value in named)


def _changes(values: Mapping[Any, Any], before: Mapping[Any, Any]) -> dict[Any, Any]:
    """What a step made of counters and the like, where it is not what it was."""
    return {
        key: value
        for key, value in values.items()
        if value is not before.get(key, values)
        and not isinstance(key, Tensor)
        and key not in _NOT_COUNTERS
        and not same(value, before.get(key))
    }


def _known(value: Tensor) -> float:
    if value.is_meta:
        raise NotFusible("its state has numbers that only data would show")
    return float(value)


def _check_kept(name: str, value: Tensor) -> None:
    if value.dtype != torch.float32:
        raise NotFusible(f"state[{name!r}] is {value.dtype}, not FP32")
    if not is_free_name(name):
        raise NotFusible(f"a state called {name!r} looks like a value of the program")


def _tidied(
    recorder: Recorder, outputs: dict[str, str], reduced: tuple[str, ...]
) -> tuple[Program, tuple[int, ...]]:
    """The program without what no output depends on, named afresh, and the scalars it keeps."""
    raw, per_tensor = recorder.ops, recorder.per_tensor
    needed = set(outputs.values())
    live: list[RawOp] = []
    for op in reversed(raw):
        if op[2] in needed:
            needed.update(op[1])
            live.append(op)
    live.reverse()
    names: dict[str, str] = {}
    made = {output for _, _, output in live}
    for name, value in outputs.items():
        if value in made:
            names.setdefault(value, f"{name}'")
    scalars: list[str] = []
    counts = {"t": 0, "r": 0}
    ops: list[Op] = []
    for name, inputs, output in live:
        for scalar in (i for i in inputs if i[0] == "#"):
            names[scalar] = f"s{len(scalars)}"
            scalars.append(scalar)
        if output not in names:
            letter = "r" if output in per_tensor else "t"
            names[output] = f"{letter}{counts[letter]}"
            counts[letter] += 1
        ops.append(Op(name, tuple(names.get(i, i) for i in inputs), names[output]))
    results = tuple((name, names.get(value, value)) for name, value in outputs.items())
    touched = {name for op in ops for name in op.inputs} | {n for pair in results for n in pair}
    reduced = tuple(name for name in dict.fromkeys(reduced) if name in touched)
    program = Program(tuple(ops), results, len(scalars), reduced)
    return program, tuple(int(s[1:]) for s in scalars)
