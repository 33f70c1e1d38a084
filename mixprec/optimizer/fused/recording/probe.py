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
same (`replay`), which costs some 0.1 ms, and recorded anew where it does not. Programs are
equal when nothing but numbers changed, so a kernel made for one serves until the rule takes another
branch (RAdam's warm-up).

A recording never looks at values of elements, and a rule that does is refused: nothing in it would
follow from the numbers alone. Refused are also operations that mix elements (products of matrices,
sums over some dimensions, sorting, indexing), random numbers, other precisions than FP32, and data
kept outside of the parameter's state. What this cannot see, such as a number taken from the shape
of the probe, is found by trying (`fused.self_check`).

Sums and norms over all elements of a tensor are part of the program. A one-element tensor in the
state that holds such a number (NovoGrad's second moment) depends on data, and is read and written
by the program; one that holds a step count is a number, lifted. Only the recorder can tell the two
apart, by where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer.fused.program.program import GRAD, MASTER, Op, Program, is_free_name
from mixprec.optimizer.fused.recording.kinds import Kinds, SizesRead
from mixprec.optimizer.fused.recording.real_size import NumbersOnHost, SizeRecorder
from mixprec.optimizer.fused.recording.recorder import NotFusible, RawOp, Recorder
from mixprec.optimizer.fused.recording.replay import Replay
from mixprec.optimizer.fused.recording.rule_state import (
    Element,
    RuleState,
    is_one,
    without_elements,
)
from mixprec.optimizer.fused.recording.tape import Tape, tape_of
from mixprec.optimizer.fused.recording.traps import Untouchable, touched
from mixprec.optimizer.fused.recording.twin import Twin
from mixprec.optimizer.rule.admission import TAKEN, quote
from mixprec.optimizer.rule.stand_ins import map_leaves, rule_of, same
from mixprec.torch_modes import run_under

PROBE_SIZES = (7, 11, 2, 3, 2, 3)
"""The probe's shape, cut to its number of dimensions: no square, and never a shape of a trial."""


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


class Probe:
    """Records the rule of a group for parameters such as `like`, on a twin of the optimizer.

    One probe serves all parameters of a group of one kind (`kinds`). Its sizes are not theirs: if
    the rule asks for sizes in a step, that step is recorded for each size once more (`serve`),
    unless scalars depend on them: with `by_size` the probe has the sizes of `like`, and no data.
    States named in `reduced` are written by the program even where their value is known.

    The optimizer itself, its groups, its state and torch's random state are never written to. A
    probe keeps nothing from step to step but its programs: a step begins with the optimizer as it
    is (`twin.Twin`) and the parameter's `RuleState` and returns what they become, so a step that is
    thrown away needs no undoing.

    With `given_loss`, the rule is given a closure whose loss it must not look at. With `in_use`,
    what the rule raises is NotFusible: it may not bear a small tensor, and if it bears none, it
    will raise it by itself.

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
        kinds: Kinds | None = None,
    ) -> None:
        self._foreach = self.given_loss = self.in_use = False
        if like.ndim == 0:
            raise NotFusible("a parameter of no dimensions looks like the numbers of the rule")
        self._twin = Twin(inner, index, kinds)
        self._by_size, self._reduced = by_size, reduced
        self._programs: dict[Any, tuple[Program, tuple[int, ...]]] = {}
        sizes = like.shape if by_size else (PROBE_SIZES * like.ndim)[: like.ndim]
        device = "meta" if by_size else "cpu"
        self._param = nn.Parameter(torch.full(sizes, 0.5, dtype=torch.float32, device=device))
        self._marks = vars(like)
        self._elements: dict[str, Tensor] = {}
        self._tape: Tape | None = None
        self._served: dict[tuple[int, ...], nn.Parameter] = {}
        self._sizes_read = False

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
        if self._sizes_read and not self._by_size:
            for sizes, param in self._served.items():
                self._check_same(recording, self._record(param, {}, state), sizes, by_size=False)
        return recording

    def serve(self, param: Tensor) -> None:
        """Make sure that each step is right for a parameter of this size, too."""
        sizes = tuple(param.shape)
        if self._twin.kinds.asks_sizes and sizes not in self._served and param.numel():
            self._served[sizes] = _of_size(sizes)

    def check_size(
        self, sizes: Sequence[int], state: RuleState | None = None, *, by_size: bool = False
    ) -> None:
        """Raise NotFusible unless a parameter of these sizes is stepped by the same programs.

        The first two steps, or two from `state`, are recorded on a tensor that has its size and no
        data. A rule that scales its learning rate by the fan-in shows itself, unless `by_size`
        allows for other scalars; one that has another way with large tensors does in any case.
        """
        param = _of_size(sizes)
        elements: dict[str, Tensor] = {}
        state = RuleState() if state is None else state
        for _ in range(2):
            small, large = self.step(state), self._record(param, elements, state)
            self._check_same(small, large, sizes, by_size=by_size)
            state = small.state

    def _check_same(
        self, small: Recording, large: Recording, sizes: Sequence[int], *, by_size: bool
    ) -> None:
        if not (_same_program if by_size else _agree)(small, large):
            raise NotFusible(f"its step depends on the parameter's sizes, here {list(sizes)}")

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
            except Exception as error:
                if is_of_the_machine(error) or (not refusals and not self.in_use):
                    raise
                refusals.setdefault(
                    foreach, NotFusible(f"on a small tensor it raised {quote(error)}")
                )
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
        self._twin.load(param, self._marks, foreach=foreach)
        grad = param.grad = torch.full_like(param, 0.25, requires_grad=False)
        for name in state.elements:
            if name not in elements:
                elements[name] = torch.full_like(param, 0.5, requires_grad=False)
        kept = {name: elements[name] for name in state.elements}
        reduced = {k: torch.full(v, 0.5, device=param.device) for k, v in state.reduced.items()}
        self._place(param, state, {**kept, **reduced})
        roots = {MASTER: param, GRAD: grad, **kept}
        recorder = (SizeRecorder if param.is_meta else Recorder)(roots, reduced)
        run_under(
            [recorder, *([NumbersOnHost()] if param.is_meta else [])], lambda: self._run(param)
        )
        recording, key, made = self._recording(recorder, param)
        if param is self._param:
            self._tape = None
            if not param.is_meta:
                self._tape = tape_of(recorder, {**roots, **reduced}, state, key, made)
        return recording

    def _run(self, param: nn.Parameter) -> None:
        """The rule's own step on the twin."""
        optimizer = self._twin.optimizer
        loss = Untouchable("it uses the loss, which is known when the step is made")
        arguments = [lambda: loss] if self.given_loss else []
        watch = param is self._param and self._twin.kinds.asks_sizes and not self._by_size
        sizes = SizesRead()
        with torch.enable_grad():
            run_under([sizes] if watch else [], lambda: rule_of(optimizer)(optimizer, *arguments))
        if param is self._param:
            self._sizes_read = sizes.any
        if touched(loss):
            raise NotFusible("it uses the loss, which is known when the step is made")

    def _replay(self, state: RuleState) -> Recording | None:
        """The step along the tape of the last one that was recorded, or None if it is another."""
        tape, self._tape = self._tape, None
        if tape is None or not tape.begins_with(state):
            return None
        self._twin.load(self._param, self._marks, foreach=self._foreach)
        if tape.is_held():
            return None
        self._param.grad = tape.roots[GRAD]
        self._place(self._param, state, tape.states)
        replay = Replay(tape)
        try:
            run_under([replay], lambda: self._run(self._param))
            recording, key, _ = self._recording(replay, self._param)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            return None  # if the rule fails, it will again
        if not replay.is_done or key != tape.key:
            return None
        self._tape = tape
        return recording

    def _place(self, param: nn.Parameter, state: RuleState, tensors: Mapping[str, Tensor]) -> None:
        if state.numbers or tensors:
            self._twin.optimizer.state[param] = state.entry(tensors)

    def _recording(
        self,
        recorder: Recorder | Replay,
        param: nn.Parameter,
    ) -> tuple[Recording, Any, tuple[Program, tuple[int, ...]]]:
        """The step that a recorder saw; what was left in which value, and what that makes."""
        results = {MASTER: recorder.value_of(param)}
        reduced: dict[str, tuple[int, ...]] = {}

        entry: dict[str, Any] = self._twin.optimizer.state.get(param) or {}
        if MASTER in entry:
            raise NotFusible(TAKEN)

        def place(name: str, value: Any) -> Any:
            result = recorder.value_of(value)
            if result is None and name in self._reduced and is_one(value):
                result = recorder.emit("float", _known(value))
            if result is None:
                return value
            _check_kept(name, value, known=name in results, alone=name in entry)
            results[name] = result
            if result in recorder.per_tensor:
                reduced[name] = tuple(value.shape)
            return Element(name)

        numbers = without_elements({k: map_leaves(place, k, v) for k, v in entry.items()})
        if key := next((k for k in reduced if k not in entry), None):
            raise NotFusible(f"it keeps a number of the data inside of a collection, as {key}")
        group, shared, attributes = self._twin.changes()
        if key := next((k for k, v in {**group, **shared}.items() if recorder.holds(v)), None):
            raise NotFusible(f"it keeps what depends on data under {key!r}, outside of its state")
        key = (tuple(results.items()), (*recorder.reduced, *reduced))
        program, kept = made = self._program(recorder, *key)
        scalars = tuple(recorder.scalars[index] for index in kept)
        elements = tuple(name for name in results if name not in (MASTER, *reduced))
        state = RuleState(numbers, elements, reduced)
        return Recording(program, scalars, state, group, shared, attributes), key, made

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


def _of_size(sizes: Sequence[int]) -> nn.Parameter:
    """A parameter of this size; of more than one element it has no data."""
    device = "cpu" if math.prod(sizes) == 1 else "meta"
    return nn.Parameter(torch.full(tuple(sizes), 0.5, dtype=torch.float32, device=device))


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _known(value: Tensor) -> float:
    if value.is_meta:
        raise NotFusible("its state has numbers that only data would show")
    return float(value)


def _check_kept(name: str, value: Tensor, *, known: bool, alone: bool) -> None:
    """Refuse what a program cannot keep; `alone` is what does not lie in a collection."""
    if value.dtype != torch.float32:
        raise NotFusible(f"state[{name!r}] is {value.dtype}, not FP32")
    if not is_free_name(name):
        raise NotFusible(f"a state called {name!r} looks like a value of the program")
    if known or (alone and "[" in name):
        raise NotFusible(f"a state called {name!r} looks like an item of a collection")


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
