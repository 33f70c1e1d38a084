"""Whether a rule's recording is right, decided by trying it.

A recording shows what the rule did with a probe. It cannot show where a number came from: the
probe's shape, a value seen at construction, Python's random state. So before a group's first fused
step, the rule runs on small random tensors of other shapes, as its user set it up, and beside it
run its programs, from the same values:

    eager     the optimizer's own step, on the device and with the implementation it will use
    program   `Probe.step` at the same group values, `Program.run` on copies

After every step masters, states, numbers in the state and counters in the group must agree. The
learning rate changes on the way, one parameter rests now and then, and the trial is long enough
for warm-up branches. What disagrees is not fused, and the reason names it.

Scalars that follow from a parameter's sizes (a learning rate by fan-in) are not those of the small
probe. If that is all that differs, the rule is fused with scalars for each size, recorded on
tensors that have the size and no data.

Some rules take a first step that is no program: they draw a momentum at random (Gravity), or look
at the first gradient (SGDSaI). If only that disagrees, the rule is fused from the second step on,
and what its first step put into one-element FP32 tensors counts as numbers of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer.fused.program.operations import REDUCTIONS
from mixprec.optimizer.fused.program.program import Program
from mixprec.optimizer.fused.recording.kinds import Kinds
from mixprec.optimizer.fused.recording.probe import Probe, Recording, RuleState, is_one
from mixprec.optimizer.fused.recording.recorder import NotFusible
from mixprec.optimizer.fused.recording.twin import Twin
from mixprec.optimizer.rule.admission import Manner, quote, twin_of
from mixprec.optimizer.rule.code import code_of
from mixprec.optimizer.rule.stand_ins import rule_of, same
from mixprec.optimizer.rule.trial import Trying, undisturbed
from mixprec.optimizer.state_formats import StateFormats, format_of, survives

GRADIENT_SIZES = (1.0, 1e-3, 30.0, 1.0, 1.0, 0.1, 3.0, 1.0, 1e-2, 1.0, 10.0, 1.0)
"""Gradient size of each trial step. RAdam leaves its warm-up at the sixth."""

GRADIENT_SPREAD = (1.0, 4.0, 0.25)
"""Gradient size of the tensors of a trial, in turn: a number of one is no number of another."""

TOLERANCE = 2e-6
"""How far from the eager rule, relative to the largest update in a tensor.

For a state, relative to its largest value before or after the step: a running mean may cancel.

An operation in FP32 errs by 2^-24 = 6e-8 of its result. An update is a chain of some 16 operations
whose errors add up to at most 16 * 6e-8 = 1e-6 in the program, and as much in an eager rule that
orders them differently (`foreach`, `fused`); together 2e-6. The master itself is a rounded sum of
old value and update: one spacing of the master, 2^-23 of it, comes on top.

A sum of n terms errs by a walk of n roundings, each of at most `ROUNDING` of the summed sizes of
its terms: by some sqrt(n) * 2^-24. Two sums in different orders are twice that apart, for each
reduction of the program. A trial's tensors have few elements (24: 6e-7), and most sums are of
squares or sizes, where the sum of sizes is the sum.
"""

SPACING = 2.0**-23
ROUNDING = 2.0**-24


@dataclass(frozen=True)
class FusedAdmission:
    """Whether a group's rule may run as programs.

    Attributes:
        fusible: whether every trial step agreed.
        reason: what was shown, or what differed.
        exact: whether every trial step agreed in every bit.
        programs: those that the trial went through, in order of first appearance. Nothing is shown
            of any other: when a recording brings one, admit the group again as it is then.
        reduced: entries of a parameter's state that hold numbers of the data.
        first_eager: whether a parameter without state must be stepped by the rule itself.
        by_size: whether scalars depend on a parameter's sizes, so that each needs its own probe.
        keys: all that a parameter's state holds.
        negative: the states that were negative in some trial step.
    """

    fusible: bool
    reason: str
    exact: bool = False
    programs: tuple[Program, ...] = ()
    reduced: tuple[str, ...] = ()
    first_eager: bool = False
    by_size: bool = False
    keys: frozenset[Any] = frozenset()
    negative: frozenset[str] = frozenset()

    def probe(
        self, inner: Optimizer, index: int, like: Tensor, kinds: Kinds | None = None
    ) -> Probe:
        """A probe for the parameters of the kind of `like`, as this admission needs it."""
        return Probe(inner, index, like, by_size=self.by_size, reduced=self.reduced, kinds=kinds)

    def state_of(self, entry: Mapping[str, Any], param: Tensor) -> RuleState:
        """What a probe needs of a parameter's entry in the optimizer's `state`."""
        return RuleState.of(entry, param, self.reduced)


class _Differs(Exception):
    """What the program does otherwise than the eager rule."""


def admit_fused(
    inner: Optimizer, index: int, formats: StateFormats = None, kinds: Kinds | None = None
) -> FusedAdmission:
    """Whether the rule of `inner.param_groups[index]` may run as programs, tried before its use.

    Leaves the optimizer, its groups, its state and the random state alone. Takes some tens of
    milliseconds. With `formats`, states are put into 8 bits where they will be. Parameters of no
    dimensions are left out, and so is a closure: steps that are given one are for the rule itself,
    which may use the loss.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4, 4))
    >>> admit_fused(torch.optim.Adam([weight]), 0).fusible
    True
    >>> admit_fused(torch.optim.Adafactor([weight]), 0).reason
    'its Python code looks at a number of the data, by item() or in an if'
    """
    kinds = Kinds(code_of(inner)) if kinds is None else kinds
    plain = _Way(kinds, formats)
    with undisturbed(inner, kinds.code) as trying:
        found = [_admit(inner, index, plain, trying)]
        for way in (replace(plain, by_size=True), replace(plain, first_eager=True)):
            if not found[-1].fusible:
                found.append(_admit(inner, index, way, trying))
    return found[-1] if found[-1].fusible else found[0]


@dataclass(frozen=True)
class _Way:
    """How a rule is fused; the attributes are those of `FusedAdmission`, and of `admit_fused`."""

    kinds: Kinds
    formats: StateFormats
    by_size: bool = False
    first_eager: bool = False

    def __str__(self) -> str:
        told = ", with scalars of its own for each size" if self.by_size else ""
        return told + (", after a first step of its own" if self.first_eager else "")


def _admit(inner: Optimizer, index: int, way: _Way, trying: Trying) -> FusedAdmission:
    try:
        Twin(inner, index, way.kinds).load(torch.nn.Parameter(torch.zeros(2, 3)), {}, foreach=False)
        trials = _trials(inner, index, way)
        _check_sizes(trials[0], inner.param_groups[index]["params"])
        if changed := next(iter(trying.changed()), None):
            raise NotFusible(f"it changes {changed} as it steps, which a recording cannot follow")
        if trying.drawn() - ({"torch"} if way.first_eager else set()):
            raise NotFusible("it draws random numbers")
    except NotFusible as error:
        return FusedAdmission(False, str(error))
    except _Differs as error:
        return FusedAdmission(False, f"its recording differs from the rule itself: {error}")
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return FusedAdmission(False, f"tried on small tensors it raised {quote(error)}")
    programs = dict.fromkeys(program for trial in trials for program in trial.programs)
    reduced = dict.fromkeys(name for trial in trials for name in trial.reduced)
    exact = all(trial.exact for trial in trials)
    how = "bit by bit" if exact else f"within {TOLERANCE:g} of each update"
    reason = f"its recording equals the rule {how}, in {len(GRADIENT_SIZES)} trial steps{way}"
    return FusedAdmission(
        True,
        reason,
        exact,
        tuple(programs),
        tuple(reduced),
        way.first_eager,
        way.by_size,
        keys=frozenset(key for trial in trials for key in trial.keys),
        negative=frozenset(name for trial in trials for name in trial.negative),
    )


def _trials(inner: Optimizer, index: int, way: _Way) -> list[_Trial]:
    """Trials from a fresh state and, if the rule has one, from the state that it has."""
    stepped = any(inner.state.get(param) for param in inner.param_groups[index]["params"])
    trials: list[_Trial] = []
    for with_state in (False, True)[: 1 + stepped]:
        afresh = stepped and not with_state
        manner = Manner("steady", with_state=with_state, counters=not afresh)
        reduced = trials[0].reduced if trials else ()
        try:
            trial = _trial(inner, index, manner, reduced, way)
        except (NotFusible, _Differs):
            raise
        except Exception as error:
            if not afresh or is_of_the_machine(error):
                raise
            continue  # it makes its state at construction, as torch's Adagrad, and cannot later
        if trial.reduced != reduced:
            # What once holds a number of the data is taken for one from the first step on.
            trial = _trial(inner, index, manner, trial.reduced, way)
        trials.append(trial)
    return trials


def _trial(
    inner: Optimizer, index: int, manner: Manner, reduced: tuple[str, ...], way: _Way
) -> _Trial:
    trial = _Trial(inner, index, manner, reduced, way)
    try:
        trial.run(resting=True)
    except (NotFusible, _Differs):
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        # Torch's fused SGD fails where only some momentum buffers exist, and a rule may want
        # numbers in its group that are no options.
        trial = _Trial(inner, index, replace(manner, counters=True), reduced, way)
        trial.run(resting=False)
    return trial


def _check_sizes(trial: _Trial, params: list[Tensor]) -> None:
    """Whether the group's own parameters, of whatever sizes, are stepped like small ones.

    The twin's learning rate is not 0, as the group's may be for now: 0 would hide a factor on it.
    Parameters of one element were part of the trial as they are.
    """
    probes: dict[Any, Probe] = {}
    kinds = trial.way.kinds
    for param in {
        (p.shape, kinds.kind_of(p)): p for p in params if p.numel() > 1 and p.ndim
    }.values():
        kind = param.ndim, kinds.kind_of(param)
        if kind not in probes:
            probes[kind] = trial.probe(param)
        small = [small for small in trial.params if small.ndim == param.ndim]
        first_eager, by_size = trial.way.first_eager, trial.way.by_size
        state = trial.state_of(small[0]) if first_eager or trial.with_state else RuleState()
        tried = {param.shape for param in small}
        if first_eager and state.numbers and len(tried) == 1 and param.shape not in tried:
            raise NotFusible("its first step is tried with one size only, which the state may hold")
        probes[kind].check_size(param.shape, state, by_size=by_size)


@dataclass(frozen=True)
class _Prediction:
    """What a program makes of one parameter.

    Attributes:
        sizes: the largest value of each state before the step.
        tolerance: how far the rule may be from this, relative to its update.
    """

    recording: Recording
    master: Tensor
    states: dict[str, Tensor]
    sizes: dict[str, float]
    tolerance: float


class _Trial:
    """An eager twin of the optimizer, with one group, and the programs beside it."""

    def __init__(
        self,
        inner: Optimizer,
        index: int,
        manner: Manner,
        reduced: tuple[str, ...],
        way: _Way,
    ) -> None:
        self.twin, params = twin_of(inner, manner, way.kinds.code)
        self.group: dict[str, Any] = self.twin.param_groups[index]
        others = [group for i, group in enumerate(params) if i != index]
        if not way.kinds.code.sees_groups:
            self.twin.param_groups, index, others = [self.group], 0, []
        self._index, self._others = index, [p for group in others for p in group]
        if callable(train := getattr(self.twin, "train", None)):
            train()  # schedule-free rules step in no other mode
        self.params = [param for param in self.group["params"] if param.ndim]
        self.group["params"][:] = self.params
        if not self.params:
            raise NotFusible("a parameter of no dimensions looks like the numbers of the rule")
        if any(param.dtype != torch.float32 for param in self.params):
            raise NotFusible("a parameter is float64, and kernels compute in FP32")
        self.way, self.with_state = way, manner.with_state
        self.reduced = reduced
        self.probes = {param: self.probe(param, by_size=way.by_size) for param in self.params}
        self.exact = True
        self.keys: set[Any] = set()
        self.negative: set[str] = set()

    def probe(self, like: Tensor, *, by_size: bool = False) -> Probe:
        return Probe(
            self.twin,
            self._index,
            like,
            by_size=by_size,
            reduced=self.reduced,
            kinds=self.way.kinds,
        )

    def state_of(self, param: Tensor) -> RuleState:
        return RuleState.of(self.twin.state.get(param) or {}, param, self.reduced)

    @property
    def programs(self) -> Iterator[Program]:
        return (program for probe in self.probes.values() for program in probe.programs)

    def run(self, *, resting: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        for turn, size in enumerate(GRADIENT_SIZES):
            for place, param in enumerate(self.params):
                scale = size * GRADIENT_SPREAD[place % len(GRADIENT_SPREAD)]
                grad = torch.randn(param.shape, generator=generator).to(param) * scale
                rests = resting and len(self.params) > 1 and (turn + place) % 5 == 4
                param.grad = None if rests else grad
            for param in self._others:
                param.grad = torch.randn(param.shape, generator=generator).to(param) * size
            self._compare(turn)
            if turn in (3, 7):
                _slow_down(self.group)

    def _compare(self, turn: int) -> None:
        moving = [param for param in self.params if param.grad is not None]
        new = [p for p in moving if self.way.first_eager and not self.twin.state.get(p)]
        moving = [param for param in moving if not any(param is p for p in new)]
        before = {k: v for k, v in self.group.items() if k != "params"}
        predicted = [self._predict(param) for param in moving]
        old = [param.detach().clone() for param in moving]
        with torch.enable_grad():
            rule_of(self.twin)(self.twin)
        self._take_over(new)
        where = f"after trial step {turn + 1}"
        for param, begin, found in zip(moving, old, predicted, strict=True):
            self._compare_shared(found.recording, before, where)
            self._compare_state(found, param, where)
            update = (param.detach() - begin).abs().max()
            allowed = found.tolerance * update + SPACING * param.detach().abs().max()
            self._compare_tensor(found.master, param.detach(), allowed, f"the parameter {where}")

    def _take_over(self, new: list[Tensor]) -> None:
        """Learn from the first states that the rule made by itself which numbers are of the data.

        What is not in a one-element FP32 tensor must be the same whatever tensor it was made for.
        """
        for param in new:
            entry = self.twin.state.get(param) or {}
            numbers = {k: v for k, v in entry.items() if is_one(v) and v.shape != param.shape}
            self._learn(numbers)
        states = [self.state_of(param) for param in new]
        if any(not (state.elements or state.reduced) for state in states):
            raise NotFusible("its first step makes no state")
        numbers = {k: v for state in states for k, v in state.numbers.items()}
        if any(not same(dict(state.numbers), numbers) for state in states):
            raise NotFusible("its first step puts numbers of the data or the sizes into its state")

    def _learn(self, reduced: Iterable[str]) -> None:
        self.reduced = tuple(dict.fromkeys((*self.reduced, *reduced)))

    def _predict(self, param: Tensor) -> _Prediction:
        entry: dict[str, Any] = self.twin.state.get(param) or {}
        state = self.state_of(param)
        recording = self.probes[param].step(state)
        self._learn(recording.state.reduced)
        grad = param.grad
        assert grad is not None
        states = {k: v.detach() for k, v in state.tensors(entry).items()}
        master, made = recording.program.run(
            param.detach().clone(), grad.clone(), states, recording.scalars
        )
        after = recording.state
        kept = {k: states[k].clone() for k in (*after.elements, *after.reduced) if k not in made}
        sizes = {name: float(value.abs().max()) for name, value in states.items()}
        reductions = sum(op.name in REDUCTIONS for op in recording.program.ops)
        tolerance = TOLERANCE + reductions * 2 * math.sqrt(param.numel()) * ROUNDING
        return _Prediction(recording, master, {**kept, **made}, sizes, tolerance)

    def _compare_shared(self, recording: Recording, before: Mapping[str, Any], where: str) -> None:
        state = cast(dict[Any, Any], self.twin.state)
        for key, value in {**before, **recording.group}.items():
            if not _same_number(value, self.group.get(key)):
                raise _Differs(f"param_groups[...][{key!r}] {where}")
        for key, value in recording.shared.items():
            if not _same_number(value, state.get(key)):
                raise _Differs(f"optimizer.state[{key!r}] {where}")
        for key, value in recording.attributes.items():
            if not _same_number(value, vars(self.twin).get(key)):
                raise _Differs(f"its attribute {key!r} {where}")

    def _compare_state(self, found: _Prediction, param: Tensor, where: str) -> None:
        entry: dict[str, Any] = self.twin.state.get(param) or {}
        state = found.recording.state
        right = RuleState.of(entry, param, state.reduced)
        kept = {name: tensor.detach() for name, tensor in right.tensors(entry).items()}
        self.keys.update(entry)
        if set(kept) != set(found.states):
            raise _Differs(f"it keeps {sorted(kept)}, not {sorted(found.states)}, {where}")
        for key, value in {**right.numbers, **state.numbers}.items():
            pair = right.numbers.get(key, _Differs), state.numbers.get(key, _Differs)
            if not _same_number(*pair):
                plain = isinstance(value, (int, float, Tensor))
                told = f" is {pair[0]!r}, not {value!r}" if plain else ""
                raise _Differs(f"state[{key!r}] {where}{told}")
        for name, value in found.states.items():
            size = kept[name].abs().max().clamp_min(found.sizes.get(name, 0.0))
            value = value.reshape(kept[name].shape)
            self._compare_tensor(
                value, kept[name], found.tolerance * size, f"state[{name!r}] {where}"
            )
        for name in right.elements:
            self._code(name, kept[name], where)

    def _code(self, name: str, value: Tensor, where: str) -> None:
        """Note a state's sign; store it as it will be stored, if that is in 8 bits."""
        if bool((value < 0).any()):
            self.negative.add(name)
        if format_of(name, self.way.formats) == "int8" and "[" not in name:
            kinds = (torch.int8,) if name in self.negative else (torch.int8, torch.uint8)
            if not all(survives(value, kind) for kind in kinds):
                raise _Differs(
                    f"state[{name!r}] {where} holds what 8 bits cannot: {value.amax():g}"
                )

    def _compare_tensor(self, found: Tensor, right: Tensor, allowed: Tensor, what: str) -> None:
        if same(found, right):
            return
        self.exact = False
        distance = (found - right).abs().max()
        if not bool(distance <= allowed):
            raise _Differs(f"{what} is off by {float(distance):.2g}")


def _same_number(left: Any, right: Any) -> bool:
    """Equality wherever a tensor lies and however many digits a 0-d tensor has."""
    if (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.numel() == right.numel() == 1
    ):
        return abs(float(left) - float(right)) <= TOLERANCE * abs(float(right))
    return same(left, right)


def _slow_down(group: dict[str, Any]) -> None:
    """What a scheduler does."""
    lr = group.get("lr")
    if isinstance(lr, Tensor):
        lr.mul_(0.5)
    elif isinstance(lr, float):
        group["lr"] = lr * 0.5
